"""Local training of a client, with the statistics of BatchNorm in the update."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators import build_collect_from_clients
from tff_shadow.aggregators.measurements import federated_count
from tff_shadow.models import sent_statistics

ModelFn = Callable[[], tff.learning.models.VariableModel]
# From a batch: number of examples, and the gradients of the trainable variables, as a list.
GradientFn = Callable[[Any], tuple[tf.Tensor, list[tf.Tensor]]]
# Made for the model that trains, where it trains, so it may make variables of its own.
BuildGradientFn = Callable[[tff.learning.models.VariableModel], GradientFn]


def build_plain_gradient_fn(model: tff.learning.models.VariableModel) -> GradientFn:
  """The gradients of the batch's mean loss."""

  def gradient_fn(batch):
    with tf.GradientTape() as tape:
      output = model.forward_pass(batch, training=True)
    gradients = tape.gradient(
      output.loss,
      list(model.trainable_variables),
      unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return output.num_examples, gradients

  return gradient_fn


def build_client_work(
  model_fn: ModelFn,
  optimizer: tff.learning.optimizers.Optimizer,
  *,
  client_weighting: tff.learning.ClientWeighting,
  share_statistics: bool,
  metrics_aggregator: Callable[..., Any] | None = None,
  build_gradient_fn: BuildGradientFn = build_plain_gradient_fn,
  secure_measurements: bool = False,
) -> tff.learning.templates.ClientWorkProcess:
  """Builds the local training of FedAvg.

  Differs from TFF's `build_model_delta_client_work` in three things. With `share_statistics` the
  update is `OrderedDict(trainable=[...], non_trainable=[...])` and holds the change of the
  BatchNorm statistics too, which the stock work never sends; without, it is the list of trainable
  differences, as in the stock work. And the measurements name the clients that were dropped:
  `non_finite` holds a 0 or 1 per client, in the order of the clients' data, or with
  `secure_measurements` no more than the sum of these. And there is no `loop_implementation`, for
  the batches are walked through by a loop of our own (`fold`).

  As in TFF, an update is *initial minus trained* weights. A client whose update is not finite
  sends zeros with weight 0, and its metrics are left out.

  Args:
    model_fn: Builds the model anew at each call; for Keras models the one of
      `tff.learning.models.from_keras_model`.
    optimizer: The local optimiser.
    client_weighting: Weight of a client in the mean; no function, as elsewhere in TFF.
    share_statistics: Whether `sent_statistics` are in the update.
    metrics_aggregator: As in TFF; by default `tff.learning.metrics.sum_then_finalize`, or with
      `secure_measurements` `secure_sum_then_finalize`.
    build_gradient_fn: Of the gradients that the optimiser gets; the plain ones by default.
    secure_measurements: Whether all measurements are computed by secure summation.

  Returns:
    A `ClientWorkProcess`. As in TFF, its state are the hyperparameters of `optimizer`, which
    `set_hparams` of a learning process changes between rounds.

  Raises:
    TypeError: If `client_weighting` is no `tff.learning.ClientWeighting`, or `model_fn` is none
      that builds a `VariableModel`.
  """
  check_client_weighting(client_weighting)
  metrics_aggregator = metrics_aggregator or default_metrics_aggregator(secure_measurements)
  with tf.Graph().as_default():
    model = model_fn()
    if not isinstance(model, tff.learning.models.VariableModel):
      raise TypeError(f'model_fn must return a tff.learning VariableModel, found {type(model)}')
    metrics_aggregation = metrics_aggregator(model.metric_finalizers())
    data_type = tff.types.SequenceType(tff.types.tensorflow_to_type(model.input_spec))
    weights_type = tff.learning.models.weights_type_from_model(model)

  start_hparams = hparams_computation(optimizer)

  @tff.tensorflow.computation(start_hparams.type_signature.result, weights_type, data_type)
  def client_update(hparams, initial_weights, dataset):
    local_model = model_fn()
    gradient_fn = build_gradient_fn(local_model)

    def one_copy(batch):
      num_examples, gradients = gradient_fn(batch)
      return num_examples, [gradients], ()

    @tf.function(autograph=False)
    def train(hparams, initial_weights, dataset):
      (update,), num_examples, _ = train_locally(
        [local_model],
        optimizer,
        initial_weights,
        dataset,
        one_copy,
        share_statistics,
        hparams=hparams,
      )
      return client_result(local_model, update, num_examples, client_weighting)

    return train(hparams, initial_weights, dataset)

  return wire_client_work(
    client_update, start_hparams, metrics_aggregation, secure_measurements=secure_measurements
  )


def check_client_weighting(client_weighting: tff.learning.ClientWeighting) -> None:
  """Raises TypeError, as TFF does, for a name or a function, or None."""
  if not isinstance(client_weighting, tff.learning.ClientWeighting):
    raise TypeError(
      f'client_weighting must be a tff.learning.ClientWeighting, found {client_weighting!r}'
    )


def initial_hparams(optimizer: tff.learning.optimizers.Optimizer) -> collections.OrderedDict:
  """The hyperparameters that the optimiser was built with."""
  return optimizer.get_hparams(optimizer.initialize(tf.TensorSpec((), tf.float32)))


def hparams_computation(optimizer: tff.learning.optimizers.Optimizer) -> tff.Computation:
  """The computation of `initial_hparams`, whose result has their type."""
  return tff.tensorflow.computation(lambda: initial_hparams(optimizer))


def default_metrics_aggregator(secure_measurements: bool) -> Callable[..., Any]:
  """TFF's own aggregation of training metrics, plain or secure."""
  metrics = tff.learning.metrics
  return metrics.secure_sum_then_finalize if secure_measurements else metrics.sum_then_finalize


def wire_client_work(
  client_update: tff.Computation,
  start_hparams: tff.Computation,
  metrics_aggregation: Any,
  counts: tuple[str, ...] = (),
  *,
  secure_measurements: bool,
) -> tff.learning.templates.ClientWorkProcess:
  """Makes a client work, whose state is the optimiser's hyperparameters, of what one client does.

  Args:
    client_update: <hyperparameters, weights, data> -> (ClientResult, unfinalized metrics,
      non-finite flag, *counts).
    start_hparams: Of `hparams_computation`.
    metrics_aggregation: Of the metrics.
    counts: Names of what else each client counts; measured as sums over the clients.
    secure_measurements: See `build_client_work`; for all but the metrics.

  Returns:
    A work whose measurements are `OrderedDict(train, non_finite, **counts)`.
  """
  hparams_type, weights_type, data_type = client_update.type_signature.parameter
  if secure_measurements:
    collect_flags = functools.partial(federated_count, secure=True)
  else:
    collect_flags = build_collect_from_clients(tff.types.TensorType(np.int32))

  @tff.federated_computation
  def init_fn():
    return tff.federated_eval(start_hparams, tff.SERVER)

  @tff.tensorflow.computation(hparams_type)
  def get_hparams_fn(state):
    return state

  @tff.tensorflow.computation(hparams_type, hparams_type)
  def set_hparams_fn(state, hparams):
    del state
    return hparams

  @tff.federated_computation(
    init_fn.type_signature.result,
    tff.types.FederatedType(weights_type, tff.CLIENTS),
    tff.types.FederatedType(data_type, tff.CLIENTS),
  )
  def next_fn(state, weights, client_data):
    result, metrics, non_finite, *counted = tff.federated_map(
      client_update, (tff.federated_broadcast(state), weights, client_data)
    )
    measurements = collections.OrderedDict(
      train=metrics_aggregation(metrics), non_finite=collect_flags(non_finite)
    )
    for name, count in zip(counts, counted, strict=True):
      measurements[name] = federated_count(count, secure_measurements)
    return tff.templates.MeasuredProcessOutput(state, result, tff.federated_zip(measurements))

  return tff.learning.templates.ClientWorkProcess(
    init_fn, next_fn, get_hparams_fn=get_hparams_fn, set_hparams_fn=set_hparams_fn
  )


def train_locally(
  models: list[tff.learning.models.VariableModel],
  optimizer: tff.learning.optimizers.Optimizer,
  initial_weights: tff.learning.models.ModelWeights,
  dataset: tf.data.Dataset,
  gradient_fn: Callable[[Any], tuple[tf.Tensor, list[list[tf.Tensor]], tuple[tf.Tensor, ...]]],
  share_statistics: bool,
  accumulators: tuple[tf.Tensor, ...] = (),
  *,
  hparams: collections.OrderedDict | None = None,
) -> tuple[list[Any], tf.Tensor, tuple[tf.Tensor, ...]]:
  """Trains one or several copies of a model side by side on the same batches.

  Args:
    models: The copies.
    optimizer: Each copy has its own state of it.
    initial_weights: Where all copies start.
    dataset: Batches.
    gradient_fn: From a batch: number of examples, gradients of each copy at its weights, and what
      is to be added to `accumulators`.
    share_statistics: See `build_client_work`.
    accumulators: Where the sums start.
    hparams: Hyperparameters of the optimiser; those it was built with by default.

  Returns:
    The update of each copy (initial minus trained), number of examples seen, and the sums.
  """
  all_weights = [tff.learning.models.ModelWeights.from_model(model) for model in models]
  for weights in all_weights:
    tf.nest.map_structure(lambda a, b: a.assign(b), weights, initial_weights)
  trainable = [tuple(weights.trainable) for weights in all_weights]
  specs = tuple(tf.TensorSpec(v.shape, v.dtype) for v in trainable[0])

  def reduce_fn(state, batch):
    num_examples, optimizer_states, sums = state
    batch_size, gradients, increments = gradient_fn(batch)
    new_states = []
    for optimizer_state, variables, gradient in zip(
      optimizer_states, trainable, gradients, strict=True
    ):
      new_state, updated = optimizer.next(optimizer_state, variables, tuple(gradient))
      tf.nest.map_structure(lambda a, b: a.assign(b), variables, tuple(updated))
      new_states.append(new_state)
    sums = tuple(total + extra for total, extra in zip(sums, increments, strict=True))
    return num_examples + tf.cast(batch_size, tf.int64), tuple(new_states), sums

  optimizer_states = tuple(optimizer.initialize(specs) for _ in models)
  if hparams is not None:
    optimizer_states = tuple(optimizer.set_hparams(state, hparams) for state in optimizer_states)
  start = (tf.constant(0, tf.int64), optimizer_states, accumulators)
  num_examples, _, sums = fold(dataset, start, reduce_fn)
  updates = []
  sent = sent_statistics(list(models[0].non_trainable_variables))
  for weights in all_weights:
    update = tf.nest.map_structure(tf.subtract, initial_weights.trainable, weights.trainable)
    if share_statistics:
      statistics = [
        initial - trained
        for initial, trained, is_sent in zip(
          initial_weights.non_trainable, weights.non_trainable, sent, strict=True
        )
        if is_sent
      ]
      update = collections.OrderedDict(trainable=update, non_trainable=statistics)
    updates.append(update)
  return updates, num_examples, sums


def fold(dataset: tf.data.Dataset, state: Any, step: Callable[[Any, Any], Any]) -> Any:
  """`dataset.reduce(state, step)`, inside a `tf.function`.

  Each call of `reduce` has its function optimised anew, which takes as long as tens of steps of a
  small model; a loop over an iterator is optimised once, with what is around it.

  Args:
    dataset: Batches.
    state: A nest of tensors.
    step: From state and batch to a state of the same structure.

  Returns:
    The last state.
  """
  iterator = iter(dataset)
  structure = state

  def body(batch, *flat):
    state = step(tf.nest.pack_sequence_as(structure, flat), batch.get_value())
    return iterator.get_next_as_optional(), *tf.nest.flatten(state)

  _, *flat = tf.while_loop(
    lambda batch, *_: batch.has_value(),
    body,
    [iterator.get_next_as_optional(), *tf.nest.flatten(state)],
    parallel_iterations=1,  # Steps assign to variables.
  )
  return tf.nest.pack_sequence_as(structure, flat)


def client_result(
  model: tff.learning.models.VariableModel,
  update: Any,
  num_examples: tf.Tensor,
  client_weighting: tff.learning.ClientWeighting,
) -> tuple[tff.learning.templates.ClientResult, Any, tf.Tensor]:
  """Returns (ClientResult, unfinalized metrics, 1 if the update was not finite and so dropped)."""
  finite = tf.reduce_all(
    [tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tf.nest.flatten(update)]
  )
  update = tf.nest.map_structure(lambda t: tf.where(finite, t, tf.zeros_like(t)), update)
  if client_weighting == tff.learning.ClientWeighting.NUM_EXAMPLES:
    weight = tf.cast(num_examples, tf.float32)
  else:
    weight = tf.constant(1.0)
  weight = tf.where(finite, weight, 0.0)
  tf.cond(finite, tf.no_op, lambda: _reset_metrics(model))
  return (
    tff.learning.templates.ClientResult(update=update, update_weight=weight),
    model.report_local_unfinalized_metrics(),
    tf.where(finite, 0, 1),
  )


def _reset_metrics(model: tff.learning.models.VariableModel) -> tf.Operation:
  model.reset_metrics()
  return tf.no_op()
