"""Priors: what images look like before anything is known of the update, and what else is known.

An image prior is a frozen dataclass, called with the images of all lanes [R, B, H, W, C], the
iteration, the number of iterations and the target of each lane; the result is its weighted penalty
per lane, [R]. `BatchNormStatistics` is no image prior: it sees what a lane's forward pass shows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import tensorflow as tf

# Keeps the square root differentiable where neighbouring pixels are equal.
_SMOOTHING = 1e-8
# Of the mean variance of a layer: no channel is matched more closely than in units of this.
_FLOOR = 0.01
# Keeps the unit of a layer without any variance above 0.
_DEAD_LAYER = 1e-5

VariationKind = Literal['isotropic', 'anisotropic', 'squared', 'norm']
VARIATION_KINDS: tuple[VariationKind, ...] = ('isotropic', 'anisotropic', 'squared', 'norm')
VariationColor = Literal['separate', 'joint']
VARIATION_COLORS: tuple[VariationColor, ...] = ('separate', 'joint')

DistanceKind = Literal['squared', 'norm']
DISTANCE_KINDS: tuple[DistanceKind, ...] = ('squared', 'norm')
StatisticsKind = Literal['squared', 'norm', 'relative']
STATISTICS_KINDS: tuple[StatisticsKind, ...] = ('squared', 'norm', 'relative')

Statistics = Sequence[tuple[tf.Tensor, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class TotalVariation:
  """Total variation: how much neighbouring pixels differ, per pixel and channel.

  Kinds, with d and r the differences to the pixels below and to the right:
  'isotropic', the mean of sqrt(d^2 + r^2) (Rudin et al. 1992);
  'anisotropic', the mean of |d| + |r|;
  'squared', the mean of d^2 + r^2, which smooths edges away (Mahendran and Vedaldi 2015, beta 2);
  'norm', the TV-L2 of DeepInversion and the attacks after it (Yin et al. 2020, 2021; Jiang et al.
  2025): the four norms, over the whole batch, of the differences down, right and along both
  diagonals, added up. It is no mean, so its weight depends on batch and image size.

  Attributes:
    weight: Its weight beside the matching loss, at the first iteration.
    decay: The factor by which the weight has changed after the last one, geometrically: strong at
      first to guide the search, weak at last so that fine detail is not smoothed away.
    kind: See above.
    color: 'separate' takes each channel's length; 'joint' one length of all channels' differences
      (Blomgren and Chan 1998), so that an edge at the same place in all channels is cheaper than at
      several places. On grey images, and for 'squared' and 'norm', both are the same.
  """

  weight: float
  decay: float = 1.0
  kind: VariationKind = 'isotropic'
  color: VariationColor = 'separate'
  name: str = dataclasses.field(default='total_variation', init=False)

  def __post_init__(self):
    """Raises `ValueError` for an unknown kind or color."""
    for field, known in (('kind', VARIATION_KINDS), ('color', VARIATION_COLORS)):
      if getattr(self, field) not in known:
        raise ValueError(f'{field} must be one of {known}, found {getattr(self, field)!r}')

  def __call__(
    self,
    images: tf.Tensor,
    iteration: tf.Tensor,
    iterations: int,
    groups: tf.Tensor | None = None,
  ) -> tf.Tensor:
    """Weighted penalty of each lane.

    Args:
      images: [R, B, H, W, C], any C; H and W at least 2.
      iteration: From 0, int32.
      iterations: Of the whole attack.
      groups: Not used.

    Returns:
      [R].
    """
    return _decayed(self.weight, self.decay, images, iteration, iterations) * self._value(images)

  def _value(self, images: tf.Tensor) -> tf.Tensor:
    corner = images[:, :, :-1, :-1]
    down = images[:, :, 1:, :-1] - corner
    right = images[:, :, :-1, 1:] - corner
    if self.kind == 'norm':
      differences = (
        images[:, :, 1:] - images[:, :, :-1],
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, 1:] - corner,
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
      )
      return tf.add_n(
        [tf.sqrt(tf.reduce_sum(tf.square(d), (1, 2, 3, 4)) + _SMOOTHING) for d in differences]
      )
    if self.kind == 'isotropic':
      lengths = self._length(tf.square(down) + tf.square(right))
    elif self.kind == 'squared':
      lengths = tf.square(down) + tf.square(right)
    elif self.color == 'separate':
      lengths = tf.abs(down) + tf.abs(right)
    else:
      lengths = self._length(tf.square(down)) + self._length(tf.square(right))
    return _mean_per_lane(lengths)

  def _length(self, squares: tf.Tensor) -> tf.Tensor:
    if self.color == 'joint':
      # Mean, not sum: the weight then means the same for any number of channels.
      squares = tf.reduce_mean(squares, axis=-1, keepdims=True)
    return tf.sqrt(squares + _SMOOTHING)


@dataclasses.dataclass(frozen=True)
class ImageNorm:
  """Mean squared pixel value (Yin et al. 2021, "See through gradients", R_l2).

  Or, of the kind 'norm', the mean over the batch of the images' Euclidean norms, which is what the
  code of Jiang et al. 2025 computes.

  Attributes:
    weight: Its weight beside the matching loss, at the first iteration.
    decay: The factor by which the weight has changed after the last one, geometrically.
    center: The value that costs nothing. 0 is black here; the paper's images have the mean 0, to
      which mid grey, 0.5, corresponds.
    kind: 'squared' or 'norm', see above.
  """

  weight: float
  decay: float = 1.0
  center: float = 0.0
  kind: DistanceKind = 'squared'
  name: str = dataclasses.field(default='image_norm', init=False)

  def __post_init__(self):
    """Raises `ValueError` for an unknown kind."""
    _check_kind(self.kind, DISTANCE_KINDS)

  def __call__(
    self,
    images: tf.Tensor,
    iteration: tf.Tensor,
    iterations: int,
    groups: tf.Tensor | None = None,
  ) -> tf.Tensor:
    """Weighted penalty [R] of images [R, B, H, W, C]; as `TotalVariation`."""
    weight = _decayed(self.weight, self.decay, images, iteration, iterations)
    squares = tf.square(images - self.center)
    if self.kind == 'squared':
      return weight * _mean_per_lane(squares)
    norms = tf.sqrt(tf.reduce_sum(squares, axis=(2, 3, 4)) + _SMOOTHING)
    return weight * tf.reduce_mean(norms, axis=1)


@dataclasses.dataclass(frozen=True)
class GroupConsistency:
  """Mean squared distance to the mean over the lanes that attack the same target.

  Lanes that start apart err apart, so their mean is nearer to the truth (Yin et al. 2021, "See
  through gradients", R_group). Only plain means are taken: lanes are not registered by optical
  flow as in the paper. Images of a batch are compared by position, which fits while all lanes of a
  target have the same labels in the same order; images of one label may still be swapped between
  lanes, and then this pulls them towards a blend.

  Attributes:
    weight: Its weight beside the matching loss.
    start: The share of the iterations, in [0, 1], after which it sets in: lanes have to have found
      something before their mean says anything.
  """

  weight: float
  start: float = 0.5
  name: str = dataclasses.field(default='group_consistency', init=False)

  def __call__(
    self,
    images: tf.Tensor,
    iteration: tf.Tensor,
    iterations: int,
    groups: tf.Tensor | None = None,
  ) -> tf.Tensor:
    """Weighted penalty of each lane; 0 for a lane alone in its group.

    Args:
      images: [R, B, H, W, C].
      iteration: From 0, int32.
      iterations: Of the whole attack.
      groups: Target of each lane, int32 [R], any numbers; None if all lanes have the same.

    Returns:
      [R]; 0 for a lane whose images are not finite.
    """
    if groups is None:
      groups = tf.zeros(tf.shape(images)[0], tf.int32)
    # A lane that diverged must not reach the others: nothing times NaN is NaN, in gradients too.
    alive = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3, 4))
    images = tf.where(alive[:, None, None, None, None], images, 0.0)
    alive = tf.cast(alive, images.dtype)
    same = tf.cast(groups[:, None] == groups[None, :], images.dtype) * alive
    same = tf.math.divide_no_nan(same, tf.reduce_sum(same, axis=1, keepdims=True))
    mean = tf.tensordot(same, images, 1)
    started = tf.cast(iteration, tf.float32) >= self.start * iterations
    weight = self.weight * tf.cast(started, images.dtype)
    return weight * alive * _mean_per_lane(tf.square(images - mean))


@dataclasses.dataclass(frozen=True)
class GaussianImages:
  """Squared Mahalanobis distance to a Gaussian that was fitted to images of the modality.

  Beside the squared error of an update with white noise of variance s^2 it makes the objective
  |U(x) - y|^2 / s^2 + (x - mean)' C^-1 (x - mean), whose minimum is the most likely image: the
  Bayes-optimal attack where update and prior are Gaussian (Balunovic et al. 2022, "Bayesian
  framework for gradient leakage", derive attacks on defences so).

  Attributes:
    gaussian: mean [d], orthonormal components [r, d], their variances [r] and the variance in all
      other directions, `tff_shadow.privacy.GaussianPrior`, over the d = H W C values of an image.
    weight: Its weight beside the matching loss.
    source: What it was fitted to, for the record; priors of the same source and weight are equal.
  """

  gaussian: dataclasses.InitVar[Any]
  weight: float
  source: str = ''
  name: str = dataclasses.field(default='gaussian_images', init=False)

  def __post_init__(self, gaussian: Any):
    """Keeps apart what is no setting, so that `dataclasses.asdict` gives plain values."""
    object.__setattr__(self, '_gaussian', gaussian)

  def __call__(
    self,
    images: tf.Tensor,
    iteration: tf.Tensor,
    iterations: int,
    groups: tf.Tensor | None = None,
  ) -> tf.Tensor:
    """Weighted penalty [R], summed over the batch, of images [R, B, H, W, C]."""
    gaussian = self._gaussian
    mean, components, information = (
      tf.constant(array, images.dtype)
      for array in (gaussian.mean, gaussian.components, 1 / gaussian.variances)
    )
    remaining = tf.constant(1 / gaussian.remaining_variance, images.dtype)
    centered = tf.reshape(images, (*images.shape[:2], -1)) - mean
    along = tf.tensordot(centered, components, [[2], [1]])
    distance = remaining * tf.reduce_sum(tf.square(centered), axis=(1, 2)) + tf.reduce_sum(
      (information - remaining) * tf.square(along), axis=(1, 2)
    )
    return self.weight * distance


@dataclasses.dataclass(frozen=True)
class BatchNormStatistics:
  """Squared distance of the batch statistics before each BatchNorm layer to those of the client.

  Sum over the layers of ||mean - target mean||^2 + ||variance - target variance||^2 (R_BN of Yin et
  al. 2021, and Hatamizadeh et al. 2023 with the client's own statistics as targets).
  `attacks.batch_norm_statistics` gives both lists. Of the kind 'norm' the distances are not
  squared, as in the code of Jiang et al. 2025.

  What a BatchNorm net does is the same for an image of any contrast about the value that its
  padding stands for, and nearly the same for any tint: only these statistics say what they are.

  Attributes:
    weight: Its weight beside the matching loss.
    kind: 'squared'; 'norm'; or 'relative', squared and relative: means in units of the channel's
      target standard deviation, variances in units of its target variance, averaged over channels
      and layers. All layers then count the same; else those of large activations outweigh the
      others. To the unit of variance 1 % of its mean over the layer's channels is added, for
      channels that are nearly constant.
    required: Whether a target whose statistics cannot be matched is refused; it is attacked without
      them otherwise.
  """

  weight: float
  kind: StatisticsKind = 'squared'
  required: bool = True
  name: str = dataclasses.field(default='batch_norm_statistics', init=False)

  def __post_init__(self):
    """Raises `ValueError` for an unknown kind."""
    _check_kind(self.kind, STATISTICS_KINDS)

  def __call__(self, statistics: Statistics, targets: Statistics) -> tf.Tensor:
    """Weighted penalty of one lane.

    Args:
      statistics: (mean, variance) per layer, of the simulated forward pass.
      targets: The same of the client, arrays or tensors of the same shapes.

    Returns:
      A scalar, differentiable in `statistics`.

    Raises:
      ValueError: If the lists are empty or do not have the same length.
    """
    if not statistics or len(statistics) != len(targets):
      raise ValueError(f'{len(statistics)} layers simulated, {len(targets)} given as targets')
    distances = []
    for (mean, variance), targets_of_layer in zip(statistics, targets, strict=True):
      target_mean, target_variance = (tf.cast(part, mean.dtype) for part in targets_of_layer)
      of_means = tf.math.squared_difference(mean, target_mean)
      of_variances = tf.math.squared_difference(variance, target_variance)
      if self.kind == 'relative':
        unit = target_variance + _FLOOR * tf.reduce_mean(target_variance) + _DEAD_LAYER
        distances.append(tf.reduce_mean(of_means / unit + of_variances / unit**2) / len(targets))
      else:
        distances += [tf.reduce_sum(of_means), tf.reduce_sum(of_variances)]
    if self.kind == 'norm':
      distances = [tf.sqrt(distance + _SMOOTHING) for distance in distances]
    return self.weight * tf.add_n(distances)


ImagePrior = TotalVariation | ImageNorm | GroupConsistency | GaussianImages


def reweighted(prior: ImagePrior, weight: float | tf.Tensor) -> ImagePrior:
  """The same prior with another weight."""
  if isinstance(prior, GaussianImages):
    return dataclasses.replace(prior, gaussian=prior._gaussian, weight=weight)
  return dataclasses.replace(prior, weight=weight)


@dataclasses.dataclass(frozen=True)
class Box:
  """Pixel values lie in [low, high]; held by projection after each step."""

  low: float = 0.0
  high: float = 1.0
  name: str = dataclasses.field(default='box', init=False)

  @property
  def center(self) -> float:
    """Mid grey."""
    return (self.low + self.high) / 2

  def project(self, images: tf.Tensor) -> tf.Tensor:
    """The nearest images inside the box."""
    return tf.clip_by_value(images, self.low, self.high)


def _check_kind(kind: str, known: tuple[str, ...]) -> None:
  if kind not in known:
    raise ValueError(f'kind must be one of {known}, found {kind!r}')


def _decayed(
  weight: float, decay: float, images: tf.Tensor, iteration: tf.Tensor, iterations: int
) -> tf.Tensor:
  progress = tf.cast(iteration, images.dtype) / iterations
  return weight * tf.cast(decay, images.dtype) ** progress


def _mean_per_lane(values: tf.Tensor) -> tf.Tensor:
  return tf.reduce_mean(values, axis=(1, 2, 3, 4))
