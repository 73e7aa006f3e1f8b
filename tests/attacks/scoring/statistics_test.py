import numpy as np
import pytest
from scipy import stats

from attacks.scoring.statistics import Interval, bootstrap_interval, mean_interval


def test_known_interval():
  # t(0.975, 2) = 4.302653, s = 1, n = 3.
  found = mean_interval([1.0, 2.0, 3.0])
  assert found.mean == 2.0
  assert found.low == pytest.approx(2 - 4.302653 / np.sqrt(3), abs=1e-6)
  assert found.high == pytest.approx(2 + 4.302653 / np.sqrt(3), abs=1e-6)
  assert found.n == 3


def test_agrees_with_scipy():
  values = np.random.default_rng(0).normal(5, 2, 40)
  low, high = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
  found = mean_interval(values)
  assert (found.low, found.high) == pytest.approx((low, high))


def test_covers_the_mean_95_times_of_100():
  draws = np.random.default_rng(1).normal(3, 1, (1000, 5))
  covered = [mean_interval(row).low <= 3 <= mean_interval(row).high for row in draws]
  assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize('interval', [mean_interval, lambda values: bootstrap_interval(values, 0)])
def test_few_or_equal_values(interval):
  assert interval([]) == Interval(None, None, None, 0)
  assert interval([4.0]) == Interval(4.0, None, None, 1)
  assert interval([4.0, 4.0, 4.0]) == Interval(4.0, 4.0, 4.0, 3)
  with pytest.raises(ValueError, match='finite'):
    interval([1.0, float('nan')])


def test_bootstrap_is_reproducible_and_near_the_t_interval():
  values = np.random.default_rng(2).normal(0, 1, 60)
  first = bootstrap_interval(values, seed=7)
  assert first == bootstrap_interval(values, seed=7)
  assert first != bootstrap_interval(values, seed=8)
  plain = mean_interval(values)
  assert (first.low, first.high) == pytest.approx((plain.low, plain.high), abs=0.05)
