"""Priors: what images look like before anything is known of the update."""

import dataclasses

import tensorflow as tf

# Keeps the square root differentiable where neighbouring pixels are equal.
_SMOOTHING = 1e-8


@dataclasses.dataclass(frozen=True)
class TotalVariation:
  """Isotropic total variation: mean length of the spatial gradient, per pixel and channel.

  Attributes:
    weight: Its weight beside the matching loss, at the first iteration.
    decay: The factor by which the weight has changed after the last one, geometrically: strong at
      first to guide the search, weak at last so that fine detail is not smoothed away.
  """

  weight: float
  decay: float = 1.0
  name: str = dataclasses.field(default='total_variation', init=False)

  def __call__(self, images: tf.Tensor, iteration: tf.Tensor, iterations: int) -> tf.Tensor:
    """Weighted penalty of images [B, H, W, C], any C, at an iteration (from 0); a scalar."""
    down = images[:, 1:, :-1, :] - images[:, :-1, :-1, :]
    right = images[:, :-1, 1:, :] - images[:, :-1, :-1, :]
    length = tf.sqrt(tf.square(down) + tf.square(right) + _SMOOTHING)
    progress = tf.cast(iteration, images.dtype) / iterations
    weight = self.weight * tf.cast(self.decay, images.dtype) ** progress
    return weight * tf.reduce_mean(length)


@dataclasses.dataclass(frozen=True)
class Box:
  """Pixel values lie in [low, high]; held by projection after each step."""

  low: float = 0.0
  high: float = 1.0
  name: str = dataclasses.field(default='box', init=False)

  def project(self, images: tf.Tensor) -> tf.Tensor:
    """The nearest images inside the box."""
    return tf.clip_by_value(images, self.low, self.high)
