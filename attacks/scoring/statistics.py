"""Means over images, or over clients with several, with 95 % confidence intervals."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its 95 % confidence interval.

  Attributes:
    mean: None where there are no values.
    low: Lower end; None where `n` < 2, for one value says nothing of its spread.
    high: Upper end; None as above.
    n: Number of values.
  """

  mean: float | None
  low: float | None
  high: float | None
  n: int


def mean_interval(values: Sequence[float]) -> Interval:
  """Student's t interval: mean +- t(0.975, n - 1) * s / sqrt(n).

  Raises:
    ValueError: If a value is not finite.
  """
  values = _checked(values)
  count = len(values)
  if count == 0:
    return Interval(None, None, None, 0)
  mean = float(values.mean())
  if count == 1:
    return Interval(mean, None, None, 1)
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values))
  return Interval(mean, mean - half, mean + half, count)


def clustered_interval(values: Sequence[float | None], clusters: Sequence[Hashable]) -> Interval:
  """`mean_interval` of the mean of each cluster, as values in one depend on each other.

  Args:
    values: Any number; None, for one that there is not, is left out.
    clusters: The cluster of each; where all differ this is `mean_interval` of the values.

  Raises:
    ValueError: If a value is not finite, or the lengths differ.
  """
  members: dict[Hashable, list[float]] = {}
  for value, cluster in zip(values, clusters, strict=True):
    if value is not None:
      members.setdefault(cluster, []).append(value)
  return mean_interval([float(np.mean(own)) for own in members.values()])


def paired_differences(
  first: Sequence[float | None], second: Sequence[float | None]
) -> list[float | None]:
  """First - second of each pair; None where one of them is."""
  return [None if None in pair else pair[0] - pair[1] for pair in zip(first, second, strict=True)]


def bootstrap_interval(values: Sequence[float], seed: int, resamples: int = 9999) -> Interval:
  """Bias-corrected and accelerated bootstrap interval (Efron 1987), for skewed values.

  Raises:
    ValueError: If a value is not finite.
  """
  values = _checked(values)
  plain = mean_interval(values)
  if plain.n < 2:
    return plain
  if np.ptp(values) == 0:
    # The acceleration is 0/0 here, and every resample has the same mean.
    return Interval(plain.mean, plain.mean, plain.mean, plain.n)
  interval = stats.bootstrap(
    (values,),
    np.mean,
    n_resamples=resamples,
    confidence_level=CONFIDENCE,
    method='BCa',
    random_state=np.random.default_rng(seed),
  ).confidence_interval
  return Interval(plain.mean, float(interval.low), float(interval.high), plain.n)


def _checked(values: Sequence[float]) -> np.ndarray:
  values = np.asarray(values, np.float64).reshape(-1)
  if not np.isfinite(values).all():
    raise ValueError('values must be finite: count missing values apart, before taking a mean')
  return values
