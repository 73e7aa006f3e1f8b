"""What BatchNorm layers see in a forward pass."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models.keras_files import batch_norm_layers

# (mean, variance) of each layer; the variance is the biased one, that the layer normalises with.
Statistics = list[tuple[tf.Tensor, tf.Tensor]]


@contextlib.contextmanager
def collect_statistics(model: tf.keras.Model) -> Iterator[Statistics]:
  """Gives the batch statistics of one forward pass of `model` made inside the context.

  Inside a `tf.function`, the context and every use of the tensors belong in the same function. No
  other thread may call the model meanwhile.

  Args:
    model: Its layers may have had their `call` replaced.

  Yields:
    A list, filled when the context ends: the (mean, biased variance) of the inputs of every
    BatchNorm layer that trains, in the order of `batch_norm_layers`; in float32 or better, of the
    shape of the layer's running statistics, and differentiable.

  Raises:
    UserError: If the pass calls a layer more than once or not at all.
  """
  statistics: Statistics = []
  with inputs_of_layers(model) as inputs:
    yield statistics
  statistics += [
    _moments(layer, tensor)
    for layer, tensor in zip(training_batch_norm_layers(model), inputs, strict=True)
  ]


@contextlib.contextmanager
def inputs_of_layers(model: tf.keras.Model) -> Iterator[list[tf.Tensor]]:
  """Gives the inputs of every BatchNorm layer that trains, once the context has ended.

  As `collect_statistics` otherwise.
  """
  layers = training_batch_norm_layers(model)
  seen: dict[int, list[tf.Tensor]] = {id(layer): [] for layer in layers}
  replaced: dict[int, Any] = {id(layer): vars(layer).get('call') for layer in layers}
  inputs: list[tf.Tensor] = []
  try:
    for layer in layers:
      layer.call = _recording(layer.call, seen[id(layer)])
    yield inputs
  finally:
    for layer in layers:
      if replaced[id(layer)] is None:
        del layer.call
      else:
        layer.call = replaced[id(layer)]
  for layer in layers:
    calls = seen[id(layer)]
    if len(calls) != 1:
      raise UserError(
        f'model: BatchNorm layer {layer.name!r} is called {len(calls)} times in a forward pass, so'
        ' its statistics are not those of one batch and cannot be matched'
      )
    inputs.append(calls[0])


def _recording(call: Callable[..., tf.Tensor], calls: list[tf.Tensor]) -> Callable[..., tf.Tensor]:
  def recording_call(inputs: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
    calls.append(inputs)
    return call(inputs, *args, **kwargs)

  return recording_call


def _moments(
  layer: tf.keras.layers.BatchNormalization, inputs: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  # Not `tf.nn.moments`, whose stopped gradient drops a term of the second derivative.
  if inputs.dtype in (tf.float16, tf.bfloat16):
    inputs = tf.cast(inputs, tf.float32)
  axes = [axis for axis in range(inputs.shape.rank) if axis not in layer.axis]
  mean = tf.reduce_mean(inputs, axes, keepdims=True)
  variance = tf.reduce_mean(tf.square(inputs - mean), axes)
  shape = layer.moving_mean.shape
  return tf.reshape(mean, shape), tf.reshape(variance, shape)


def training_batch_norm_layers(model: tf.keras.Model) -> list[tf.keras.layers.BatchNormalization]:
  """The BatchNorm layers that are not frozen.

  A frozen one ignores the batch, and its running statistics stay.
  """
  return [layer for layer in batch_norm_layers(model) if layer.trainable]


def sent_statistics(non_trainable: Sequence[Any]) -> list[bool]:
  """Which of a model's non-trainable variables clients send: running statistics that change.

  Those are the means and variances of BatchNorm layers that train. Weights of frozen layers stay
  what they are, and others (counters, the states of random generators) have no mean over clients.

  Args:
    non_trainable: Variables in the order of the model, told apart by their names.
  """
  names = [variable.name.partition(':')[0].rpartition('/') for variable in non_trainable]
  # A layer that trains has neither of these among what does not.
  frozen = {layer for layer, _, leaf in names if leaf in ('gamma', 'beta')}
  return [
    leaf in ('moving_mean', 'moving_variance') and layer not in frozen for layer, _, leaf in names
  ]


def check_running_statistics(model: tf.keras.Model) -> None:
  """Checks that batch statistics can be recovered from the change of the running ones.

  Raises:
    UserError: Unless every BatchNorm layer that trains keeps a plain running mean of its batches.
  """
  for layer in training_batch_norm_layers(model):
    if layer.renorm or layer.virtual_batch_size or not 0 <= layer.momentum < 1:
      raise UserError(
        f'model: BatchNorm layer {layer.name!r} keeps no plain running mean of its batches (renorm,'
        ' virtual batches or momentum outside [0, 1)), so its statistics cannot be matched'
      )
