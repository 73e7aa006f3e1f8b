"""A user's own generator, latent -> image, from a `.keras` file."""

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models.keras_files import read_keras_file

_CHECKED_LATENTS = 4
_RANGE_TOLERANCE = 1e-5


def load_generator(
  path: str, image_shape: tuple[int, int, int], *, flag: str = '--generator'
) -> tf.keras.Model:
  """Loads a generator from a `.keras` file, in safe mode, and checks that it fits the data.

  Args:
    path: The file.
    image_shape: (H, W, C) of the data.
    flag: What named the file, for messages.

  Returns:
    The model.

  Raises:
    UserError: If the file cannot be loaded, or the model does not map one latent of a fixed shape
      to an image of this shape in [0, 1].
  """
  source = f'{flag}={path}'
  model = read_keras_file(path, source=source)
  if any(isinstance(layer, tf.keras.layers.Lambda) for layer in model._flatten_layers()):
    raise UserError(f'{source}: contains a Lambda layer, which is code and is not loaded')
  if len(model.inputs or ()) != 1 or len(model.outputs or ()) != 1:
    raise UserError(f'{source}: needs exactly one input, the latent, and one output, the image')
  latent_shape = model.inputs[0].shape[1:]
  if not latent_shape.is_fully_defined():
    raise UserError(f'{source}: the shape of its latent, {tuple(latent_shape)}, is not fixed')
  latents = tf.random.stateless_normal((_CHECKED_LATENTS, *latent_shape), (0, 0), alg='philox')
  images = model(tf.cast(latents, model.inputs[0].dtype), training=False).numpy()
  if images.shape[1:] != tuple(image_shape):
    raise UserError(
      f'{source}: gives images of shape {images.shape[1:]}, the data has {tuple(image_shape)}; set'
      ' --image_size and --color to match'
    )
  if not np.isfinite(images).all():
    raise UserError(f'{source}: gives images that are not finite')
  low, high = float(images.min()), float(images.max())
  if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
    raise UserError(
      f'{source}: gives pixel values from {low:.3g} to {high:.3g}; they must lie in [0, 1], as a'
      ' sigmoid at the end would make them'
    )
  return model
