"""Contrast, which the gradient of a normalised network does not show.

Where every path from the image meets a normalisation before anything that has a bias, and the
model's own standardisation maps mid grey to zero, scaling an image about mid grey changes nothing
but the share of the normalisation's epsilon. The matching loss is then the same for all contrasts,
its gradient is at right angles to them, and every step of an optimiser raises the contrast a
little, as it raises the norm of weights before a normalisation. So contrast has to be held.
"""

import numpy as np
import tensorflow as tf

from attacks.simulator import ClientSimulator

_SCALE = 0.5
# Far above what epsilon and rounding make, far below what half the contrast does elsewhere.
_SAME = 0.05
_TINY = 1e-6


def hides_contrast(simulator: ClientSimulator, image: np.ndarray, center: float) -> bool:
  """Whether the gradient stays the same when an image loses half of its contrast.

  Args:
    simulator: Of the client.
    image: [H, W, C], any that is not flat.
    center: The value that contrast is about.

  Returns:
    True if the two gradients differ by less than 5 % of their norm.
  """
  labels = tf.zeros([1], tf.int32)

  def gradient(scale: float) -> np.ndarray:
    images = tf.constant(center + scale * (image[None] - center), simulator.dtype)
    tensors = simulator.gradient(images, labels)
    return np.concatenate([tensor.numpy().ravel() for tensor in tensors])

  full = gradient(1.0)
  return float(np.linalg.norm(gradient(_SCALE) - full)) < _SAME * float(np.linalg.norm(full))


def with_contrast(images: tf.Tensor, contrast: float, center: float) -> tf.Tensor:
  """Scales every lane's images about `center`.

  Args:
    images: [R, B, H, W, C].
    contrast: The root mean square of their distance to `center` over all of a lane's pixels.
    center: See `hides_contrast`.

  Returns:
    Images of that contrast; flat ones at the center stay as they are.
  """
  distance = images - center
  square = tf.reduce_mean(tf.square(distance), axis=(1, 2, 3, 4), keepdims=True)
  return center + distance * contrast * tf.math.rsqrt(square + _TINY)
