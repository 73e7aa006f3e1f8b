"""Layers whose weights all have unit variance at the start, of stock Keras layers.

So one learning rate moves every layer by the same share, whatever its width (Karras et al. 2018,
"Progressive growing of GANs", equalised learning rate). The published shadow update moves such
weights, and its learning rates are theirs.
"""

import math

import tensorflow as tf

SLOPE = 0.2
_LAYERS_A_SEED = 1009


class EqualisedLayers:
  """Applies layers, each with a seed of its own, so that nothing outside decides their weights."""

  def __init__(self, seed: int):
    """`seed` decides all weights."""
    self._seed = seed
    self._count = 0

  def dense(
    self, x: tf.Tensor, units: int, name: str, *, gain: float = 1.0, bias: float = 0.0
  ) -> tf.Tensor:
    """Dense layer; `gain` is the variance of its outputs over that of `x`, at the start."""
    x = _scaled(x, gain / x.shape[-1], name)
    return tf.keras.layers.Dense(
      units,
      kernel_initializer=self._initializer(),
      bias_initializer=tf.keras.initializers.Constant(bias),
      name=name,
    )(x)

  def pixelwise(self, x: tf.Tensor, filters: int, name: str) -> tf.Tensor:
    """Convolution of 1 px, of inputs of about unit variance."""
    x = _scaled(x, 1 / x.shape[-1], name)
    return tf.keras.layers.Conv2D(filters, 1, kernel_initializer=self._initializer(), name=name)(x)

  def convolution(
    self, x: tf.Tensor, filters: int, name: str, *, size: int = 3, stride: int = 1
  ) -> tf.Tensor:
    """Convolution, normalisation of each image by itself, leaky rectifier."""
    # No scale: the normalisation undoes any.
    x = tf.keras.layers.Conv2D(
      filters,
      size,
      stride,
      padding='same',
      use_bias=False,
      kernel_initializer=self._initializer(),
      name=f'{name}_conv',
    )(x)
    # Over all channels at once, for their relative strengths are what the style says.
    x = tf.keras.layers.GroupNormalization(groups=1, name=f'{name}_norm')(x)
    return tf.keras.layers.LeakyReLU(SLOPE, name=f'{name}_relu')(x)

  def _initializer(self) -> tf.keras.initializers.Initializer:
    self._count += 1
    # Seeds of neighbours must not meet.
    seed = (self._seed * _LAYERS_A_SEED + self._count) % (1 << 31)
    return tf.keras.initializers.RandomNormal(0.0, 1.0, seed=seed)


def _scaled(x: tf.Tensor, variance: float, name: str) -> tf.Tensor:
  return tf.keras.layers.Rescaling(math.sqrt(variance), name=f'{name}_equalise')(x)
