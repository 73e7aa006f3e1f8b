"""The shadow's generator: a style-based network, latent -> image.

A mapping network turns the latent into a style; a synthesis network draws from 4 px up, and the
style sets the strength of each channel before every convolution (Karras et al. 2019 and 2020,
"StyleGAN" and "StyleGAN2"). What differs: no noise inputs, because latent inversion needs one image
per latent; the 4 px start is a dense function of the style instead of a constant, because the
defence needs to reconstruct unseen images, where things lie included; and what follows a modulated
convolution is normalised by itself instead of by its expected size. Only stock Keras layers, so
that the file loads anywhere.

Any Keras model that `tff_shadow.models.load_generator` accepts can take its place.
"""

import math

import tensorflow as tf

from tff_shadow.errors import UserError

MAPPING, SYNTHESIS = 'mapping', 'synthesis'
_COARSEST = 4
_SLOPE = 0.2
_MAPPING_LAYERS = 2
# The coarser half of the levels has more channels than the finest, but not without end.
_MOST_CHANNELS_FACTOR = 4
SIZES = (32, 64, 128, 256)


def build_generator(
  image_shape: tuple[int, int, int], *, latent_size: int = 128, channels: int = 32, seed: int = 0
) -> tf.keras.Model:
  """Builds an untrained generator.

  Args:
    image_shape: (H, W, C): square, a side of `SIZES`, 1 or 3 channels.
    latent_size: Numbers in a latent, which is drawn from N(0, 1).
    channels: Of the finest level; each coarser one has twice as many, up to four times.
    seed: Decides every initial weight.

  Returns:
    A functional Keras model [B, latent_size] -> [B, H, W, C] in [0, 1]. Names of layers begin with
    'mapping' or 'synthesis'.

  Raises:
    UserError: If there is no such generator.
  """
  height, width, image_channels = image_shape
  if height != width or height not in SIZES or image_channels not in (1, 3):
    raise UserError(
      f'generator: no images of shape {tuple(image_shape)}; they must be square, of'
      f' {", ".join(map(str, SIZES))} px, grey or RGB'
    )
  for name, value in (('latent_size', latent_size), ('channels', channels)):
    if value < 1:
      raise UserError(f'generator: {name} must be at least 1, found {value}')
  build = _Builder(seed)
  latent = tf.keras.Input((latent_size,), name='latent')
  style = latent
  for index in range(_MAPPING_LAYERS):
    style = build.dense(style, latent_size, f'{MAPPING}_dense{index}')
    style = tf.keras.layers.LeakyReLU(_SLOPE, name=f'{MAPPING}_relu{index}')(style)
  levels = round(math.log2(height / _COARSEST))
  x, image = None, None
  for level in range(levels + 1):
    name = f'{SYNTHESIS}_{_COARSEST << level}px'
    width = channels * min(_MOST_CHANNELS_FACTOR, 1 << (levels - level))
    if x is None:
      x = build.dense(style, _COARSEST * _COARSEST * width, f'{name}_start')
      x = tf.keras.layers.Reshape((_COARSEST, _COARSEST, width), name=f'{name}_grid')(x)
    else:
      x = tf.keras.layers.UpSampling2D(interpolation='bilinear', name=f'{name}_up')(x)
    x = build.styled_convolution(x, style, width, name)
    drawn = build.convolution(x, image_channels, 1, f'{name}_image')
    if image is not None:
      image = tf.keras.layers.UpSampling2D(interpolation='bilinear', name=f'{name}_image_up')(image)
      drawn = tf.keras.layers.Add(name=f'{name}_image_sum')([image, drawn])
    image = drawn
  image = tf.keras.layers.Activation('sigmoid', dtype='float32', name=f'{SYNTHESIS}_range')(image)
  return tf.keras.Model(latent, image, name='generator')


def synthesis_variables(generator: tf.keras.Model) -> list[tf.Variable]:
  """The trainable variables that the shadow's update moves: all but those of mapping layers.

  A layer, or a model within the model, belongs to the mapping if its name begins with 'mapping'; a
  generator without one is moved as a whole.

  Raises:
    UserError: If none is left.
  """
  mapping = {
    id(variable)
    for layer in generator._flatten_layers(include_self=False)
    if layer.name.startswith(MAPPING)
    for variable in layer.trainable_variables
  }
  variables = [v for v in generator.trainable_variables if id(v) not in mapping]
  if not variables:
    raise UserError("generator: has no trainable weights outside layers named 'mapping...'")
  return variables


class _Builder:
  """Layers with a seed of their own each, so that nothing outside decides their weights."""

  def __init__(self, seed: int):
    self._seed = seed
    self._count = 0

  def dense(self, x: tf.Tensor, units: int, name: str) -> tf.Tensor:
    return tf.keras.layers.Dense(units, kernel_initializer=self._initializer(), name=name)(x)

  def convolution(self, x: tf.Tensor, filters: int, size: int, name: str) -> tf.Tensor:
    layer = tf.keras.layers.Conv2D(
      filters, size, padding='same', kernel_initializer=self._initializer(), name=name
    )
    return layer(x)

  def styled_convolution(
    self, x: tf.Tensor, style: tf.Tensor, filters: int, name: str
  ) -> tf.Tensor:
    """Channels scaled by the style, convolution, normalisation of each image, leaky rectifier."""
    scale = tf.keras.layers.Dense(
      x.shape[-1],
      kernel_initializer=self._initializer(),
      bias_initializer='ones',
      name=f'{name}_style',
    )(style)
    scale = tf.keras.layers.Reshape((1, 1, x.shape[-1]), name=f'{name}_scale')(scale)
    x = tf.keras.layers.Multiply(name=f'{name}_modulate')([x, scale])
    x = self.convolution(x, filters, 3, f'{name}_conv')
    # Over all channels at once: their relative strengths are what the style says.
    x = tf.keras.layers.GroupNormalization(groups=1, name=f'{name}_norm')(x)
    return tf.keras.layers.LeakyReLU(_SLOPE, name=f'{name}_relu')(x)

  def _initializer(self) -> tf.keras.initializers.Initializer:
    self._count += 1
    # Seeds of neighbouring generators must not meet.
    seed = (self._seed * 1009 + self._count) % (1 << 31)
    return tf.keras.initializers.VarianceScaling(2.0, 'fan_in', 'truncated_normal', seed=seed)
