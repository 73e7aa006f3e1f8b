"""The statistics of BatchNorm: what a client's update says of them, and those of a simulation."""

import numpy as np
import tensorflow as tf

from attacks.local_steps import local_steps
from tff_shadow.errors import UserError
from tff_shadow.models import (
  check_running_statistics,
  collect_statistics,
  inputs_of_layers,
  model_from_config,
  sent_statistics,
  training_batch_norm_layers,
)
from tff_shadow.observations import AGGREGATE, ClientObservation, ClientTraining, Observation


def without_statistics(observation: Observation, client: ClientObservation) -> str | None:
  """Why a client's update tells no statistics that an attack can match; None if it does.

  Of the model see `unmatchable_layers`.

  Args:
    observation: Of the round.
    client: One of its clients, or the mean of them.
  """
  is_mean = client.client_id == AGGREGATE
  if is_mean or not local_steps(client, observation.client_training).is_single:
    return (
      f'{client.client_id} took more than one local step, or is a mean; only the statistics of a'
      ' single step are simulated'
    )
  if not _shared(observation, client):
    return (
      f'{client.client_id} shared no BatchNorm statistics (the model must have such layers, and the'
      ' round --batch_norm_sharing=aggregate)'
    )
  return None


def unmatchable_layers(observation: Observation) -> str | None:
  """Why statistics of the model's layers cannot be matched, whoever shares them; None if they can.

  Builds the model and calls it once.
  """
  model = model_from_config(observation.model_config)
  if not training_batch_norm_layers(model):
    return 'the model has no BatchNorm layer that trains'
  try:
    check_running_statistics(model)
    _values_per_image(model, observation.image_shape)
  except UserError as error:
    return str(error)
  return None


def statistics_can_be_matched(observation: Observation) -> bool:
  """Whether an attack can match BatchNorm statistics of some client."""
  told = any(without_statistics(observation, own) is None for own in observation.clients)
  return told and unmatchable_layers(observation) is None


def observed_statistics(
  observation: Observation, client: ClientObservation
) -> list[tuple[np.ndarray, np.ndarray]] | None:
  """Batch statistics of the client's local steps, from the change of its running ones.

  A step with momentum m moves a running statistic s to m s + (1 - m) b, b that of the batch. After
  T steps with equal b it is m^T s + (1 - m^T) b, which is solved for b; if they were not equal, b
  is their mean weighted m^(T - 1 - k), k = 0..T - 1, the last step the most. Exact for one step, up
  to rounding: what float32 lost of s comes back divided by 1 - m. Fused layers (four-dimensional
  inputs) keep the unbiased variance, n / (n - 1) times that they normalise with, n the values per
  channel; this is undone. A defence's noise is in the result; a variance below 0 becomes 0.

  Args:
    observation: Of the round.
    client: One of its clients.

  Returns:
    (mean, variance) per BatchNorm layer that trains, float32, in the order of `batch_norm_layers`;
    None if the client shared no statistics or sent no update, or the model has no such layer.

  Raises:
    UserError: If the observation does not hold together, or a layer's statistics cannot be had.
  """
  if not _shared(observation, client):
    return None
  changes = client.update.non_trainable
  sizes = _step_sizes(client, observation.client_training)
  if not sizes:
    return None
  model = model_from_config(observation.model_config)
  layers = training_batch_norm_layers(model)
  if not layers:
    return None
  check_running_statistics(model)
  variables = model.non_trainable_variables
  before = observation.global_weights.non_trainable
  shared = [index for index, is_sent in enumerate(sent_statistics(variables)) if is_sent]
  if len(before) != len(variables) or len(changes) != len(shared):
    raise UserError(
      f'observation: {len(before)} non-trainable arrays in the global weights and {len(changes)} in'
      f' the update of {client.client_id} for {len(variables)} variables of the model'
    )
  arrays = {
    id(variables[index]): (np.asarray(before[index], np.float64), change)
    for index, change in zip(shared, changes, strict=True)
  }

  def batch_statistic(variable: tf.Variable, momentum: float) -> np.ndarray:
    start, change = arrays[id(variable)]
    # (new - m^T old) / (1 - m^T), without the difference of two large numbers.
    return start + change / (1 - momentum ** len(sizes))

  statistics = []
  for layer, values in zip(layers, _values_per_image(model, observation.image_shape), strict=True):
    mean = batch_statistic(layer.moving_mean, layer.momentum)
    variance = batch_statistic(layer.moving_variance, layer.momentum)
    if layer.fused:
      variance = variance / _bessel_factor(np.multiply(sizes, values), layer.momentum)
    statistics.append((mean.astype(np.float32), np.maximum(variance, 0).astype(np.float32)))
  return statistics


def proxy_statistics(
  model: tf.keras.Model, images: np.ndarray, batch_size: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Statistics of public images, for a client that keeps its own to itself.

  Args:
    model: With the global weights; not changed.
    images: [N, H, W, C] in [0, 1], of the client's modality.
    batch_size: Of the client: small batches have smaller variances, and normalising by them changes
      what deeper layers see. Means over the batches are returned, without a shorter rest. One
      batch of all images by default.

  Returns:
    (mean, variance) per layer, as `observed_statistics`.

  Raises:
    ValueError: If there are fewer images than a batch.
  """
  batch_size = batch_size or len(images)
  if not 1 <= batch_size <= len(images):
    raise ValueError(f'batch_size {batch_size} for {len(images)} images')
  running = [variable.numpy() for variable in model.non_trainable_variables]
  batches = []
  try:
    for start in range(0, len(images) - batch_size + 1, batch_size):
      with collect_statistics(model) as statistics:
        model(_as_input(model, images[start : start + batch_size]), training=True)
      batches.append([(mean.numpy(), variance.numpy()) for mean, variance in statistics])
  finally:
    for variable, array in zip(model.non_trainable_variables, running, strict=True):
      variable.assign(array)
  return [
    (np.mean([mean for mean, _ in layer], axis=0), np.mean([var for _, var in layer], axis=0))
    for layer in zip(*batches, strict=True)
  ]


def _shared(observation: Observation, client: ClientObservation) -> bool:
  """Whether the client's update has running statistics in it."""
  is_sent = observation.batch_norm_sharing == 'aggregate' and not client.dropped
  return is_sent and bool(client.update.non_trainable)


def _values_per_image(model: tf.keras.Model, image_shape: tuple[int, int, int]) -> list[int]:
  """How many values of a channel one image adds to each layer's mean."""
  with inputs_of_layers(model) as inputs:
    model(_as_input(model, np.zeros((1, *image_shape))), training=True)
  return [
    int(np.prod([n for axis, n in enumerate(tensor.shape) if axis not in layer.axis]))
    for layer, tensor in zip(training_batch_norm_layers(model), inputs, strict=True)
  ]


def _as_input(model: tf.keras.Model, images: np.ndarray) -> tf.Tensor:
  return tf.cast(images, model.inputs[0].dtype)


def _step_sizes(client: ClientObservation, training: ClientTraining) -> list[int]:
  """Images in each local step (`tff_shadow.data.local_training_order`)."""
  if client.num_steps < 1 or client.num_images < 1:
    return []
  full = client.images_per_step(training)
  total = min(client.num_images * training.local_epochs, client.num_steps * full)
  last = total - (client.num_steps - 1) * full
  if not 1 <= last <= full:
    # Steps that do not follow this order: each took what it could.
    return [min(full, client.num_images)] * client.num_steps
  return [full] * (client.num_steps - 1) + [last]


def _bessel_factor(values: np.ndarray, momentum: float) -> float:
  """Of the variance: n / (n - 1), averaged over steps as the running variance averages them."""
  weights = momentum ** np.arange(len(values))[::-1].astype(np.float64)
  return float(np.average(values / np.maximum(values - 1, 1), weights=weights))
