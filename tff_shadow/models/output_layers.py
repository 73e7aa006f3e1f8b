"""Which layers of a Keras model make its outputs, those of nested models included."""

from collections.abc import Generator, Iterator
from typing import Any

import tensorflow as tf

# As Keras names the ops of TensorFlow that a functional model calls.
_SOFTMAX_OPS = ('nn.softmax', 'math.softmax')
_SIGMOID_OPS = ('math.sigmoid', 'nn.sigmoid')


def is_functional(layer: tf.keras.layers.Layer) -> bool:
  """Whether `layer` is a functional or sequential model, whose own layers are known."""
  return isinstance(layer, tf.keras.Model) and getattr(layer, '_is_graph_network', False)


def layers_from_output(model: tf.keras.Model) -> Iterator[tf.keras.layers.Layer]:
  """The layers before the output, the last one first, as far back as there is one way.

  Nested models are gone through; they are not given themselves, unless their layers are not known.

  Args:
    model: A functional or sequential model; of several outputs the first counts.
  """
  yield from _backwards(model.outputs[0])


def output_layer(model: tf.keras.Model) -> tf.keras.layers.Layer | None:
  """The layer that makes the outputs: the last that does more than reshape them, if any."""
  return next((layer for layer in layers_from_output(model) if not _passes_on(layer)), None)


def outputs_logits(model: tf.keras.Model) -> bool:
  """Whether the model's outputs are logits; False for a softmax at the end."""
  layer = output_layer(model)
  if isinstance(layer, tf.keras.layers.Softmax) or _op(layer) in _SOFTMAX_OPS:
    return False
  return _activation(layer) not in (tf.keras.activations.softmax, tf.nn.softmax)


def outputs_sigmoids(model: tf.keras.Model) -> bool:
  """Whether a sigmoid makes each output on its own, so that they are no distribution."""
  layer = output_layer(model)
  sigmoids = (tf.keras.activations.sigmoid, tf.keras.activations.hard_sigmoid, tf.nn.sigmoid)
  return _op(layer) in _SIGMOID_OPS or _activation(layer) in sigmoids


def _backwards(tensor: Any) -> Generator[tf.keras.layers.Layer, None, bool]:
  """The layers before a symbolic tensor; returns whether they lead to an input of its model."""
  while True:
    layer, node_index, tensor_index = tensor._keras_history
    if isinstance(layer, tf.keras.layers.InputLayer):
      return True
    if is_functional(layer):
      if not (yield from _backwards(layer.outputs[tensor_index])):
        return False
    else:
      yield layer
    inputs = layer.inbound_nodes[node_index].keras_inputs
    if len(inputs) != 1:
      return False
    (tensor,) = inputs


def _passes_on(layer: tf.keras.layers.Layer) -> bool:
  if isinstance(layer, tf.keras.layers.Activation):
    return layer.activation is tf.keras.activations.linear
  return isinstance(layer, tf.keras.layers.Flatten | tf.keras.layers.Reshape)


def _op(layer: tf.keras.layers.Layer | None) -> str | None:
  """Of a layer that Keras made of a call of TensorFlow; None of another."""
  return getattr(layer, 'symbol', None)


def _activation(layer: tf.keras.layers.Layer | None) -> Any:
  return getattr(layer, 'activation', None)
