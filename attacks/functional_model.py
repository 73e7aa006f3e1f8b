"""A Keras model as a function of its weights, so that training it can be differentiated."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from tff_shadow.errors import UserError


class FunctionalModel:
  """Calls a model with tensors in place of its trainable variables.

  Keras 2 reads a layer's variables from the layer's attributes. During a call these attributes hold
  the given tensors, in every layer and nested model, and afterwards the variables again. BatchNorm
  normalises with the batch's statistics in training mode, but its running ones are not updated.

  Not for several threads at once. A layer that draws random numbers draws new ones in each call.

  Attributes:
    model: Whose architecture and non-trainable variables are used.
  """

  def __init__(self, model: tf.keras.Model):
    """Finds where the layers keep their variables.

    Args:
      model: With built weights.

    Raises:
      UserError: If a trainable variable is no attribute of any layer.
    """
    self.model = model
    self._variables = list(model.trainable_variables)
    position = {id(variable): index for index, variable in enumerate(self._variables)}
    modules = [model, *model.submodules]
    # Kept apart from the modules: a variable that two layers share has two places.
    self._places = [
      (module, attribute, position[id(value)])
      for module in modules
      for attribute, value in vars(module).items()
      if id(value) in position
    ]
    found = {index for *_, index in self._places}
    missing = [v.name for index, v in enumerate(self._variables) if index not in found]
    if missing:
      raise UserError(
        f'model: no layer has its trainable weight {missing[0]!r} as an attribute, so it cannot be'
        ' replaced to simulate several local steps'
      )
    self._batch_norms = [m for m in modules if isinstance(m, tf.keras.layers.BatchNormalization)]

  def __call__(
    self, weights: Sequence[tf.Tensor], images: tf.Tensor, training: bool = True
  ) -> tf.Tensor:
    """The outputs of the model with other weights.

    Args:
      weights: One tensor per trainable variable of the model, in its order.
      images: [B, H, W, C].
      training: Whether the layers are in training mode.

    Returns:
      [B, classes], differentiable in `weights` and `images`. No variable has changed.

    Raises:
      ValueError: If the weights do not have the shapes of the variables.
      UserError: If the model reads a variable all the same, past its attribute.
    """
    shapes = [weight.shape for weight in weights]
    expected = [variable.shape for variable in self._variables]
    if shapes != expected:
      raise ValueError(f'weights: shapes {shapes} given, the model has {expected}')
    # Only to learn which variables are read; what it records is dropped.
    with tf.GradientTape() as reads, self._replaced(weights):
      outputs = self.model(images, training=training)
    read = {id(variable) for variable in reads.watched_variables()}
    for variable in self._variables:
      if id(variable) in read:
        raise UserError(
          f'model: a layer reads its trainable weight {variable.name!r} in a way that cannot be'
          ' replaced to simulate several local steps'
        )
    return outputs

  @contextlib.contextmanager
  def _replaced(self, weights: Sequence[tf.Tensor]) -> Iterator[None]:
    changes = [(module, attribute, weights[index]) for module, attribute, index in self._places]
    for layer in self._batch_norms:
      # An assignment in the body of a loop would also keep unused parts of it from being pruned.
      changes += [(layer, '_assign_new_value', _keep), (layer, '_assign_moving_average', _keep)]
    before = [(module, attribute, vars(module).get(attribute)) for module, attribute, _ in changes]
    try:
      # Past `__setattr__`, by which Keras would take the tensor for a new part of the layer.
      for module, attribute, value in changes:
        vars(module)[attribute] = value
      yield
    finally:
      for module, attribute, value in before:
        if value is None:
          del vars(module)[attribute]
        else:
          vars(module)[attribute] = value


def _keep(variable: tf.Variable, *_: Any) -> tf.Tensor:
  return tf.convert_to_tensor(variable)
