"""Public images whose gradients are the noise that hides a client's own."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tff_shadow.aggregators.shadow_noise import squared_norm
from tff_shadow.data import Examples
from tff_shadow.learning.noise_settings import ShadowNoise
from tff_shadow.models import batch_norm_layers
from tff_shadow.shadow.augmentation import augment

# From images and labels to the gradients of their mean loss.
MeanGradient = Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]
# Every client gets them with the computation: 77 MB at 224 px.
_MAX_DECOYS = 512
# Images whose gradient is taken at a time. Few, as the energy of the noise follows from how far
# these gradients are apart, and most of it may lie in one direction, that of the label.
_CHUNK = 4
# Where a chunk has to be as large as the client's own batch, there are as many pairs at least.
_MIN_PAIRS = 4


def decoy_pool(public: Examples) -> Examples:
  """The decoys of public images: all, or 512 of them, evenly spaced."""
  if len(public) <= _MAX_DECOYS:
    return public
  return public.take(np.arange(_MAX_DECOYS) * len(public) // _MAX_DECOYS)


class DecoyBatches:
  """Draws pairs of batches and takes the difference of their gradients."""

  def __init__(
    self,
    public: Examples,
    size: int,
    augmentations: Sequence[str],
    *,
    mixes_batches: bool,
  ):
    """Keeps the images, as 8 bits.

    Args:
      public: Images of the modality that are no secret, with labels.
      size: Of a batch.
      augmentations: How the images are varied.
      mixes_batches: Whether the gradient of a batch is not the mean of those of its images, as with
        BatchNorm: then there are as many pairs of batches as large as the client's own as make
        `size` images, and four at least.

    Raises:
      ValueError: If there are no images.
    """
    if not len(public):
      raise ValueError('decoy noise needs public images')
    self._images = np.asarray(public.images)
    self._labels = np.asarray(public.labels, np.int32)
    self._size = size
    self._augmentations = tuple(augmentations)
    self._mixes_batches = mixes_batches

  def difference(
    self,
    mean_gradient: MeanGradient,
    key: tf.Tensor,
    images_per_step: tf.Tensor,
    weights: Sequence[tf.Tensor],
  ) -> tuple[list[tf.Tensor], tf.Tensor]:
    """A draw of mean 0 with the covariance of the gradient of one image; works in a graph.

    With gA and gB the mean gradients of two batches of n images each, drawn with replacement, it is
    sqrt(n / 2) (gA - gB): near to normal, for it is the sum of many. Large batches are taken in
    parts.

    Args:
      mean_gradient: See there.
      key: int32 [2]; decides the images.
      images_per_step: In the client's own batches, float32.
      weights: Whose gradients these are.

    Returns:
      One tensor for each of `weights`, and their squared norm as it is expected, not that of this
      draw, which varies as widely as a single normal number does.
    """
    pairs = tf.constant(-(-self._size // _CHUNK))
    size = -(-tf.constant(self._size) // pairs)
    if self._mixes_batches:
      size = tf.maximum(1, tf.cast(tf.round(images_per_step), tf.int32))
      pairs = tf.maximum(_MIN_PAIRS, -(-tf.constant(self._size) // size))
    zeros = [tf.zeros_like(tensor) for tensor in weights]

    def add_pair(pair, energy, firsts, seconds):
      first, second = (mean_gradient(*self.batch(key, 2 * pair + k, size)) for k in range(2))
      energy += squared_norm(first) + squared_norm(second)
      firsts, seconds = (
        [total + own for total, own in zip(*both, strict=True)]
        for both in ((firsts, first), (seconds, second))
      )
      return pair + 1, energy, firsts, seconds

    _, energy, firsts, seconds = tf.while_loop(
      lambda pair, *_: pair < pairs,
      add_pair,
      [tf.constant(0), tf.zeros(()), zeros, zeros],
      parallel_iterations=1,
    )
    size, pairs = tf.cast(size, tf.float32), tf.cast(pairs, tf.float32)
    scale = tf.sqrt(size / 2.0 / pairs)
    difference = [scale * (a - b) for a, b in zip(firsts, seconds, strict=True)]
    # The variance of the mean gradients of `size` images, times that.
    mean_energy = squared_norm([a + b for a, b in zip(firsts, seconds, strict=True)]) / (2 * pairs)
    return difference, size * (energy - mean_energy) / (2 * pairs - 1)

  def batch(
    self, key: tf.Tensor, number: int | tf.Tensor, size: int | tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Varied images and their labels, drawn with replacement.

    Args:
      key: int32 [2]; decides the images.
      number: Of the batch; others are independent.
      size: B.

    Returns:
      float32 [B, H, W, C] in [0, 1] and int32 [B].
    """
    # The first two are the aggregator's. All 64 bits count: 32 an attacker could try one by one.
    own = tf.random.experimental.stateless_split(key, 3)[2]
    seeds = tf.random.experimental.stateless_split(own + tf.stack([0, number]), 2)
    chosen = tf.random.stateless_uniform([size], seeds[0], 0, len(self._labels), tf.int32)
    images = tf.cast(tf.gather(self._images, chosen), tf.float32) / 255.0
    return augment(images, self._augmentations, seeds[1]), tf.gather(self._labels, chosen)


def decoy_batches(noise: ShadowNoise, public: Examples, model: tf.keras.Model) -> DecoyBatches:
  """The decoys of `noise` for a model of this architecture."""
  return DecoyBatches(
    public,
    noise.decoys,
    noise.decoy_augmentations,
    mixes_batches=bool(batch_norm_layers(model)),
  )
