"""Federated averaging that also averages the statistics of BatchNorm."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.learning.client_work import (
  BuildGradientFn,
  ModelFn,
  build_client_work,
  build_plain_gradient_fn,
)
from tff_shadow.models import sent_statistics
from tff_shadow.observations import BATCH_NORM_SHARING, BatchNormSharing

# From an aggregator to the process that it completes.
ButAggregation = Callable[
  [tff.aggregators.WeightedAggregationFactory], tff.learning.templates.LearningProcess
]


def build_weighted_fed_avg(
  model_fn: ModelFn,
  client_optimizer_fn: tff.learning.optimizers.Optimizer,
  server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
  *,
  client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
  model_distributor: tff.learning.templates.DistributionProcess | None = None,
  model_aggregator: tff.aggregators.WeightedAggregationFactory | None = None,
  metrics_aggregator: Callable[..., Any] | None = None,
  batch_norm_sharing: BatchNormSharing = 'aggregate',
  build_gradient_fn: BuildGradientFn = build_plain_gradient_fn,
  secure_measurements: bool = False,
) -> tff.learning.templates.LearningProcess:
  """Builds FedAvg (McMahan et al. 2017) with a choice of what BatchNorm shares.

  Drop-in for `tff.learning.algorithms.build_weighted_fed_avg` with Keras models, and the same
  algorithm for one without BatchNorm. A `FunctionalModel`, which that takes too, is refused, and
  there is no `loop_implementation`: the loop over a client's batches is one of our own, and a
  single one.
  `batch_norm_sharing` decides what is sent of the running statistics:

  * 'aggregate': clients send their change, the server adds the mean (plain FedAvg of all weights).
  * 'local': they never leave a client (SiloBN, Andreux et al. 2020); the global model's stay at
    their initial values, so whoever uses it estimates them on data of their own
    (`tff_shadow.learning.estimate_batch_norm_statistics`).
  * 'frozen': `model_fn` has frozen its BatchNorm layers (`tff_shadow.models.freeze_batch_norm`);
    there is nothing to send.

  Args:
    model_fn: Builds a `tff.learning.models.VariableModel` anew at each call.
    client_optimizer_fn: The local optimiser.
    server_optimizer_fn: The server's; SGD with learning rate 1 by default, that is the mean.
    client_weighting: Weight of a client in the mean; by default its number of examples.
    model_distributor: Sends the weights to the clients; a plain broadcast by default.
    model_aggregator: Aggregates the updates; the weighted mean by default. With 'aggregate' and a
      model that has statistics the updates are `OrderedDict(trainable, non_trainable)`.
    metrics_aggregator: As in TFF; see `build_client_work` for the default.
    batch_norm_sharing: See above.
    build_gradient_fn: See `build_client_work`.
    secure_measurements: Whether all that is measured of clients, beside what `model_aggregator`
      measures, is computed by secure summation. With `tff.learning.secure_aggregator()` for it the
      server then sees nothing of single clients.

  Returns:
    A `LearningProcess`; its client work reports `non_finite`, a flag per client, or with
    `secure_measurements` the number of clients that were dropped.

  Raises:
    ValueError: For an unknown `batch_norm_sharing`.
    TypeError: If the aggregator changes the structure of the update, or is not weighted; if
      `client_weighting` is no `tff.learning.ClientWeighting`; or if `model_fn` is none that builds
      a `VariableModel`.
  """
  return weighted_fed_avg_but_aggregation(
    model_fn,
    client_optimizer_fn,
    server_optimizer_fn,
    client_weighting=client_weighting,
    model_distributor=model_distributor,
    metrics_aggregator=metrics_aggregator,
    batch_norm_sharing=batch_norm_sharing,
    build_gradient_fn=build_gradient_fn,
    secure_measurements=secure_measurements,
  )(model_aggregator or tff.aggregators.MeanFactory())


def weighted_fed_avg_but_aggregation(
  model_fn: ModelFn,
  client_optimizer_fn: tff.learning.optimizers.Optimizer,
  server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
  *,
  client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
  model_distributor: tff.learning.templates.DistributionProcess | None = None,
  metrics_aggregator: Callable[..., Any] | None = None,
  batch_norm_sharing: BatchNormSharing = 'aggregate',
  build_gradient_fn: BuildGradientFn = build_plain_gradient_fn,
  secure_measurements: bool = False,
) -> ButAggregation:
  """`build_weighted_fed_avg`, to be finished with one aggregator after another.

  What does not depend on the aggregator, the most of it, is traced once.
  """
  initial_model_weights, share_statistics = initial_weights(model_fn, batch_norm_sharing)
  client_work = build_client_work(
    model_fn,
    client_optimizer_fn,
    client_weighting=client_weighting,
    share_statistics=share_statistics,
    metrics_aggregator=metrics_aggregator,
    build_gradient_fn=build_gradient_fn,
    secure_measurements=secure_measurements,
  )
  return but_aggregation(
    model_fn,
    initial_model_weights,
    model_distributor,
    client_work,
    server_optimizer_fn,
    client_work.next.type_signature.result.result.member.update,
    share_statistics,
  )


def initial_weights(
  model_fn: ModelFn, batch_norm_sharing: BatchNormSharing
) -> tuple[tff.Computation, bool]:
  """The computation of the initial model weights, and whether statistics are sent.

  Raises:
    ValueError: For an unknown `batch_norm_sharing`.
    TypeError: If `model_fn` is none that builds a `VariableModel`.
  """
  if batch_norm_sharing not in BATCH_NORM_SHARING:
    raise ValueError(
      f'batch_norm_sharing must be one of {BATCH_NORM_SHARING}, found {batch_norm_sharing!r}'
    )

  sent: list[bool] = []  # Told once, as the model is built for its weights.

  @tff.tensorflow.computation
  def initial_model_weights():
    is_functional = isinstance(model_fn, tff.learning.models.FunctionalModel)
    model = model_fn if is_functional else model_fn()
    if not isinstance(model, tff.learning.models.VariableModel):
      raise TypeError(
        'model_fn must be a function that returns a VariableModel of a Keras model'
        f' (tff.learning.models.from_keras_model), found {type(model).__name__}'
      )
    sent[:] = sent_statistics(list(model.non_trainable_variables))
    return tff.learning.models.ModelWeights.from_model(model)

  return initial_model_weights, batch_norm_sharing == 'aggregate' and any(sent)


def but_aggregation(
  model_fn: ModelFn,
  initial_model_weights: tff.Computation,
  model_distributor: tff.learning.templates.DistributionProcess | None,
  client_work: tff.learning.templates.ClientWorkProcess,
  server_optimizer_fn: tff.learning.optimizers.Optimizer | None,
  update_type: tff.types.Type,
  share_statistics: bool,
) -> ButAggregation:
  """FedAvg of a client work whose updates, once aggregated, are of `update_type`.

  What it returns raises TypeError if the aggregate has another type, or the aggregator is not
  weighted.
  """
  weights_type = initial_model_weights.type_signature.result
  distributor = model_distributor or tff.learning.templates.build_broadcast_process(weights_type)
  finalizer = tff.learning.templates.build_apply_optimizer_finalizer(
    server_optimizer_fn or tff.learning.optimizers.build_sgdm(1.0), weights_type
  )
  if share_statistics:
    with tf.Graph().as_default():
      variables = list(model_fn().non_trainable_variables)
    names = [variable.name for variable in variables]
    finalizer = _with_statistics(
      finalizer, weights_type, update_type, names, sent_statistics(variables)
    )
  sent = client_work.next.type_signature.result.result.member

  def complete(model_aggregator):
    aggregator = model_aggregator.create(sent.update, sent.update_weight)
    aggregate_type = aggregator.next.type_signature.result.result.member
    if aggregate_type != update_type:
      raise TypeError(
        f'model_aggregator must return the type of the update, {update_type}, found'
        f' {aggregate_type}'
      )
    return tff.learning.templates.compose_learning_process(
      initial_model_weights, distributor, client_work, aggregator, finalizer
    )

  return complete


def _with_statistics(
  finalizer: tff.learning.templates.FinalizerProcess,
  weights_type: tff.types.StructType,
  update_type: tff.types.StructType,
  names: list[str],
  sent: list[bool],
) -> tff.learning.templates.FinalizerProcess:
  """Extends a finalizer of trainable weights: statistics move by their mean change.

  The server's optimiser has no say in them; a momentum or Adam step could make a variance negative.
  Noise in the update could as well, so variances (by their `names`) are clipped at 0. An
  update that is not finite leaves them as they are, as it leaves the trainable weights.
  """

  @tff.tensorflow.computation(weights_type.non_trainable, update_type)
  def apply_statistics(statistics, update):
    finite = tf.reduce_all(
      [tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tf.nest.flatten(update)]
    )
    changes = iter(update['non_trainable'])

    def moved(name, statistic, is_sent):
      if not is_sent:
        return statistic
      new = statistic - next(changes)
      if 'moving_variance' in name:
        new = tf.maximum(new, 0.0)
      return tf.where(finite, new, statistic)

    return list(map(moved, names, statistics, sent))

  @tff.federated_computation(
    finalizer.initialize.type_signature.result,
    tff.types.FederatedType(weights_type, tff.SERVER),
    tff.types.FederatedType(update_type, tff.SERVER),
  )
  def next_fn(state, weights, update):
    output = finalizer.next(state, weights, update.trainable)
    statistics = tff.federated_map(apply_statistics, (weights.non_trainable, update))
    new_weights = tff.federated_zip(
      tff.learning.models.ModelWeights(output.result.trainable, statistics)
    )
    return tff.templates.MeasuredProcessOutput(output.state, new_weights, output.measurements)

  return tff.learning.templates.FinalizerProcess(
    finalizer.initialize,
    next_fn,
    get_hparams_fn=finalizer.get_hparams,
    set_hparams_fn=finalizer.set_hparams,
  )
