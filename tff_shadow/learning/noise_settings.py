"""What noise clients add, as settings, and the data that it needs."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import tensorflow as tf

from tff_shadow.aggregators import NoiseShape, NoiseStrength
from tff_shadow.aggregators.shadow_noise import check_strength, floor_of
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.augmentation import AUGMENTATIONS
from tff_shadow.shadow.noise_keys import NOISE_KEY
from tff_shadow.shadow.region_maps import REGION

Propagation = Literal['per_step', 'local_training', 'images']
PROPAGATIONS: tuple[Propagation, ...] = ('per_step', 'local_training', 'images')


@dataclasses.dataclass(frozen=True)
class ShadowNoise:
  """What noise a client adds, and how its shadow finds the shape.

  Attributes:
    shape: 'isotropic': the same for every weight. 'diagonal': variances by how much of the region
      each weight of the update carries. 'correlated': how the update itself moves when the region
      does, n ~ J(m v), so that the noise lies where the region's information lies. 'decoy': what
      the updates of two batches of other, public images differ by, so that the noise lies where
      images of the modality tell themselves apart: with the covariance of the signal, which of all
      noises of one energy leaves the best linear attacker least of what an image adds. It needs no
      region, and its shape is public.
    strength: See `NoiseStrength`.
    saliency: Where the region is.
    propagation: How J is taken. 'per_step': exact derivative of each local step's gradient, without
      its echo in later steps; needs plain SGD. 'local_training': through the whole local training,
      by the central difference (U(x + eps m v) - U(x - eps m v)) / (2 eps), zero-mean by
      construction, which trains two more copies for every draw.
      'images', for correlated noise of an absolute strength: the training runs on x + tau m v
      itself, so that all that is sent, BatchNorm statistics too, depends on those images alone. The
      other two add the linear part of that, tau J(m v). Frozen, it is the gradient of
      tau <m v, dloss/dx>, which training can lower without end by making the model more sensitive:
      over many rounds it spoils the model where 'images', whose loss is bounded, does not.
    probes: Rademacher draws for the diagonal; 8 recover about 90 % of what exact ones would gain.
      With 'per_step' each is one batch's, at the initial weights, one batch after another and round
      again if there are fewer, so that their cost does not grow with the client's data. Also how
      many images 'image_ratio' is measured on.
    epsilon: Of the central difference, in image units.
    floor: Share of the noise's energy that is isotropic, by default 1 %, of decoy noise 99.9; none
      with 'images', where the update has nothing else in it that noise would have to cover.
    local_epochs: How often a client's data repeats each image; only 'region_psnr', 'image_ratio'
      and decoy noise need it.
    decoys: Public images in each of the two batches whose gradients make decoy noise.
    decoy_augmentations: How they are varied, of `tff_shadow.shadow.augmentation.AUGMENTATIONS`, so
      that nobody knows all of them.
  """

  shape: NoiseShape
  strength: NoiseStrength
  saliency: SaliencyConfig = dataclasses.field(default_factory=SaliencyConfig)
  propagation: Propagation = 'per_step'
  probes: int = 8
  epsilon: float = 0.1
  floor: float | None = None
  local_epochs: int = 1
  decoys: int = 32
  decoy_augmentations: tuple[str, ...] = ('shifts', 'brightness')

  def __post_init__(self):
    """Fills the floor in; raises ValueError for settings that fit no noise."""
    object.__setattr__(self, 'floor', floor_of(self.shape, self.floor))
    if self.propagation not in PROPAGATIONS:
      raise ValueError(f'propagation must be one of {PROPAGATIONS}, found {self.propagation!r}')
    if self.in_images and (self.shape != 'correlated' or self.strength.is_relative):
      raise ValueError(
        "propagation 'images' needs correlated noise of strength 'scale' or 'region_psnr', found"
        f' {self.shape} of {self.strength.kind!r}'
      )
    if self.probes < 1 or self.local_epochs < 1 or self.decoys < 1:
      raise ValueError('probes, local_epochs and decoys must be at least 1')
    check_strength(self.shape, self.strength)
    if not set(self.decoy_augmentations) <= set(AUGMENTATIONS):
      raise ValueError(
        f'decoy_augmentations must be some of {tuple(AUGMENTATIONS)}, found'
        f' {self.decoy_augmentations}'
      )
    if not 0 < self.epsilon < float('inf'):
      raise ValueError(f'epsilon must be finite and above 0, found {self.epsilon}')

  @classmethod
  def from_public_settings(cls, settings: Mapping[str, Any]) -> 'ShadowNoise':
    """What `ShadowDefense.public_settings` told of, as observations hold it."""
    fields = {name: value for name, value in settings.items() if name not in ('name', 'frozen')}
    fields['strength'] = NoiseStrength(**fields['strength'])
    fields['saliency'] = SaliencyConfig(**fields['saliency'])
    return cls(**fields)

  @property
  def why_not_frozen(self) -> str | None:
    """What gives frozen noise away over several rounds; None if it holds, see `NoiseStrength`."""
    if self.shape != 'correlated':
      return (
        f'{self.shape} noise would repeat one draw, which the difference of two rounds is free of'
      )
    if self.strength.is_relative:
      return (
        'a ratio changes from round to round, and two strengths of one draw give the image away'
      )
    if self.saliency.kind not in ('given', 'uniform'):
      return (
        f'the map {self.saliency.kind!r} of the global model changes from round to round, and two'
        ' maps over one draw give the image away'
      )
    return None

  @property
  def in_images(self) -> bool:
    """Whether the noise is in the images, and none is added to the update."""
    return self.propagation == 'images'

  @property
  def added(self) -> tuple[NoiseShape, NoiseStrength]:
    """Shape and strength of what is added to the update."""
    if self.in_images:
      return 'isotropic', NoiseStrength('ratio', 0.0)
    return self.shape, self.strength

  @property
  def needs_shadow(self) -> bool:
    """Whether region maps and derivatives are computed at all."""
    return self.shape in ('diagonal', 'correlated') or self.strength.kind == 'region_psnr'

  @property
  def probes_batches(self) -> bool:
    """Whether the diagonal is probed on some batches before the training."""
    return self.needs_shadow and self.propagation == 'per_step' and self.shape != 'correlated'

  @property
  def measures_images(self) -> bool:
    """Whether it is measured, before the training, what single images add to the update."""
    return self.strength.kind == 'image_ratio'

  @property
  def needs_decoys(self) -> bool:
    """Whether the clients need public images."""
    return self.shape == 'decoy'

  @property
  def training_draws(self) -> int:
    """Draws of v per image along which the local training is differentiated."""
    if not self.needs_shadow or self.probes_batches or self.in_images:
      return 0
    return 1 if self.shape == 'correlated' else self.probes


def shadow_input_spec(
  image_shape: tuple[int, int, int], *, with_regions: bool
) -> collections.OrderedDict:
  """Element type of a client's data: x, y, noise_key int32 [B, 2] and region where it is given."""
  spec = collections.OrderedDict(
    x=tf.TensorSpec((None, *image_shape), tf.float32),
    y=tf.TensorSpec((None,), tf.int32),
  )
  spec[NOISE_KEY] = tf.TensorSpec((None, 2), tf.int32)
  if with_regions:
    spec[REGION] = tf.TensorSpec((None, *image_shape[:2], 1), tf.float32)
  return spec
