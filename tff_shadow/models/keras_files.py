"""Models as data: a user's own `.keras` file, and the JSON form that observations carry."""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models.output_layers import outputs_logits, outputs_sigmoids


def load_keras_file(
  path: str, *, image_shape: tuple[int, int, int], num_classes: int
) -> tf.keras.Model:
  """Loads a user's model and checks that it fits the data.

  Only the `.keras` format is taken, in safe mode: a Lambda layer in an `.h5` file would run on
  loading.

  Args:
    path: The file. The model maps float32 images in [0, 1] to one logit or probability per class.
    image_shape: (H, W, C) of the data.
    num_classes: Number of classes of the data.

  Returns:
    The model with the file's weights.

  Raises:
    UserError: If the file is missing, of another format, unsafe, or does not fit the data.
  """
  source = f'--model={path}'
  model = read_keras_file(path, source=source)
  check_model(model, image_shape=image_shape, num_classes=num_classes, source=source)
  return model


def read_keras_file(path: str, *, source: str) -> tf.keras.Model:
  """Loads any model from the `.keras` format in safe mode; no code in the file is run.

  Args:
    path: The file.
    source: Where the user named it, for messages.

  Returns:
    The model with the file's weights, not compiled.

  Raises:
    UserError: If the file is missing, of another format, damaged or unsafe.
  """
  if not path.endswith('.keras'):
    raise UserError(f'{source}: only the .keras format is loaded; save with model.save()')
  if not pathlib.Path(path).is_file():
    raise UserError(f'{source}: no such file')
  # Whatever else is called .keras Keras loads as HDF5, in which safe mode means nothing.
  if not zipfile.is_zipfile(path):
    raise UserError(f'{source}: not of the .keras format; save with model.save()')
  try:
    return tf.keras.models.load_model(path, compile=False, safe_mode=True)
  except Exception as error:  # Keras raises whatever the damaged part raises.
    raise UserError(f'{source}: cannot be loaded ({_first_line(error)})') from error


def check_model(
  model: tf.keras.Model, *, image_shape: tuple[int, int, int], num_classes: int, source: str
) -> None:
  """Raises `UserError` unless `model` maps [B, *image_shape] to [B, num_classes]."""
  if len(model.inputs or ()) != 1 or len(model.outputs or ()) != 1:
    raise UserError(f'{source}: needs exactly one input and one output')
  if not model.inputs[0].shape[1:].is_compatible_with(image_shape):
    raise UserError(
      f'{source}: takes images of shape {tuple(model.inputs[0].shape[1:])}, the data has'
      f' {tuple(image_shape)}; set --image_size and --color to match'
    )
  output_shape = tuple(model.outputs[0].shape)
  if output_shape[1:] != (num_classes,):
    raise UserError(
      f'{source}: gives outputs of shape {output_shape}, the data has {num_classes} classes, so'
      f' the last layer must have {num_classes} units'
    )
  if num_classes > 1 and outputs_sigmoids(model):
    raise UserError(
      f'{source}: ends with a sigmoid of each of {num_classes} classes on its own; use softmax, or'
      ' no activation for logits'
    )
  if not model.trainable_variables:
    raise UserError(f'{source}: has no trainable weights')
  for layer in model._flatten_layers(include_self=False):
    if layer.compute_dtype in ('float16', 'bfloat16') and layer.weights:
      raise UserError(
        f'{source}: layer {layer.name} computes in {layer.compute_dtype}; build the model with the'
        " policy 'float32'"
      )
  for variable in model.variables:
    if variable.dtype.is_floating and not np.isfinite(variable.numpy()).all():
      raise UserError(f'{source}: {variable.name} has values that are not finite')
  # Weights are matched by position in updates and observations, which a repeated call would hide.
  if any(isinstance(layer, tf.keras.layers.Lambda) for layer in model._flatten_layers()):
    raise UserError(f'{source}: contains a Lambda layer, which is code and is not loaded')


def classification_loss(model: tf.keras.Model) -> tf.keras.losses.Loss:
  """The mean cross-entropy that all training and all attacks here use."""
  return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=outputs_logits(model))


def model_to_config(model: tf.keras.Model) -> dict[str, Any]:
  """The architecture as plain JSON values, without weights."""
  return json.loads(json.dumps(tf.keras.saving.serialize_keras_object(model)))


def model_digest(config: dict[str, Any], weights: Iterable[np.ndarray]) -> str:
  """SHA-256 (hex) of an architecture (`model_to_config`) and weights, which names the model."""
  digest = hashlib.sha256(repr(config).encode())
  for weight in weights:
    digest.update(weight.tobytes())
  return digest.hexdigest()


def model_from_config(config: dict[str, Any]) -> tf.keras.Model:
  """Rebuilds an architecture with undefined weights; never runs code from `config`.

  Raises:
    UserError: If the config is damaged or holds a layer that would run code.
  """
  try:
    return tf.keras.saving.deserialize_keras_object(config, safe_mode=True)
  except Exception as error:
    raise UserError(f'model architecture cannot be rebuilt ({_first_line(error)})') from error


def freeze_batch_norm(model: tf.keras.Model) -> int:
  """Puts every BatchNormalization layer in inference mode for good; returns how many.

  Its statistics then stay what they are and its scale and offset are not trained, as in detection
  networks. Meant for pretrained models.
  """
  layers = batch_norm_layers(model)
  for layer in layers:
    layer.trainable = False
  return len(layers)


def random_layers(model: tf.keras.Model) -> list[str]:
  """Names of the layers that draw at random in training, such as Dropout; nested ones included."""
  return [
    layer.name
    for layer in model._flatten_layers()
    if isinstance(layer, tf.keras.__internal__.layers.BaseRandomLayer)
  ]


def batch_norm_layers(model: tf.keras.Model) -> list[tf.keras.layers.BatchNormalization]:
  """All BatchNormalization layers, nested models included."""
  return [
    layer
    for layer in model._flatten_layers()
    if isinstance(layer, tf.keras.layers.BatchNormalization)
  ]


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
