"""A view of a Keras model that shows one convolution to tf-keras-vis."""

import tensorflow as tf
from tf_keras_vis.utils import find_layer
from tf_keras_vis.utils.model_modifiers import Conv

from tff_shadow.errors import UserError
from tff_shadow.models import is_functional, output_layer, outputs_logits

TAP = 'region_map_tap'


def convolutional_layers(model: tf.keras.Model) -> list[tf.keras.layers.Layer]:
  """Layers that give a map [B, h, w, K], those of nested functional models included."""
  found = []
  for layer in model.layers:
    if is_functional(layer):
      found.extend(convolutional_layers(layer))
    elif isinstance(layer, Conv) and layer.rank == 2:
      found.append(layer)
  return found


def choose_layer(model: tf.keras.Model, name: str | None) -> tf.keras.layers.Layer:
  """The convolutional layer called `name`, or the last one.

  Raises:
    UserError: If there is none, or more than one of that name.
  """
  layers = convolutional_layers(model)
  names = ', '.join(layer.name for layer in layers)
  if not layers:
    raise UserError(
      f'saliency: model {model.name} has no convolutional layer, so only the kinds saliency,'
      ' smoothgrad, given and uniform work'
    )
  if name is None:
    return find_layer(model, lambda layer: any(layer is other for other in layers))
  chosen = [layer for layer in layers if layer.name == name]
  if not chosen:
    raise UserError(
      f'saliency layer {name}: not a convolutional layer of model {model.name}; use one of {names}'
    )
  if len(chosen) > 1:
    raise UserError(
      f'saliency layer {name}: {len(chosen)} layers of model {model.name} have this name; rename'
    )
  return chosen[0]


def tap_model(
  model: tf.keras.Model, layer: tf.keras.layers.Layer | None, *, linear_output: bool = False
) -> tf.keras.Model:
  """Rebuilds a functional model around the same layers and variables.

  Nested models are laid open, for tf-keras-vis cannot reach an inner layer from the outer input.
  The model given is not changed, and a change of its weights shows here.

  Args:
    model: A functional or sequential model with one input and one output.
    layer: Layer whose output passes through an identity layer named `TAP`; None for no tap.
    linear_output: Leave out a softmax at the end, so that the outputs are logits.

  Returns:
    The new model.
  """
  if not is_functional(model):
    raise UserError(f'saliency: model {model.name} must be a functional or sequential Keras model')
  head = output_layer(model) if linear_output and not outputs_logits(model) else None
  inputs = tf.keras.Input(model.inputs[0].shape[1:], dtype=model.inputs[0].dtype)
  taps = []
  outputs = _replay(model, inputs, '', layer, head, taps)
  if len(taps) > 1:
    raise UserError(
      f'saliency layer {layer.name}: model {model.name} calls it {len(taps)} times; choose another'
    )
  return tf.keras.Model(inputs, outputs)


class _Shared(tf.keras.layers.Wrapper):
  """The same layer under another name, for names must be unique in a model, not in nested ones."""

  def call(self, *args, **kwargs):
    return self.layer(*args, **kwargs)


def _replay(model, inputs, prefix, tapped, head, taps):
  """Calls the layers of `model` on `inputs` one by one, as Keras' own Functional.call does."""
  values = {str(id(model.inputs[0])): inputs}
  for depth in sorted(model._nodes_by_depth, reverse=True):
    for index, node in enumerate(model._nodes_by_depth[depth]):
      if node.is_input:
        continue
      # Keras pops from lists that hold a tensor once per use.
      args, kwargs = node.map_arguments({key: [value] * 99 for key, value in values.items()})
      layer, name = node.layer, f'{prefix}{depth}_{index}_{node.layer.name}'
      if is_functional(layer):
        outputs = _replay(layer, args[0], f'{name}_', tapped, head, taps)
      elif layer is head:
        # An op of TensorFlow has arguments besides, such as its axis.
        (features,) = node.keras_inputs
        outputs = _without_softmax(layer, name)(values[str(id(features))])
      else:
        outputs = _Shared(layer, name=name)(*args, **kwargs)
      if layer is tapped:
        name = TAP if not taps else f'{TAP}_{len(taps)}'
        outputs = tf.keras.layers.Activation('linear', name=name)(outputs)
        taps.append(outputs)
      values.update(zip(node.flat_output_ids, tf.nest.flatten(outputs), strict=True))
  return values[str(id(model.outputs[0]))]


def _without_softmax(layer: tf.keras.layers.Layer, name: str) -> tf.keras.layers.Layer:
  """A twin with the same variables; tf-keras-vis' ReplaceToLinear would change the layer itself."""
  if not layer.weights:
    return tf.keras.layers.Activation('linear', name=name)
  twin = type(layer).from_config({**layer.get_config(), 'activation': 'linear', 'name': name})
  for attribute in ('kernel', 'bias'):
    if hasattr(layer, attribute):
      setattr(twin, attribute, getattr(layer, attribute))
  twin.built = True
  return twin
