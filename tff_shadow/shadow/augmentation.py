"""Random variations of training images, the same again for the same seed."""

from collections.abc import Sequence

import tensorflow as tf

from tff_shadow.errors import UserError

# Name: what it does.
AUGMENTATIONS = {
  'mirror': 'left and right',
  'turns': 'quarter turns',
  'shifts': 'shifts up to 10 % and zooms up to 15 %, reflected at the border',
  'brightness': 'brightness up to 0.05 and contrast up to 10 %',
}
_SHIFT, _ZOOM, _BRIGHTNESS, _CONTRAST = 0.1, 0.15, 0.05, 0.1


def check_augmentations(names: Sequence[str]) -> None:
  """Raises `UserError` for a name that is not in `AUGMENTATIONS`."""
  for name in names:
    if name not in AUGMENTATIONS:
      raise UserError(f'--augment={name}: use a list of {", ".join(AUGMENTATIONS)}, or nothing')


def augment(images: tf.Tensor, names: Sequence[str], seed: tf.Tensor) -> tf.Tensor:
  """Varies each image by itself; works in a graph.

  Args:
    images: float32 [B, H, W, C] in [0, 1]; if they are not square, turns are half ones.
    names: Of `AUGMENTATIONS`, in any order.
    seed: int32 [2]; decides everything.

  Returns:
    float32 [B, H, W, C] in [0, 1].
  """
  batch = tf.shape(images)[0]
  seeds = tf.random.experimental.stateless_split(seed, 6)

  def uniform(index, bound):
    return tf.random.stateless_uniform([batch], seeds[index], -bound, bound)

  def coin(index):
    return tf.random.stateless_uniform([batch, 1, 1, 1], seeds[index], 0, 2, tf.int32) == 1

  if 'mirror' in names:
    images = tf.where(coin(0), tf.reverse(images, [2]), images)
  if 'turns' in names:
    # With a mirror image at random this gives all eight, else the four turns.
    half = tf.reverse(images, [1, 2])
    images = tf.where(coin(1), half, images)
    if images.shape[1] == images.shape[2]:
      quarter = tf.reverse(tf.transpose(images, [0, 2, 1, 3]), [2])
      images = tf.where(coin(2), quarter, images)
  if 'shifts' in names:
    images = _moved(images, uniform(3, _ZOOM), *tf.unstack(_pairs(batch, seeds[4]), axis=1))
  if 'brightness' in names:
    bright, contrast = tf.unstack(_pairs(batch, seeds[5]), axis=1)
    mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)
    factor = (1 + _CONTRAST * contrast)[:, None, None, None]
    images = mean + factor * (images - mean) + _BRIGHTNESS * bright[:, None, None, None]
  return tf.clip_by_value(images, 0.0, 1.0)


def _pairs(batch: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  return tf.random.stateless_uniform([batch, 2], seed, -1.0, 1.0)


def _moved(images: tf.Tensor, zoom: tf.Tensor, down: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
  """Zoomed about the centre and shifted, by shares of the side in [-1, 1] times `_SHIFT`."""
  height, width = images.shape[1:3]
  scale = 1 / (1 + zoom)
  x, y = (
    (size - 1) / 2 * (1 - scale) + _SHIFT * size * share
    for size, share in ((width, right), (height, down))
  )
  zero = tf.zeros_like(scale)
  # Rows of the matrix from output to input coordinates; x first.
  transforms = tf.stack([scale, zero, x, zero, scale, y, zero, zero], axis=1)
  moved = tf.raw_ops.ImageProjectiveTransformV3(
    images=images,
    transforms=transforms,
    output_shape=tf.constant([height, width]),
    fill_value=0.0,
    interpolation='BILINEAR',
    fill_mode='REFLECT',
  )
  return tf.ensure_shape(moved, images.shape)
