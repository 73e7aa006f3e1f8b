"""The shadow's generator: a style-based network, latent -> image.

A mapping network turns the latent into a style; a synthesis network draws from a grid of 4 to 7 px
up, and the style sets the strength of each channel before every convolution (Karras et al. 2019 and
2020, "StyleGAN" and "StyleGAN2"). What differs: no noise inputs, because latent inversion needs one
image per latent; the coarsest grid is a dense function of the style instead of a constant, because
the defence needs to reconstruct unseen images, where things lie included; and what follows a
modulated convolution is normalised by itself instead of by its expected size. Only stock Keras
layers, so that the file loads anywhere.

Any Keras model that `tff_shadow.models.load_generator` accepts can take its place.
"""

import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.shadow.equalised_layers import SLOPE, EqualisedLayers

MAPPING, SYNTHESIS = 'mapping', 'synthesis'
_MAPPING_LAYERS = 2
# Coarser levels have more channels than the finest, but not without end.
_MOST_CHANNELS_FACTOR = 4
_COARSEST = (4, 5, 6, 7)
# Side: how often the coarsest grid is doubled; 224 px are 7 px, five times doubled.
_DOUBLINGS = {
  coarsest << doublings: doublings
  for doublings in range(3, 7)
  for coarsest in _COARSEST
  if 32 <= coarsest << doublings <= 256
}


def build_generator(
  image_shape: tuple[int, int, int], *, latent_size: int = 128, channels: int = 16, seed: int = 0
) -> tf.keras.Model:
  """Builds an untrained generator.

  Args:
    image_shape: (H, W, C): square, 32 to 256 px, of 4, 5, 6 or 7 px doubled several times; 1 or 3
      channels.
    latent_size: Numbers in a latent, which is drawn from N(0, 1).
    channels: Of the finest level; each coarser one has twice as many, up to four times.
    seed: Decides every initial weight.

  Returns:
    A functional Keras model [B, latent_size] -> [B, H, W, C] in [0, 1]. Names of layers begin with
    'mapping' or 'synthesis'.

  Raises:
    UserError: If there is no such generator.
  """
  size, image_channels = image_shape[0], image_shape[2]
  doublings = count_doublings(image_shape)
  for name, value in (('latent_size', latent_size), ('channels', channels)):
    if value < 1:
      raise UserError(f'generator: {name} must be at least 1, found {value}')
  layers = EqualisedLayers(seed)
  latent = tf.keras.Input((latent_size,), name='latent')
  style = latent
  for index in range(_MAPPING_LAYERS):
    style = layers.dense(style, latent_size, f'{MAPPING}_dense{index}', gain=2.0)
    style = tf.keras.layers.LeakyReLU(SLOPE, name=f'{MAPPING}_relu{index}')(style)
  coarsest = size >> doublings
  x, image = None, None
  for level in range(doublings + 1):
    name = f'{SYNTHESIS}_{coarsest << level}px'
    filters = channels * min(_MOST_CHANNELS_FACTOR, 1 << (doublings - level))
    if x is None:
      x = layers.dense(style, coarsest * coarsest * filters, f'{name}_start')
      x = tf.keras.layers.Reshape((coarsest, coarsest, filters), name=f'{name}_grid')(x)
    else:
      x = tf.keras.layers.UpSampling2D(interpolation='bilinear', name=f'{name}_up')(x)
    x = _modulated(x, style, layers, name)
    x = layers.convolution(x, filters, name)
    drawn = layers.pixelwise(x, image_channels, f'{name}_image')
    if image is not None:
      image = tf.keras.layers.UpSampling2D(interpolation='bilinear', name=f'{name}_image_up')(image)
      drawn = tf.keras.layers.Add(name=f'{name}_image_sum')([image, drawn])
    image = drawn
  image = tf.keras.layers.Activation('sigmoid', dtype='float32', name=f'{SYNTHESIS}_range')(image)
  return tf.keras.Model(latent, image, name='generator')


def count_doublings(image_shape: tuple[int, int, int]) -> int:
  """How often the coarsest grid is doubled to images [H, W, C]; UserError if they are not drawn."""
  height, width, channels = image_shape
  if height != width or height not in _DOUBLINGS or channels not in (1, 3):
    raise UserError(
      f'generator: no images of shape {tuple(image_shape)}; they must be square, grey or RGB, of'
      f' {", ".join(map(str, sorted(_DOUBLINGS)))} px'
    )
  return _DOUBLINGS[height]


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


def _modulated(x: tf.Tensor, style: tf.Tensor, layers: EqualisedLayers, name: str) -> tf.Tensor:
  """Channels of `x` times what the style says of each, at the start about 1."""
  scale = layers.dense(style, x.shape[-1], f'{name}_style', bias=1.0)
  scale = tf.keras.layers.Reshape((1, 1, x.shape[-1]), name=f'{name}_scale')(scale)
  return tf.keras.layers.Multiply(name=f'{name}_modulate')([x, scale])
