"""How strong the noise is: relative to the update, absolute, or from a bound to be met."""

import dataclasses
import math
from typing import Literal

import tensorflow as tf

NoiseShape = Literal['isotropic', 'diagonal', 'correlated', 'decoy']
NOISE_SHAPES: tuple[NoiseShape, ...] = ('isotropic', 'diagonal', 'correlated', 'decoy')
StrengthKind = Literal['ratio', 'image_ratio', 'scale', 'region_psnr']
STRENGTH_KINDS: tuple[StrengthKind, ...] = ('ratio', 'image_ratio', 'scale', 'region_psnr')


@dataclasses.dataclass(frozen=True)
class NoiseStrength:
  """Strength of a client's noise.

  Frozen correlated noise of a constant tau ('scale', 'region_psnr') and a constant map m makes
  every update, to first order, a function of one image x + tau m v, however many rounds are
  observed. A map of the current global model is another in every round, and x follows from a few.
  With 'ratio' tau follows the update's norm, and two rounds with the same v give x + tau_1 m v and
  x + tau_2 m v, from which x follows: use it at one round, or with fresh noise; so with
  'image_ratio'.

  Attributes:
    kind: How `value` is meant:
      'ratio': root-mean-square norm of the noise over the norm of the client's update.
      'image_ratio': over the norm of what one image of the client adds to its update (root mean
        square over images). It hides each image equally well among few images and among many, as
        differentially private training does, where 'ratio' hides the sum of all. For a client of
        one image and one step both are the same.
      'scale': absolute. Isotropic and diagonal: standard deviation per weight (root mean square).
        Correlated: tau, the noise in image units (images in [0, 1]) that the update carries.
        Decoy: as many times as what one public image adds to an update differs from the mean of
        what they add (root mean square).
      'region_psnr': dB. The least noise for which no unbiased attacker can reconstruct the region
        with a PSNR above this, by the Cramer-Rao bound of the linearised update; see
        `squared_scale`. There is none for decoy noise.
    value: See above.
  """

  kind: StrengthKind
  value: float

  def __post_init__(self):
    """Raises ValueError for a strength that no noise can have."""
    if self.kind not in STRENGTH_KINDS:
      raise ValueError(f'strength kind must be one of {STRENGTH_KINDS}, found {self.kind!r}')
    if not math.isfinite(self.value) or (self.kind != 'region_psnr' and self.value < 0):
      raise ValueError(f'strength must be finite and not negative, found {self.value}')

  @property
  def is_relative(self) -> bool:
    """Whether it follows the update, or what images add to it."""
    return self.kind in ('ratio', 'image_ratio')

  @property
  def is_none(self) -> bool:
    """Whether no noise at all is asked for; 0 dB is a strength like others."""
    return self.kind != 'region_psnr' and self.value == 0

  def squared_scale(
    self,
    shape: NoiseShape,
    *,
    update_energy: tf.Tensor,
    image_energy: tf.Tensor,
    shape_energy: tf.Tensor,
    sensitivity_energy: tf.Tensor,
    region_energy: tf.Tensor,
    region_fourth_moment: tf.Tensor,
    num_weights: int,
  ) -> tf.Tensor:
    """The factor of the squared unit noise of `shape`.

    Unit noise is N(0, 1) per weight (isotropic), N(0, S_j) (diagonal), J(m v) (correlated) or the
    difference of the gradients of two random batches of public images (decoy).

    For 'region_psnr' let e = 10^(-PSNR/10) be the mean squared error over the region to be
    guaranteed. With M = diag(m) and Fisher information I = J^T Sigma^-1 J of the images, any
    unbiased attacker has E|M(x' - x)|^2 >= tr(M I^-1 M) >= tr(M^2)^2 / tr(M I M), the last step by
    Cauchy-Schwarz, and tr(M I M) = sum_j S_j^2 / sigma_j^2. Isotropic and diagonal noise are scaled
    so that this equals e tr(M^2). For correlated noise Sigma = tau^2 J M^2 J^T, where the first
    bound is tau^2 tr(M^4): tau^2 = e for a map of zeros and ones.

    Args:
      shape: Of the noise.
      update_energy: |update|^2.
      image_energy: Mean over images of the squared norm of what one adds to the update; used for
        'image_ratio'.
      shape_energy: Expected squared norm of the unit noise: the number of weights, sum_j S_j, of
        correlated noise that of the draw itself, of decoy noise an estimate.
      sensitivity_energy: sum_j S_j^2; used for isotropic noise with 'region_psnr'.
      region_energy: tr(M^2): sum over images, pixels and channels of m^2.
      region_fourth_moment: tr(M^4).
      num_weights: Length of the update.

    Returns:
      A scalar, not negative.
    """
    if self.is_relative:
      energy = update_energy if self.kind == 'ratio' else image_energy
      return tf.math.divide_no_nan(self.value**2 * energy, shape_energy)
    if self.kind == 'scale':
      if shape in ('correlated', 'decoy'):
        return tf.constant(self.value**2, tf.float32)
      return tf.math.divide_no_nan(self.value**2 * num_weights, shape_energy)
    error = 10.0 ** (-self.value / 10.0)
    if shape == 'correlated':
      return tf.math.divide_no_nan(error * region_energy, region_fourth_moment)
    energy = sensitivity_energy if shape == 'isotropic' else shape_energy
    return tf.math.divide_no_nan(error * energy, region_energy)
