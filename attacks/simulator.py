"""The client's local training as the attacker repeats it: images and labels in, gradient out."""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from attacks.functional_model import FunctionalModel
from attacks.local_steps import LocalSteps
from attacks.rectifiers import replace_relus, surrogate_relu
from attacks.unrolled import unrolled_sgd
from tff_shadow.errors import UserError
from tff_shadow.models import (
  Statistics,
  batch_norm_layers,
  classification_loss,
  collect_statistics,
  freeze_batch_norm,
  layers_from_output,
  model_from_config,
  outputs_logits,
  training_batch_norm_layers,
)
from tff_shadow.observations import ClientObservation, Observation

# More of a client's weights between its steps than this are not kept but computed again.
CHECKPOINTS_BYTES = 2**30


class ClientSimulator:
  """Local training from the observed global weights, in units of a gradient.

  An update of plain SGD is the learning rate times the sum of the steps' gradients, so it is told
  here as their mean; for one step that is the gradient of the mean cross-entropy.

  BatchNorm normalises with the statistics of the given images, as a client that trains does,
  unless the observation says 'frozen'. The running statistics are left as they were sent.

  Attributes:
    model: The model with the global weights.
  """

  def __init__(
    self,
    observation: Observation,
    dtype: str = 'float32',
    example_clip_norm: float | None = None,
  ):
    """Rebuilds the client's model.

    Args:
      observation: Gives architecture, weights and the public settings of local training.
      dtype: Floating point type of everything computed; 'float64' for checks by differences.
      example_clip_norm: To what norm, over all variables together, the client clips the gradient of
        each image before it takes their mean (DP-SGD; Abadi et al. 2016, algorithm 1); None if it
        does not, or the attacker does not know. Above 0.

    Raises:
      UserError: If the observation does not hold together, its local optimiser is not SGD, or
        images are clipped one by one that BatchNorm mixes.
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
      if layer.trainable and not layer.fused:
        layer.call = functools.partial(_batch_norm, layer)
    for layer in self.model._flatten_layers():
      if isinstance(layer, tf.keras.layers.LayerNormalization):
        layer.call = functools.partial(_layer_norm, layer)
    layers = training_batch_norm_layers(self.model)
    if example_clip_norm and layers:
      raise UserError(
        f'observation: BatchNorm layer {layers[0].name!r} mixes the images of a batch, whose'
        ' gradients cannot have been clipped one by one'
      )
    _assign(self.model.trainable_variables, observation.global_weights.trainable, 'trainable')
    # A client that keeps its statistics private leaves the attacker the freshly built ones, which
    # do not enter the gradient in training mode.
    if observation.global_weights.non_trainable:
      _assign(
        self.model.non_trainable_variables,
        observation.global_weights.non_trainable,
        'non-trainable',
      )
    for variable in self.model.non_trainable_variables:
      # Weights of frozen layers: what is differentiated by recomputing must not have any besides.
      variable._trainable = False
    self._loss = classification_loss(self.model)
    self._outputs_logits = outputs_logits(self.model)
    # After the loss: replacing the activations must not change what kind of output it sees.
    self._sharpness = None
    replace_relus(self.model, self._relu)
    self._training = training
    self._dtype = tf.as_dtype(dtype)
    self._example_clip_norm = example_clip_norm

  @property
  def dtype(self) -> tf.DType:
    """Floating point type of images, weights and gradients."""
    return self._dtype

  def gradient(
    self, images: tf.Tensor, labels: tf.Tensor, sharpness: tf.Tensor | None = None
  ) -> list[tf.Tensor]:
    """Gradient with respect to the trainable weights; differentiable in images and labels.

    Args:
      images: [B, H, W, C] in [0, 1].
      labels: int32 [B], or probabilities [B, classes].
      sharpness: Of `rectifiers.surrogate_relu`, which changes how the gradient is differentiated
        but not its value; None for the exact derivative.

    Returns:
      One tensor per trainable variable.
    """
    with self._surrogate(sharpness):
      return self._gradient(None, images, labels)

  def gradient_and_statistics(
    self, images: tf.Tensor, labels: tf.Tensor, sharpness: tf.Tensor | None = None
  ) -> tuple[list[tf.Tensor], Statistics]:
    """As `gradient`, and the batch statistics of every BatchNorm layer that trains."""
    with self._surrogate(sharpness), collect_statistics(self.model) as statistics:
      gradient = self._gradient(None, images, labels)
    return gradient, statistics

  def statistics(self, images: tf.Tensor) -> Statistics:
    """The batch statistics alone, of images [B, H, W, C]: one forward pass."""
    with collect_statistics(self.model) as statistics:
      self.model(images, training=True)
    return statistics

  def loss(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The clients' training loss, a scalar, of images [B, H, W, C] and labels int32 [B]."""
    return self._loss(labels, self.model(images, training=True))

  def mean_gradient(
    self,
    images: tf.Tensor,
    labels: tf.Tensor,
    steps: LocalSteps,
    sharpness: tf.Tensor | None = None,
    order: tf.Tensor | None = None,
  ) -> list[tf.Tensor]:
    """Mean over the local steps of their gradients, each at the weights that the earlier ones left.

    Exact for SGD with momentum (each gradient counts as often as it is applied). Memory holds the
    activations of one step and the weights of every step; if those come to more than
    `CHECKPOINTS_BYTES`, of about the square root of the steps, which costs one more gradient each.

    Args:
      images: [N, H, W, C] in [0, 1], all of the client's images.
      labels: int32 [N], or probabilities [N, classes].
      steps: What each step trains on.
      sharpness: See `gradient`.
      order: int32 [M], the images that the steps train on one after another, in place of
        `steps.order`.

    Returns:
      One tensor per trainable variable.
    """
    if steps.is_single:
      return self.gradient(images, labels, sharpness)
    order = tf.constant(steps.order) if order is None else order
    segments, start = [], 0
    for count, size in steps.segments():
      batches = tf.reshape(order[start : start + count * size], (count, size))
      segments.append((tf.gather(images, batches), tf.gather(labels, batches)))
      start += count * size
    with self._surrogate(sharpness):
      moved = unrolled_sgd(
        lambda weights, inputs: self._gradient(weights, *inputs),
        [tf.convert_to_tensor(variable) for variable in self.model.trainable_variables],
        segments,
        self._training.learning_rate,
        self._training.momentum,
        checkpoint_every=self._checkpoint_every(len(steps.batches)),
      )
    scale = self.update_over_gradient(len(steps.batches))
    return [tensor / tf.cast(scale, tensor.dtype) for tensor in moved]

  def _checkpoint_every(self, num_steps: int) -> int:
    weights_bytes = sum(v.shape.num_elements() * v.dtype.size for v in self.model.trainable_weights)
    copies = num_steps * (2 if self._training.momentum else 1)
    return 1 if copies * weights_bytes <= CHECKPOINTS_BYTES else math.ceil(math.sqrt(num_steps))

  def gradient_between(
    self,
    images: tf.Tensor,
    labels: tf.Tensor,
    update: Sequence[tf.Tensor],
    position: tf.Tensor,
    sharpness: tf.Tensor | None = None,
  ) -> list[tf.Tensor]:
    """Gradient on all images at one point between the old and the new weights.

    Stands for a local training whose steps are not known: some point on the way has the mean
    gradient, nearly (Zhu et al. 2023, "Surrogate model extension", equation 5).

    Args:
      images: [N, H, W, C] in [0, 1].
      labels: int32 [N], or probabilities [N, classes].
      update: Trained minus initial weights, per trainable variable.
      position: Scalar; 0 at the old weights, 1 at the new. Differentiable in it.
      sharpness: See `gradient`.

    Returns:
      One tensor per trainable variable.
    """
    weights = [
      variable + position * change
      for variable, change in zip(self.model.trainable_variables, update, strict=True)
    ]
    with self._surrogate(sharpness):
      return self._gradient(weights, images, labels)

  def _gradient(self, weights: list[tf.Tensor] | None, images, labels) -> list[tf.Tensor]:
    """At other weights than the model's own if they are given."""
    if self._example_clip_norm is None:
      return self._gradient_of_mean(weights, images, labels)

    def clipped(example):
      image, label = example
      gradient = self._gradient_of_mean(weights, image[None], label[None])
      return _clipped(gradient, self._example_clip_norm)

    if images.shape[0] == 1:
      return clipped((images[0], labels[0]))
    specs = [tf.TensorSpec(v.shape, self._dtype) for v in self.model.trainable_variables]
    examples = tf.map_fn(clipped, (images, labels), fn_output_signature=specs)
    return [tf.reduce_mean(gradients, axis=0) for gradients in examples]

  def _gradient_of_mean(self, weights: list[tf.Tensor] | None, images, labels) -> list[tf.Tensor]:
    """Of the mean loss of a batch."""
    model = self.model if weights is None else functools.partial(self._functional, weights)
    weights = self.model.trainable_variables if weights is None else weights
    # Outer tapes ask only for images: watching no variable keeps half of the second backward
    # pass from being built.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(weights)
      outputs = model(images, training=True)
      if labels.dtype.is_floating:
        # TF's fused cross-entropy has no second derivative with respect to the labels.
        log = tf.nn.log_softmax(outputs) if self._outputs_logits else tf.math.log(outputs)
        loss = -tf.reduce_mean(tf.reduce_sum(labels * log, axis=-1))
      else:
        loss = self._loss(labels, outputs)
    return tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)

  @functools.cached_property
  def _functional(self) -> FunctionalModel:
    return FunctionalModel(self.model)

  @contextlib.contextmanager
  def _surrogate(self, sharpness: tf.Tensor | None):
    """Rectifiers are differentiated with this sharpness inside."""
    self._sharpness = sharpness
    try:
      yield
    finally:
      self._sharpness = None

  def _relu(self, z: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(z) if self._sharpness is None else surrogate_relu(z, self._sharpness)

  def observed_gradient(self, client: ClientObservation) -> list[tf.Tensor]:
    """The mean gradient over the client's local steps: what `mean_gradient` has to match."""
    scale = self.update_over_gradient(client.num_steps)
    return [tf.constant(-array / scale, self._dtype) for array in client.update.trainable]

  def update_over_gradient(self, num_steps: int) -> float:
    """Initial minus trained weights, over the mean gradient of so many steps."""
    return self._training.learning_rate * _summed_momentum(num_steps, self._training.momentum)

  def mean_probabilities(self, images: tf.Tensor) -> tf.Tensor:
    """The model's mean prediction over images [B, H, W, C]: probabilities [classes]."""
    outputs = self.model(images, training=True)
    probabilities = tf.nn.softmax(outputs) if self._outputs_logits else outputs
    return tf.reduce_mean(probabilities, axis=0)

  def logits_layer_gradient(
    self, gradient: list[tf.Tensor]
  ) -> tuple[tf.Tensor | None, tf.Tensor | None]:
    """The parts of `gradient` that belong to the layer that makes the logits.

    Returns:
      Kernel [features, classes] and bias [classes] of the last dense layer; None where it has none.
    """
    layer = next((layer for layer in layers_from_output(self.model) if layer.weights), None)
    if not isinstance(layer, tf.keras.layers.Dense):
      return None, None
    position = {id(weight): i for i, weight in enumerate(self.model.trainable_variables)}

    def part(variable: Any) -> tf.Tensor | None:
      return gradient[position[id(variable)]] if id(variable) in position else None

    return part(layer.kernel), part(layer.bias) if layer.use_bias else None


def _batch_norm(
  layer: tf.keras.layers.BatchNormalization, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
  """BatchNorm in training mode, differentiable twice.

  Keras' own is right where it is fused. Elsewhere (float64, dense layers) it uses `tf.nn.moments`,
  whose stopped gradient drops a term of the second derivative.
  """
  axes = [axis for axis in range(inputs.shape.rank) if axis not in layer.axis]
  return _normalised(layer, inputs, axes, layer.axis)


def _layer_norm(
  layer: tf.keras.layers.LayerNormalization, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
  """LayerNorm, differentiable twice; as for `_batch_norm`."""
  return _normalised(layer, inputs, list(layer.axis), layer.axis)


def _normalised(layer: Any, inputs: tf.Tensor, axes: list[int], of_weights: Any) -> tf.Tensor:
  """Zero mean and unit variance over `axes`, then scale and offset along `of_weights`."""
  rank = inputs.shape.rank
  shape = [inputs.shape[axis] if axis in of_weights else 1 for axis in range(rank)]
  centered = inputs - tf.reduce_mean(inputs, axes, keepdims=True)
  variance = tf.reduce_mean(tf.square(centered), axes, keepdims=True)
  outputs = centered * tf.math.rsqrt(variance + layer.epsilon)
  if layer.scale:
    outputs *= tf.reshape(layer.gamma, shape)
  if layer.center:
    outputs += tf.reshape(layer.beta, shape)
  return outputs


def _clipped(gradient: list[tf.Tensor], norm: float) -> list[tf.Tensor]:
  """Scaled down to `norm` where it is longer; a gradient of zeros has a derivative."""
  squared = tf.add_n([tf.reduce_sum(tf.square(tensor)) for tensor in gradient])
  factor = norm * tf.math.rsqrt(tf.maximum(squared, norm**2))
  return [factor * tensor for tensor in gradient]


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
