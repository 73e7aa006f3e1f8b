"""Factories that change a value on the client and hand it to an inner factory."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow_federated as tff

Factory = tff.aggregators.WeightedAggregationFactory | tff.aggregators.UnweightedAggregationFactory


class ClientSide(NamedTuple):
  """What is done on a client.

  Attributes:
    transform: value -> (sent value, statistics), or with a context <value, context> -> the same.
    sent_type: Type of the sent value.
    measure: statistics@CLIENTS -> OrderedDict of measurements@SERVER.
    context: No-argument computation of a server value that is broadcast to the clients and kept in
      the state, or None.
  """

  transform: tff.Computation
  sent_type: tff.types.Type
  measure: Callable[[Any], collections.OrderedDict]
  context: tff.Computation | None = None


def client_side_factory(
  build: Callable[[tff.types.Type], ClientSide], inner: Factory | None
) -> Factory:
  """Returns a factory that applies `build(value_type)` on each client and aggregates with `inner`.

  State: the inner one's, or with a context `OrderedDict(inner, context)`. Measurements:
  `OrderedDict(inner=<inner measurements>, **measure(...))`. Weighted if `inner` is; the weighted
  mean where it is None.

  Raises:
    TypeError: If `inner` is no factory.
  """
  inner = inner if inner is not None else tff.aggregators.MeanFactory()
  if isinstance(inner, tff.aggregators.WeightedAggregationFactory):
    return _WeightedClientSideFactory(build, inner)
  if isinstance(inner, tff.aggregators.UnweightedAggregationFactory):
    return _UnweightedClientSideFactory(build, inner)
  raise TypeError(f'inner must be an aggregation factory, found {type(inner)}')


class _WeightedClientSideFactory(tff.aggregators.WeightedAggregationFactory):
  def __init__(self, build, inner):
    self._build, self._inner = build, inner

  def create(
    self, value_type: tff.types.Type, weight_type: tff.types.Type
  ) -> tff.templates.AggregationProcess:
    client_side = self._build(value_type)
    inner = self._inner.create(client_side.sent_type, weight_type)
    init_fn = _init_fn(client_side, inner)

    @tff.federated_computation(
      init_fn.type_signature.result,
      tff.types.FederatedType(value_type, tff.CLIENTS),
      tff.types.FederatedType(weight_type, tff.CLIENTS),
    )
    def next_fn(state, value, weight):
      inner_state, sent, statistics = _on_clients(client_side, state, value)
      return _output(client_side, state, inner.next(inner_state, sent, weight), statistics)

    return tff.templates.AggregationProcess(init_fn, next_fn)


class _UnweightedClientSideFactory(tff.aggregators.UnweightedAggregationFactory):
  def __init__(self, build, inner):
    self._build, self._inner = build, inner

  def create(self, value_type: tff.types.Type) -> tff.templates.AggregationProcess:
    client_side = self._build(value_type)
    inner = self._inner.create(client_side.sent_type)
    init_fn = _init_fn(client_side, inner)

    @tff.federated_computation(
      init_fn.type_signature.result, tff.types.FederatedType(value_type, tff.CLIENTS)
    )
    def next_fn(state, value):
      inner_state, sent, statistics = _on_clients(client_side, state, value)
      return _output(client_side, state, inner.next(inner_state, sent), statistics)

    return tff.templates.AggregationProcess(init_fn, next_fn)


def _init_fn(client_side: ClientSide, inner: tff.templates.AggregationProcess) -> tff.Computation:
  if client_side.context is None:
    return inner.initialize

  @tff.federated_computation
  def init_fn():
    return tff.federated_zip(
      collections.OrderedDict(
        inner=inner.initialize(), context=tff.federated_eval(client_side.context, tff.SERVER)
      )
    )

  return init_fn


def _on_clients(client_side: ClientSide, state, value):
  """Returns the inner state and what the clients send, with their statistics."""
  if client_side.context is None:
    sent, statistics = tff.federated_map(client_side.transform, value)
    return state, sent, statistics
  context = tff.federated_broadcast(state.context)
  sent, statistics = tff.federated_map(client_side.transform, (value, context))
  return state.inner, sent, statistics


def _output(client_side: ClientSide, state, inner_output, statistics):
  new_state = inner_output.state
  if client_side.context is not None:
    new_state = tff.federated_zip(
      collections.OrderedDict(inner=inner_output.state, context=state.context)
    )
  measurements = tff.federated_zip(
    collections.OrderedDict(inner=inner_output.measurements, **client_side.measure(statistics))
  )
  return tff.templates.MeasuredProcessOutput(new_state, inner_output.result, measurements)
