import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from tff_shadow.data.local_training import local_training_order
from tff_shadow.privacy import (
  UNPROVEN,
  dp_fed_avg_guarantee,
  dp_sgd_guarantee,
  example_uses,
  no_guarantee,
  public_shape_guarantee,
)


def _analytic_gaussian_epsilon(sensitivity_over_deviation, delta):
  """Theorem 8 of Balle & Wang 2018, solved for epsilon."""
  ratio = sensitivity_over_deviation

  def excess(epsilon):
    return (
      stats.norm.cdf(ratio / 2 - epsilon / ratio)
      - np.exp(epsilon) * stats.norm.cdf(-ratio / 2 - epsilon / ratio)
      - delta
    )

  return optimize.brentq(excess, 0.0, 100.0)


class TestPublicShape:
  @pytest.mark.parametrize(('multiplier', 'rounds'), [(4.0, 1), (10.0, 1), (20.0, 30)])
  def test_epsilon_is_the_analytic_gaussian_mechanism_s(self, multiplier, rounds):
    guarantee = public_shape_guarantee(multiplier, rounds, 1e-5)
    # Replacing an update moves it by 2 clip_norm; k rounds are one of sqrt(k) times the shift.
    expected = _analytic_gaussian_epsilon(2.0 * np.sqrt(rounds) / multiplier, 1e-5)
    assert guarantee.epsilon == pytest.approx(expected, rel=1e-7)
    assert (guarantee.delta, guarantee.unit) == (1e-5, 'client update (local)')
    assert guarantee.reason is None

  def test_says_what_it_assumes(self):
    statement = str(public_shape_guarantee(10.0, 7, 1e-5))
    assert statement.startswith('(')
    assert 'per client update (local)' in statement
    assert 'at most 7 rounds' in statement
    assert 'computed without private data' in statement


class TestDpFedAvg:
  def test_all_clients_in_every_round(self):
    guarantee = dp_fed_avg_guarantee(5.0, 9, 9, 20, 1e-3)
    expected = _analytic_gaussian_epsilon(2.0 * np.sqrt(20) / 5.0, 1e-3)
    assert guarantee.epsilon == pytest.approx(expected, rel=1e-7)
    assert guarantee.unit == 'client'
    assert any('not against the server' in sentence for sentence in guarantee.assumptions)
    assert any('all clients take part' in sentence for sentence in guarantee.assumptions)

  def test_sampling_amplifies_and_is_an_assumption(self):
    guarantee = dp_fed_avg_guarantee(4.0, 10, 1000, 50, 1e-5)
    # The central limit for uniform sampling (Dong, Roth and Su 2019, corollary 5.4), with half of
    # the multiplier; Renyi accounting stays above it.
    inverse = 2.0 / 4.0
    term = math.exp(inverse**2) * stats.norm.cdf(1.5 * inverse)
    term += 3.0 * stats.norm.cdf(-0.5 * inverse) - 2.0
    limit = _analytic_gaussian_epsilon(10 / 1000 * math.sqrt(2 * 50 * term), 1e-5)
    assert limit < guarantee.epsilon < 3 * limit
    assert guarantee.epsilon < 0.1 * dp_fed_avg_guarantee(4.0, 1000, 1000, 50, 1e-5).epsilon
    assert any('10 of 1000 clients' in sentence for sentence in guarantee.assumptions)

  def test_never_more_than_without_sampling(self):
    # At this share the theorem of sampling gives more than no sampling does.
    nearly = dp_fed_avg_guarantee(5.0, 8, 9, 20, 1e-3).epsilon
    assert nearly == dp_fed_avg_guarantee(5.0, 9, 9, 20, 1e-3).epsilon

  def test_arguments(self):
    for clients in (0, 11):
      with pytest.raises(ValueError, match=f'clients_per_round .* found {clients}'):
        dp_fed_avg_guarantee(1.0, clients, 10, 5, 1e-5)


class TestDpSgd:
  @pytest.mark.parametrize('uses', [1, 4])
  def test_it_is_the_gaussian_mechanism_of_every_use(self, uses):
    # Leaving one example out moves the sum by the clipping norm, each time it is used.
    found = dp_sgd_guarantee(8.0, uses, 1e-5)
    expected = _analytic_gaussian_epsilon(np.sqrt(uses) / 8.0, 1e-5)
    assert found.epsilon == pytest.approx(expected, rel=1e-7)
    assert found.unit == 'example'
    assert f'an example is in at most {uses} local steps' in str(found)
    assert 'counts as k squared' in str(found)

  @pytest.mark.parametrize(
    ('numbers', 'uses'),
    [
      ((64, 8, 3, None), 3),  # Batches end with the epochs.
      ((12, 8, 1, None), 1),
      ((12, 8, 2, None), 4),  # The last of one epoch, the first of the next.
      ((12, 8, 3, None), 5),
      ((12, 8, 2, 1), 1),
      ((4, 8, 2, None), 4),
      ((1, 8, 10, 1), 64),
      ((1, 8, 10, None), 68),
      ((3, 8, 6, None), 4 * 4 + 2 * 2),
    ],
  )
  def test_an_example_that_is_more_than_once_in_a_step_moves_it_as_often(self, numbers, uses):
    assert example_uses(*numbers) == uses

  @given(
    size=st.integers(1, 12),
    batch=st.integers(1, 12),
    epochs=st.integers(1, 6),
    steps=st.none() | st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
  )
  def test_no_training_uses_an_example_more(self, size, batch, epochs, steps, seed):
    rng = np.random.default_rng(seed)
    order = local_training_order(size, batch, epochs, steps, rng)
    counts = [
      np.bincount(order[start : start + batch], minlength=size)
      for start in range(0, len(order), batch)
    ]
    most = np.max(np.sum(np.square(counts), axis=0))
    assert most <= example_uses(size, batch, epochs, steps)

  @given(multiplier=st.floats(0.01, 100), uses=st.integers(1, 10_000), exponent=st.floats(0.1, 12))
  def test_it_is_enough_and_hardly_more(self, multiplier, uses, exponent):
    delta = 10**-exponent
    epsilon = dp_sgd_guarantee(multiplier, uses, delta).epsilon
    mechanism = GaussianPrivacyLoss(multiplier / math.sqrt(uses))
    assert mechanism.get_delta_for_epsilon(epsilon) <= delta
    less = epsilon * (1 - 1e-6) - 1e-9
    assert epsilon == 0 or mechanism.get_delta_for_epsilon(less) > delta

  def test_the_composed_distribution_of_the_privacy_loss_says_the_same(self):
    composed = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.GaussianDpEvent(1.5)
    composed.compose(dp_accounting.SelfComposedDpEvent(step, 20))
    found = dp_sgd_guarantee(1.5, 20, 1e-5).epsilon
    assert composed.get_epsilon(1e-5) == pytest.approx(found, rel=1e-3)

  def test_no_sampling_makes_it_smaller(self):
    # An epoch of 8 batches, each of which takes every example with probability 1/8.
    sampled = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(1 / 8, dp_accounting.GaussianDpEvent(1.0))
    sampled.compose(dp_accounting.SelfComposedDpEvent(step, 8))
    assert dp_sgd_guarantee(1.0, 1, 1e-5).epsilon > 1.2 * sampled.get_epsilon(1e-5)


@pytest.mark.parametrize(
  'state',
  [
    lambda z=1.0, n=1, d=1e-5: public_shape_guarantee(z, n, d),
    lambda z=1.0, n=1, d=1e-5: dp_fed_avg_guarantee(z, 1, 2, n, d),
    lambda z=1.0, n=1, d=1e-5: dp_sgd_guarantee(z, n, d),
  ],
)
def test_numbers_out_of_range(state):
  for multiplier in (0.0, -1.0, float('nan'), float('inf')):
    with pytest.raises(ValueError, match=f'noise_multiplier .* found {multiplier}'):
      state(z=multiplier)
  for delta in (0.0, 1.0, float('nan')):
    with pytest.raises(ValueError, match=f'delta .* found {delta}'):
      state(d=delta)
  with pytest.raises(ValueError, match=r'(rounds|uses) must be at least 1, found 0'):
    state(n=0)


class TestNoGuarantee:
  @pytest.mark.parametrize('mechanism', UNPROVEN)
  def test_has_no_numbers_and_a_reason(self, mechanism):
    guarantee = no_guarantee(mechanism)
    assert (guarantee.epsilon, guarantee.delta, guarantee.unit) == (None, None, None)
    assert guarantee.assumptions == ()
    assert str(guarantee) == f'no formal guarantee: {guarantee.reason}'
    assert len(guarantee.reason) > 20

  def test_reasons_differ(self):
    assert len({no_guarantee(mechanism).reason for mechanism in UNPROVEN}) == len(UNPROVEN) >= 5

  def test_unknown(self):
    with pytest.raises(ValueError, match="found 'magic'"):
      no_guarantee('magic')
