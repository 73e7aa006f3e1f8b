"""Attacks of the literature by name, as settings of this one; and our own.

What a preset keeps of its paper is objective, optimiser, schedule and start. Iterations are those
of the paper unless it ran tens of thousands; all can be overridden. Pixel values are in [0, 1] here
and standardised there, so learning rates and prior weights were carried over by that factor (4).
"""

import dataclasses
from collections.abc import Callable

from attacks.config import AttackConfig
from attacks.generators import DeepImagePrior
from attacks.initialization import MeanImageStart, NormalStart, UniformStart
from attacks.matching import CosineMatching, SquaredMatching
from attacks.optimizers import Adam, CosineDecay, Lbfgs, StepDecay
from attacks.parametrizations import PixelParametrization
from attacks.priors import BatchNormStatistics, GroupConsistency, ImageNorm, TotalVariation
from attacks.rectifiers import ExactRectifier


@dataclasses.dataclass(frozen=True)
class Preset:
  """A named attack.

  Attributes:
    source: Where it was published, and what differs.
    build: Makes its settings.
    needs_generator: Whether it needs --generator.
  """

  source: str
  build: Callable[[], AttackConfig]
  needs_generator: bool = False


def _pixels(**settings) -> AttackConfig:
  """Without anything of ours: pixels, exact derivatives, no prior."""
  plain = AttackConfig(
    total_variation=TotalVariation(weight=0.0),
    parametrization=PixelParametrization(),
    rectifier=ExactRectifier(),
  )
  return dataclasses.replace(plain, **settings)


def _dlg() -> AttackConfig:
  return _pixels(
    matching=SquaredMatching(),
    optimizer=Lbfgs(pairs=100),
    start=UniformStart(),
    joint_labels=True,
    iterations=300,
  )


def _idlg() -> AttackConfig:
  return dataclasses.replace(_dlg(), joint_labels=False, label_rule='idlg')


def _inverting_gradients() -> AttackConfig:
  return _pixels(
    matching=CosineMatching(),
    total_variation=TotalVariation(weight=0.4, kind='anisotropic'),
    optimizer=Adam(0.025, signed=True),
    schedule=StepDecay(),
    start=NormalStart(0.25),
    iterations=4800,
  )


def _grad_inversion() -> AttackConfig:
  return _pixels(
    matching=SquaredMatching(),
    total_variation=TotalVariation(weight=1e-4, kind='norm'),
    image_norm=ImageNorm(weight=1e-5, center=0.5),
    batch_norm_statistics=BatchNormStatistics(weight=0.1),
    group_consistency=GroupConsistency(weight=0.01),
    optimizer=Adam(0.025),
    schedule=CosineDecay(warm_up=50),
    langevin=0.005,
    start=NormalStart(0.25),
    restarts=8,
    iterations=2000,
  )


def _generative() -> AttackConfig:
  return _pixels(
    matching=CosineMatching(), optimizer=Adam(0.03), schedule=StepDecay(), iterations=3000
  )


def _deep_image_prior() -> AttackConfig:
  return _pixels(
    matching=CosineMatching(),
    optimizer=Adam(0.01),
    schedule=CosineDecay(),
    parametrization=DeepImagePrior(),
    iterations=1000,
  )


def _surrogate_model() -> AttackConfig:
  return _pixels(
    matching=CosineMatching(),
    total_variation=TotalVariation(weight=0.1),
    optimizer=Adam(0.1),
    schedule=CosineDecay(),
    start=NormalStart(0.1),
    simulation='between',
    iterations=1000,
  )


def _shadow_pixels() -> AttackConfig:
  return _pixels(
    matching=SquaredMatching(),
    total_variation=TotalVariation(weight=1e-4, kind='norm'),
    image_norm=ImageNorm(weight=1e-5),
    batch_norm_statistics=BatchNormStatistics(weight=0.1),
    optimizer=Adam(0.1, beta_1=0.9, beta_2=0.9),
    schedule=CosineDecay(warm_up=100),
    langevin=0.01,
    start=MeanImageStart(),
    iterations=2000,
  )


def _best_batch() -> AttackConfig:
  return AttackConfig(
    total_variation=TotalVariation(weight=0.5, decay=0.02),
    optimizer=Adam(0.2),
    start=MeanImageStart(noise=0.1),
    restarts=4,
    combination='mean',
  )


PRESETS: dict[str, Preset] = {
  'best': Preset(
    'The strongest found here for fresh convolutional nets: damped frequencies instead of pixels,'
    ' a surrogate for the derivative of rectifiers, layers balanced.',
    AttackConfig,
  ),
  'best_batch': Preset(
    'The same for batches of several images: starts further apart, shorter steps, a stronger prior'
    ' at first, and the mean of four restarts.',
    _best_batch,
  ),
  'dlg': Preset(
    'Zhu, Liu and Han 2019, "Deep leakage from gradients": squared distance, L-BFGS, labels'
    ' optimised too. With a line search, which the paper does not have.',
    _dlg,
  ),
  'idlg': Preset(
    'Zhao, Mopuri and Bilen 2020, "iDLG": as dlg, the label from the sign of the gradient.', _idlg
  ),
  'inverting_gradients': Preset(
    'Geiping et al. 2020, "Inverting gradients": cosine, total variation, signed Adam.',
    _inverting_gradients,
  ),
  'grad_inversion': Preset(
    'Yin et al. 2021, "See through gradients": squared distance, fidelity, BatchNorm statistics and'
    ' group consistency. 2,000 of 20,000 iterations; no registration by optical flow.',
    _grad_inversion,
  ),
  'generative': Preset(
    'Jeon et al. 2021, "Gradient inversion with generative image prior": latents, then weights of a'
    ' generator.',
    _generative,
    needs_generator=True,
  ),
  'deep_image_prior': Preset(
    'Zhang et al. 2023, "Generative gradient inversion via over-parameterized networks in federated'
    ' learning": the weights of an untrained network (Ulyanov et al. 2018).',
    _deep_image_prior,
  ),
  'surrogate_model': Preset(
    'Zhu et al. 2023, "Surrogate model extension (SME)": one gradient between old and new weights'
    ' stands for many local steps.',
    _surrogate_model,
  ),
  'shadow_pixels': Preset(
    'Jiang, Ma and Yang 2025, their attack on pixels, with a matching loss that is differentiated.'
    ' 2,000 of 40,000 iterations.',
    _shadow_pixels,
  ),
}
