import numpy as np
import pytest
from scipy import stats

from tff_shadow.privacy import (
  cramer_rao_bound,
  probed_trace_bound,
  solved_bound,
  trace_bound,
  van_trees_bound,
)


def _information(pixels=30, seed=0):
  """Eigenvalues from 1 to 1,000 in a random basis."""
  basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(pixels, pixels)))
  return basis * np.logspace(0, 3, pixels) @ basis.T


_WEIGHTS = np.linspace(0.0, 1.0, 30)


class TestOrder:
  def test_probes_below_exact_trace_below_exact_inverse(self):
    information, prior = _information(), 5.0 * np.eye(30)
    matrix = information + prior
    probed = probed_trace_bound(matrix.__matmul__, _WEIGHTS, probes=64, seed=0)
    solved = solved_bound(matrix.__matmul__, _WEIGHTS, probes=64, iterations=60, seed=0)
    exact_trace = trace_bound(matrix, _WEIGHTS)
    exact = van_trees_bound(information, prior, _WEIGHTS)
    assert 0.4 * exact_trace < probed.value < exact_trace < exact
    assert 0.4 * exact < solved.value < exact
    assert solved.value > exact_trace
    assert (solved.probes, solved.confidence) == (64, 0.95)

  def test_many_probes_find_the_exact_ones(self):
    information = _information()
    kwargs = {'probes': 4000, 'seed': 1}
    traced = probed_trace_bound(information.__matmul__, _WEIGHTS, **kwargs)
    # Relative standard error of the trace: about 2 %.
    assert traced.estimate == pytest.approx(trace_bound(information, _WEIGHTS), rel=0.08)
    solved = solved_bound(
      information.__matmul__, _WEIGHTS, iterations=100, **{**kwargs, 'probes': 400}
    )
    exact = cramer_rao_bound(information, _WEIGHTS)
    assert solved.estimate == pytest.approx(exact, rel=0.25)
    assert 0.75 * solved.estimate < solved.value < 0.95 * solved.estimate


class TestConfidence:
  @pytest.mark.parametrize('confidence', [0.8, 0.95])
  @pytest.mark.parametrize('probes', [1, 12, 300])
  def test_correction_against_chi_squared(self, probes, confidence):
    """The worst spectrum is a single eigenvalue, where probes sum up to a chi-squared."""
    kwargs = {'probes': probes, 'seed': 0, 'confidence': confidence}
    traced = probed_trace_bound(lambda v: v, np.ones(2), **kwargs)
    solved = solved_bound(lambda v: v, np.ones(2), iterations=2, **kwargs)
    low, high = traced.value / traced.estimate, solved.estimate / solved.value
    for broken in (stats.chi2.cdf(probes * low, probes), stats.chi2.sf(probes * high, probes)):
      # What Chernoff's bound gives away.
      assert 0.03 * (1 - confidence) < broken < 0.5 * (1 - confidence)

  @pytest.mark.parametrize('eigenvalues', [(1.0, 0.0), (3.0, 1.0)])
  def test_holds_over_probes(self, eigenvalues):
    matrix = np.diag(eigenvalues)
    weights = np.array([1.0, float(eigenvalues[1] > 0)])
    kwargs = {'probes': 12, 'confidence': 0.6}
    exact = {
      probed_trace_bound: trace_bound(matrix, weights),
      solved_bound: cramer_rao_bound(matrix, weights),
    }
    for bound, value in exact.items():
      more = {'iterations': 3} if bound is solved_bound else {}
      found = [bound(matrix.__matmul__, weights, seed=s, **kwargs, **more) for s in range(400)]
      assert 0.0 < np.mean([b.value > value for b in found]) < 0.4
      assert 0.35 < np.mean([b.estimate > value for b in found]) < 0.65


class TestSolvedBound:
  def test_fewer_iterations_only_lower_it(self):
    information = _information()
    estimates = [
      solved_bound(
        information.__matmul__, _WEIGHTS, probes=16, iterations=iterations, seed=2
      ).estimate
      for iterations in (1, 2, 5, 15, 100)
    ]
    assert estimates == sorted(estimates)
    assert estimates[0] < 0.5 * estimates[-1]
    probes = np.sqrt(_WEIGHTS) * np.random.default_rng(2).standard_normal((16, 30))
    exact = np.mean([b @ np.linalg.solve(information, b) for b in probes]) / _WEIGHTS.sum()
    assert estimates[-1] == pytest.approx(exact, rel=1e-6)
    assert estimates[-1] <= exact * (1 + 1e-12)

  def test_a_preconditioner_changes_the_way_not_the_value(self):
    information = np.diag(np.logspace(0, 5, 30))
    near = np.diag(information) * np.linspace(0.9, 1.1, 30)
    kwargs = {'probes': 4, 'seed': 3}
    exact = solved_bound(information.__matmul__, _WEIGHTS, iterations=1000, **kwargs).estimate
    few = solved_bound(information.__matmul__, _WEIGHTS, iterations=6, **kwargs).estimate
    helped = solved_bound(
      information.__matmul__, _WEIGHTS, iterations=6, precondition=lambda v: v / near, **kwargs
    ).estimate
    assert few < 0.9 * exact
    assert 0.999 * exact < helped <= exact * (1 + 1e-9)

  def test_singular_on_the_region(self):
    singular = np.diag([1.0, 0.0])
    for matrix in (singular, np.zeros((2, 2))):
      kwargs = {'probes': 8, 'iterations': 5, 'seed': 4}
      assert solved_bound(matrix.__matmul__, np.ones(2), **kwargs).value > 1e6


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'probes': 0}, 'probes must be at least 1, found 0'),
    ({'confidence': 1.0}, 'confidence must be in'),
    ({'iterations': 0}, 'iterations must be at least 1'),
    ({'weights': np.zeros(2)}, 'weights are zero'),
  ],
)
def test_arguments(kwargs, message):
  valid = {'weights': np.ones(2), 'probes': 2, 'iterations': 2, 'seed': 0}
  with pytest.raises(ValueError, match=message):
    solved_bound(lambda v: v, **{**valid, **kwargs})


def test_a_product_that_is_not_finite():
  kwargs = {'probes': 2, 'seed': 0}
  with pytest.raises(ValueError, match='multiply must give finite values'):
    solved_bound(lambda v: v * np.nan, np.ones(2), iterations=2, **kwargs)
  with pytest.raises(ValueError, match='multiply must give finite values'):
    probed_trace_bound(lambda v: v * np.nan, np.ones(2), **kwargs)
