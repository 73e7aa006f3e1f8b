"""Region maps m(x) in [0, 1]: which pixels of an image are sensitive."""

import collections
import math
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError

REGION = 'region'
# Whether smaller numbers are zero depends on the thread that computes them.
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
# Halving the bracket 30 times leaves less than float32 resolves.
_BISECTIONS = 30


class RegionMaps(NamedTuple):
  """Region maps of a batch.

  Attributes:
    maps: float32 [B, H, W, 1] in [0, 1], always finite; 1 is fully sensitive.
    fell_back: bool [B], True where no map could be computed and `maps` is all ones; count these.
  """

  maps: tf.Tensor
  fell_back: tf.Tensor


class RegionMap(Protocol):
  """Anything that says where images are sensitive; works eagerly and in a graph.

  A user's own map is a function of this form, or the kind `given`, which passes on the regions that
  the data set holds.
  """

  def __call__(
    self, images: tf.Tensor, labels: tf.Tensor, given_regions: tf.Tensor | None = None
  ) -> RegionMaps:
    """Returns the maps of float32 images [B, H, W, C] in [0, 1] with int32 labels [B].

    Args:
      images: The images.
      labels: Their classes.
      given_regions: float32 [B, H, W, 1] in [0, 1], where the data set has a region per image.
    """
    ...


def add_region_maps(dataset: tf.data.Dataset, region_map: RegionMap) -> tf.data.Dataset:
  """Adds the map of every image to a client's data, for the saliency 'given'.

  The map of a shadow that stays the same is the same in every round, as frozen noise needs it; that
  of the current global model is not.

  Args:
    dataset: Single examples (not batched) as OrderedDict(x, y, ...), x in [0, 1].
    region_map: Of `build_region_map` with a public model, or one's own.

  Returns:
    The data set with float32 [H, W, 1] 'region' in each element; ones where there is no map.
  """

  def add(example):
    maps, _ = region_map(example['x'][None], example['y'][None])
    return collections.OrderedDict({**example, REGION: maps[0]})

  return dataset.map(add)


def uniform_region_map(
  images: tf.Tensor, labels: tf.Tensor, given_regions: tf.Tensor | None = None
) -> RegionMaps:
  """A `RegionMap` for which every pixel is fully sensitive."""
  del labels, given_regions
  shape = tf.shape(images)
  maps = tf.ones([shape[0], shape[1], shape[2], 1])
  maps = tf.ensure_shape(maps, [*images.shape[:3], 1])
  return RegionMaps(maps, tf.zeros(shape[:1], tf.bool))


def given_region_map(
  images: tf.Tensor, labels: tf.Tensor, given_regions: tf.Tensor | None = None
) -> RegionMaps:
  """A `RegionMap` that passes on `given_regions` as they are, for instance a segmentation mask.

  A mask that is zero everywhere falls back to ones and is counted: protecting nothing must be
  asked for by other means. In a graph values cannot raise, so there a mask with values outside
  [0, 1] or NaN falls back too.

  Raises:
    UserError: If there is no mask, its size is not that of the images or, when called eagerly, a
      value is outside [0, 1] or NaN.
  """
  del labels
  if given_regions is None:
    raise UserError(
      "saliency kind 'given': there are no regions; the data set must hold one per"
      ' image, or choose another kind'
    )
  regions = tf.convert_to_tensor(given_regions, tf.float32)
  wanted = tf.TensorShape([*images.shape[:3], 1])
  if not regions.shape.is_compatible_with(wanted):
    raise UserError(
      f"saliency kind 'given': regions of shape {tuple(regions.shape)}, but the images need"
      f' {tuple(wanted)}'
    )
  # NaN compares as False.
  valid = tf.reduce_all((regions >= 0.0) & (regions <= 1.0), axis=[1, 2, 3])
  if tf.executing_eagerly() and not np.all(valid):
    raise UserError(
      f"saliency kind 'given': the region of image {int(np.argmin(valid))} of the batch has values"
      ' outside [0, 1] or NaN'
    )
  usable = valid & (tf.reduce_max(regions, axis=[1, 2, 3]) >= _SMALLEST_NORMAL)
  maps = tf.where(usable[:, None, None, None], regions, 1.0)
  return RegionMaps(maps, tf.logical_not(usable))


def maps_from_scores(
  scores: tf.Tensor,
  image_size: tuple[int, int] | tf.Tensor,
  *,
  top_fraction: float | None = None,
  softness: float = 0.05,
) -> RegionMaps:
  """Region maps from any scores, without ever a NaN.

  Args:
    scores: float32 [B, h, w, 1], at least 0, of any scale.
    image_size: (H, W) of the images; scores are resized bilinearly.
    top_fraction: If set, see `soft_top_fraction`; else the map is the scores over their maximum.
    softness: See `soft_top_fraction`.

  Returns:
    Maps [B, H, W, 1]. An image whose scores hold a NaN or infinity, or are zero everywhere, gets
    ones and is counted in `fell_back`.
  """
  scores = tf.image.resize(scores, image_size, method='bilinear')
  peak = tf.reduce_max(scores, axis=[1, 2, 3], keepdims=True)
  finite = tf.reduce_all(tf.math.is_finite(scores), axis=[1, 2, 3], keepdims=True)
  usable = finite & (peak >= _SMALLEST_NORMAL)
  maps = tf.clip_by_value(tf.where(usable, scores, 1.0) / tf.where(usable, peak, 1.0), 0.0, 1.0)
  if top_fraction is not None:
    maps = tf.where(usable, soft_top_fraction(maps, top_fraction, softness), 1.0)
  return RegionMaps(maps, tf.logical_not(usable[:, 0, 0, 0]))


def soft_top_fraction(scores: tf.Tensor, fraction: float, softness: float) -> tf.Tensor:
  """Keeps the highest `fraction` of an image's pixels, with a smooth ramp instead of a cut.

  The map is sigmoid((score - t) / softness) with t, found by bisection, such that its mean is
  `fraction`. So it is monotone in the score, equal scores get equal values, no value is a hard 0
  by construction, and scores that are all equal give `fraction` everywhere.

  Args:
    scores: float32 [B, H, W, 1], finite, scaled to a maximum of 1.
    fraction: In (0, 1).
    softness: Width of the ramp in units of the score, > 0.

  Returns:
    float32 [B, H, W, 1] in [0, 1].
  """
  axes = [1, 2, 3]
  # At the bracket's ends every pixel's value is at least, or at most, the fraction.
  offset = softness * (math.log(fraction) - math.log1p(-fraction))
  low = tf.reduce_min(scores, axes, keepdims=True) - offset
  high = tf.reduce_max(scores, axes, keepdims=True) - offset

  def ramp(threshold):
    return tf.sigmoid((scores - threshold) / softness)

  def halve(low, high):
    middle = 0.5 * (low + high)
    too_much = tf.reduce_mean(ramp(middle), axes, keepdims=True) > fraction
    return tf.where(too_much, middle, low), tf.where(too_much, high, middle)

  low, high = tf.while_loop(
    lambda *_: True, halve, (low, high), maximum_iterations=_BISECTIONS, parallel_iterations=1
  )
  return ramp(0.5 * (low + high))
