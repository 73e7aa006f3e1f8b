"""Attacks of the literature by name, as settings of this one; and our own.

What a preset keeps of its paper is objective, optimiser, schedule and start. Iterations are those
of the paper unless it ran tens of thousands; all can be overridden. Pixel values are in [0, 1] here
and standardised there, so learning rates and prior weights were carried over by that factor (4).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from attacks.config import AttackConfig
from attacks.generators import DeepImagePrior, GenerativePrior
from attacks.initialization import MeanImageStart, NormalStart, UniformStart
from attacks.matching import CosineMatching, NoMatching, NormMatching, SquaredMatching
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
    public_prior: Weight of a Gaussian prior fitted to public images (`attacks.public_prior`), times
      the number of values of an image; 0 for an attack without.
    generator_settings: Of its `GenerativePrior`, where they are not the defaults.
  """

  source: str
  build: Callable[[], AttackConfig]
  needs_generator: bool = False
  public_prior: float = 0.0
  generator_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

  def search_in(self, generator: tf.keras.Model, source: str, seed: int) -> GenerativePrior:
    """What the search moves: a generator's latents and weights.

    Args:
      generator: From `tff_shadow.models.load_generator`.
      source: Where it came from, for the record.
      seed: Decides the start latents.
    """
    return GenerativePrior(generator, source=source, seed=seed, **self.generator_settings)


def _pixels(**settings) -> AttackConfig:
  """Without anything of ours: pixels, exact derivatives, no prior, no search for an order."""
  plain = AttackConfig(
    total_variation=TotalVariation(weight=0.0),
    batch_norm_statistics=BatchNormStatistics(weight=0.0),
    hold_contrast=False,
    parametrization=PixelParametrization(),
    rectifier=ExactRectifier(),
    orders=1,
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


# Jiang et al. standardise pixels by these, of their chest images; the eyes' channels have standard
# deviations of 0.15, 0.19 and 0.28.
_PAPER_MEAN, _PAPER_DEVIATION = 0.5329, 0.2534
# Their matching loss is of updates at this learning rate, ours of gradients.
_PAPER_LOCAL_RATE = 1e-2


def _shadow_priors(*, matching: float, batch_norm: float, **settings) -> AttackConfig:
  """The objective of Jiang et al. at the weights of their code.

  Total variation and norm are there of standardised pixels, and homogeneous, so that their weights
  grow here by as much as pixel differences shrink.
  """
  return _pixels(
    matching=NormMatching(weight=matching * _PAPER_LOCAL_RATE),
    total_variation=TotalVariation(weight=1e-4 / _PAPER_DEVIATION, kind='norm'),
    image_norm=ImageNorm(weight=1e-5 / _PAPER_DEVIATION, center=_PAPER_MEAN, kind='norm'),
    batch_norm_statistics=BatchNormStatistics(weight=batch_norm, kind='norm'),
    **settings,
  )


def _shadow_pixels() -> AttackConfig:
  return _shadow_priors(
    matching=1e-3,
    batch_norm=0.1,
    optimizer=Adam(0.1 * _PAPER_DEVIATION, beta_1=0.9, beta_2=0.9, epsilon=1e-8),
    schedule=CosineDecay(warm_up=100),
    langevin=0.1 * 0.1 * _PAPER_DEVIATION,
    start=MeanImageStart(noise=0.0),
    iterations=2000,
  )


def _shadow_generator() -> AttackConfig:
  return _shadow_priors(
    matching=1.0,
    batch_norm=5e-2,
    optimizer=Adam(1e-2, epsilon=1e-8),
    schedule=StepDecay(factor=0.8, phases=2),
    iterations=1000,
  )


def _released(build: Callable[[], AttackConfig]) -> Callable[[], AttackConfig]:
  return lambda: dataclasses.replace(build(), matching=NoMatching())


# Latents at a learning rate of 1e-2, and then the weights alone at 1e-4.
_SHADOW_GENERATOR = {'weight_share': 0.5, 'latents_last': False, 'weight_scale': 0.01}


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
    ' a surrogate for the derivative of rectifiers, layers balanced, and where the client shared'
    ' BatchNorm statistics, these, each channel relative to its own. Where a normalised network'
    ' hides the contrast, it is that of the public mean image.',
    AttackConfig,
  ),
  'best_batch': Preset(
    'The same for batches of several images: starts further apart, shorter steps, a stronger prior'
    ' at first, and the mean of four restarts.',
    _best_batch,
  ),
  'best_public': Preset(
    'The same with what public images of the modality say of images, a Gaussian that is fitted to'
    ' them: where many images share one update, it says less of each.',
    _best_batch,
    public_prior=0.03,
  ),
  'best_public_strong': Preset(
    'The same with ten times the weight: for images that are much alike, and several local steps,'
    ' which lead a search astray.',
    _best_batch,
    public_prior=0.3,
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
    'Jiang, Ma and Yang 2025, their attack on pixels at the weights of their code, but with a'
    ' matching loss that is differentiated. 2,000 of 40,000 iterations; pixels are kept in [0, 1],'
    ' where theirs are stretched to it at the end.',
    _shadow_pixels,
  ),
  'shadow_pixels_released': Preset(
    'The same as their released code computes it: the matching loss is of tensors detached from'
    ' the image, so constant, and BatchNorm statistics, priors and the start image do the work.'
    " Left out is the task loss's own gradient, which its simulated step adds to the image's, of a"
    ' model that it trains on along the way.',
    _released(_shadow_pixels),
  ),
  'shadow_generator': Preset(
    'Jiang, Ma and Yang 2025, their attack through a generator at the weights of their code, but'
    ' with a matching loss that is differentiated: latents, then weights. 500 and 500 of 5,000 and'
    ' 5,000 iterations.',
    _shadow_generator,
    needs_generator=True,
    generator_settings=_SHADOW_GENERATOR,
  ),
  'shadow_generator_released': Preset(
    'The same as their released code computes it, without matching: see shadow_pixels_released.',
    _released(_shadow_generator),
    needs_generator=True,
    generator_settings=_SHADOW_GENERATOR,
  ),
}
