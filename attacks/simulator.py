"""The client's local training as the attacker repeats it: images and labels in, gradient out."""

from typing import Any

import tensorflow as tf

from attacks.rectifiers import replace_relus, surrogate_relu
from tff_shadow.errors import UserError
from tff_shadow.models import (
  batch_norm_layers,
  classification_loss,
  freeze_batch_norm,
  model_from_config,
  outputs_logits,
)
from tff_shadow.observations import ClientObservation, Observation


class ClientSimulator:
  """Gradient of the mean cross-entropy at the observed global weights.

  BatchNorm normalises with the statistics of the given images, as a client that trains does,
  unless the observation says 'frozen'. The running statistics are left as they were sent.

  Attributes:
    model: The model with the global weights.
  """

  def __init__(self, observation: Observation, dtype: str = 'float32'):
    """Rebuilds the client's model.

    Args:
      observation: Gives architecture, weights and the public settings of local training.
      dtype: Floating point type of everything computed; 'float64' for checks by differences.

    Raises:
      UserError: If the observation does not hold together, or its local optimiser is not SGD.
    """
    training = observation.client_training
    if training.optimizer != 'sgd':
      raise UserError(
        f'observation: the clients trained with {training.optimizer!r}; only an update of sgd can'
        ' be attacked'
      )
    if not training.learning_rate > 0:
      raise UserError(f'observation: learning rate {training.learning_rate} must be above 0')
    self.model = model_from_config(_with_dtype(observation.model_config, dtype))
    if observation.batch_norm_sharing == 'frozen':
      freeze_batch_norm(self.model)
    for layer in batch_norm_layers(self.model):
      layer.momentum = 1.0
    _assign(self.model.trainable_variables, observation.global_weights.trainable, 'trainable')
    # A client that keeps its statistics private leaves the attacker the freshly built ones, which
    # do not enter the gradient in training mode.
    if observation.global_weights.non_trainable:
      _assign(
        self.model.non_trainable_variables,
        observation.global_weights.non_trainable,
        'non-trainable',
      )
    self._loss = classification_loss(self.model)
    # After the loss: replacing the activations must not change what kind of output it sees.
    self._sharpness = None
    replace_relus(self.model, self._relu)
    self._training = training
    self._dtype = tf.as_dtype(dtype)

  @property
  def dtype(self) -> tf.DType:
    """Floating point type of images, weights and gradients."""
    return self._dtype

  def gradient(
    self, images: tf.Tensor, labels: tf.Tensor, sharpness: tf.Tensor | None = None
  ) -> list[tf.Tensor]:
    """Gradient with respect to the trainable weights; differentiable in `images`.

    Args:
      images: [B, H, W, C] in [0, 1].
      labels: int32 [B].
      sharpness: Of `rectifiers.surrogate_relu`, which changes how the gradient is differentiated
        but not its value; None for the exact derivative.

    Returns:
      One tensor per trainable variable.
    """
    weights = self.model.trainable_variables
    self._sharpness = sharpness
    # Outer tapes ask only for images: watching no variable keeps half of the second backward
    # pass from being built.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(weights)
      loss = self._loss(labels, self.model(images, training=True))
    gradient = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    self._sharpness = None
    return gradient

  def _relu(self, z: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(z) if self._sharpness is None else surrogate_relu(z, self._sharpness)

  def observed_gradient(self, client: ClientObservation) -> list[tf.Tensor]:
    """The mean gradient over the client's local steps that explains its update.

    Exact for one step. For several it is a surrogate: the weights moved between the steps.
    """
    scale = self._training.learning_rate * _summed_momentum(
      client.num_steps, self._training.momentum
    )
    return [tf.constant(-array / scale, self._dtype) for array in client.update.trainable]

  def mean_probabilities(self, images: tf.Tensor) -> tf.Tensor:
    """The model's mean prediction over images [B, H, W, C]: probabilities [classes]."""
    outputs = self.model(images, training=True)
    probabilities = tf.nn.softmax(outputs) if outputs_logits(self.model) else outputs
    return tf.reduce_mean(probabilities, axis=0)

  def logits_layer_gradient(
    self, gradient: list[tf.Tensor]
  ) -> tuple[tf.Tensor | None, tf.Tensor | None]:
    """The parts of `gradient` that belong to the layer that makes the logits.

    Returns:
      Kernel [features, classes] and bias [classes] of the last dense layer; None where it has none.
    """
    layer = self.model.outputs[0]._keras_history.layer
    while not layer.weights:
      layer = layer.inbound_nodes[0].inbound_layers
      if isinstance(layer, list):
        return None, None
    if not isinstance(layer, tf.keras.layers.Dense):
      return None, None
    position = {id(weight): i for i, weight in enumerate(self.model.trainable_variables)}

    def part(variable: Any) -> tf.Tensor | None:
      return gradient[position[id(variable)]] if id(variable) in position else None

    return part(layer.kernel), part(layer.bias) if layer.use_bias else None


def _summed_momentum(steps: int, momentum: float) -> float:
  """Sum over all steps of how often each gradient was applied: 1 + (1 + m) + (1 + m + m^2)..."""
  velocity = total = 0.0
  for _ in range(steps):
    velocity = momentum * velocity + 1
    total += velocity
  return total


def _assign(variables: list[tf.Variable], arrays: Any, kind: str) -> None:
  shapes = [tuple(variable.shape) for variable in variables]
  if shapes != [array.shape for array in arrays]:
    raise UserError(
      f'observation: its {kind} weights do not fit its architecture'
      f' ({len(arrays)} arrays for {len(variables)} variables, or other shapes)'
    )
  for variable, array in zip(variables, arrays, strict=True):
    variable.assign(tf.cast(array, variable.dtype))


def _with_dtype(config: Any, dtype: str) -> Any:
  """`config` with the policy 'float32' of every layer replaced; an observation stores that one."""
  if isinstance(config, dict):
    return {
      key: dtype if key == 'dtype' and value == 'float32' else _with_dtype(value, dtype)
      for key, value in config.items()
    }
  if isinstance(config, list):
    return [_with_dtype(value, dtype) for value in config]
  return config
