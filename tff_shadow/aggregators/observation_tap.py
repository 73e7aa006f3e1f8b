"""A factory that reports, beside the aggregate, every value that reached the server."""

import collections

import tensorflow as tf
import tensorflow_federated as tff

_Factory = tff.aggregators.WeightedAggregationFactory | tff.aggregators.UnweightedAggregationFactory


def observation_tap_factory(inner: _Factory) -> _Factory:
  """Returns a factory that aggregates with `inner` and logs what a curious server sees.

  Put the tap where the server stands: inside every factory that works on the client
  (`noise(observation_tap_factory(mean))`), so that it logs what leaves the client and no more.

  The state and the result are the inner factory's. The measurements are
  `OrderedDict(inner=<inner measurements>, observation=OrderedDict(updates=..., [weights=...],
  aggregate=...))`, where every tensor of `updates` and `weights` has a new first axis with one
  entry per client, in the order in which the clients' data were given.

  Args:
    inner: The factory whose input is logged.

  Returns:
    A weighted factory if `inner` is weighted, else an unweighted one.

  Raises:
    TypeError: If `inner` is not an aggregation factory.
  """
  if isinstance(inner, tff.aggregators.WeightedAggregationFactory):
    return _WeightedTapFactory(inner)
  if isinstance(inner, tff.aggregators.UnweightedAggregationFactory):
    return _UnweightedTapFactory(inner)
  raise TypeError(f'inner must be an aggregation factory, found {type(inner)}')


class _WeightedTapFactory(tff.aggregators.WeightedAggregationFactory):
  def __init__(self, inner: tff.aggregators.WeightedAggregationFactory):
    self._inner = inner

  def create(
    self, value_type: tff.types.Type, weight_type: tff.types.Type
  ) -> tff.templates.AggregationProcess:
    return _create_weighted(self._inner.create(value_type, weight_type), value_type, weight_type)


class _UnweightedTapFactory(tff.aggregators.UnweightedAggregationFactory):
  def __init__(self, inner: tff.aggregators.UnweightedAggregationFactory):
    self._inner = inner

  def create(self, value_type: tff.types.Type) -> tff.templates.AggregationProcess:
    return _create_unweighted(self._inner.create(value_type), value_type)


def _create_unweighted(
  inner: tff.templates.AggregationProcess, value_type: tff.types.Type
) -> tff.templates.AggregationProcess:
  collect = _collect_fn(collections.OrderedDict(updates=value_type))

  @tff.federated_computation(
    inner.initialize.type_signature.result, tff.types.FederatedType(value_type, tff.CLIENTS)
  )
  def next_fn(state, value):
    output = inner.next(state, value)
    collected = collect(tff.federated_zip(collections.OrderedDict(updates=value)))
    return _output(output, collected, ('updates',))

  return tff.templates.AggregationProcess(inner.initialize, next_fn)


def _create_weighted(
  inner: tff.templates.AggregationProcess, value_type: tff.types.Type, weight_type: tff.types.Type
) -> tff.templates.AggregationProcess:
  collect = _collect_fn(collections.OrderedDict(updates=value_type, weights=weight_type))

  @tff.federated_computation(
    inner.initialize.type_signature.result,
    tff.types.FederatedType(value_type, tff.CLIENTS),
    tff.types.FederatedType(weight_type, tff.CLIENTS),
  )
  def next_fn(state, value, weight):
    output = inner.next(state, value, weight)
    collected = collect(tff.federated_zip(collections.OrderedDict(updates=value, weights=weight)))
    return _output(output, collected, ('updates', 'weights'))

  return tff.templates.AggregationProcess(inner.initialize, next_fn)


def _output(output, collected, names):
  observation = collections.OrderedDict((name, collected[name]) for name in names)
  observation['aggregate'] = output.result
  measurements = tff.federated_zip(
    collections.OrderedDict(inner=output.measurements, observation=observation)
  )
  return tff.templates.MeasuredProcessOutput(output.state, output.result, measurements)


def _collect_fn(value_type):
  return build_collect_from_clients(tff.types.to_type(value_type))


def build_collect_from_clients(value_type: tff.types.Type) -> tff.Computation:
  """Builds `{value_type}@CLIENTS -> stacked@SERVER`, one entry per client in the clients' order.

  TFF's factory for reservoir sampling does the same where it has room for all, but takes some four
  times as long to build, for its draws.
  """
  stacked_type = tff.types.to_type(
    tff.types.structure_from_tensor_type_tree(
      lambda leaf: tff.types.TensorType(leaf.dtype, (None, *leaf.shape)), value_type
    )
  )

  @tff.tensorflow.computation
  def nothing():
    return tff.types.structure_from_tensor_type_tree(
      lambda leaf: tf.zeros((0, *leaf.shape), leaf.dtype), value_type
    )

  @tff.tensorflow.computation(stacked_type, value_type)
  def append(stacked, value):
    return tf.nest.map_structure(
      lambda all_before, one: tf.concat([all_before, one[tf.newaxis]], axis=0), stacked, value
    )

  @tff.tensorflow.computation(stacked_type, stacked_type)
  def join(first, second):
    return tf.nest.map_structure(lambda a, b: tf.concat([a, b], axis=0), first, second)

  @tff.tensorflow.computation(stacked_type)
  def report(stacked):
    return stacked

  @tff.federated_computation(tff.types.FederatedType(value_type, tff.CLIENTS))
  def collect(value):
    return tff.federated_aggregate(value, nothing(), append, join, report)

  return collect
