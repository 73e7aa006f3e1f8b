"""Counts and means over clients that are measured beside an aggregate, plainly or securely."""

from typing import Any

import tensorflow_federated as tff

# Secure sums are of bounded values. Of these bounds the first is that of TFF's secure metrics, and
# the second leaves steps of 1e-6.
_MAX_COUNT = 2**20 - 1
_MAX_FIGURE = 4096.0


def federated_count(count: Any, secure: bool) -> Any:
  """The sum over clients of int32 counts, which are not negative; to be called in a computation.

  Args:
    count: int32@CLIENTS.
    secure: By secure summation, to which a client gives 2^20 - 1 at most.

  Returns:
    int32@SERVER.
  """
  if not secure:
    return tff.federated_sum(count)
  return _aggregated(tff.aggregators.SecureSumFactory(_MAX_COUNT, 0), count)


def federated_average(figure: Any, secure: bool) -> Any:
  """The mean over clients of float32 figures, which are not negative; called in a computation.

  Args:
    figure: float32@CLIENTS.
    secure: By secure summation, in steps of 1e-6, to which a client gives 4096 at most.

  Returns:
    float32@SERVER.
  """
  if not secure:
    return tff.federated_mean(figure)
  mean = tff.aggregators.UnweightedMeanFactory(
    tff.aggregators.SecureSumFactory(_MAX_FIGURE, 0.0), tff.aggregators.SecureSumFactory(1, 0)
  )
  return _aggregated(mean, figure)


def _aggregated(factory: tff.aggregators.UnweightedAggregationFactory, value: Any) -> Any:
  process = factory.create(value.type_signature.member)
  return process.next(process.initialize(), value).result
