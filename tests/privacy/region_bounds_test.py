import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.scoring.metrics import measure
from tests.privacy.linear_release import REGION, LinearRelease, assert_met, region_errors
from tff_shadow.privacy import (
  cramer_rao_bound,
  mean_squared_error,
  pixel_weights,
  region_psnr,
  trace_bound,
  update_information,
  van_trees_bound,
)

_DRAWS = 6000
_NOISES = ['isotropic', 'diagonal', 'correlated']


def _prior(rng):
  root = rng.normal(0, 0.2, (6, 6))
  return 0.5 * np.ones(6), root @ root.T + 0.01 * np.eye(6)


class TestRegionPsnr:
  def test_is_the_scoring_s_for_soft_regions_and_colours(self):
    rng = np.random.default_rng(0)
    truth, guess, region = rng.random((8, 9, 3)), rng.random((8, 9, 3)), rng.random((8, 9, 1))
    weights = pixel_weights(region, 3)
    error = region_errors(guess.reshape(1, -1), truth.reshape(1, -1), weights)[0]
    quality = measure(guess, truth, region)
    assert error == pytest.approx(quality.region_mse, rel=1e-12)
    assert region_psnr(error) == pytest.approx(quality.region_psnr, rel=1e-12)

  def test_values(self):
    assert region_psnr(0.01) == pytest.approx(20.0)
    assert region_psnr(0.0) == measure(*np.ones((3, 8, 8, 1))).region_psnr == 100.0
    assert region_psnr(math.inf) == -math.inf
    assert region_psnr(mean_squared_error(13.7)) == pytest.approx(13.7)
    # The PSNR of a mean error is below the mean of PSNRs.
    assert region_psnr(0.5 * (0.1 + 0.001)) < 0.5 * (region_psnr(0.1) + region_psnr(0.001)) - 5

  def test_arguments(self):
    for error in (-1e-9, math.nan):
      with pytest.raises(ValueError, match='mean_squared_error'):
        region_psnr(error)
    with pytest.raises(ValueError, match='psnr'):
      mean_squared_error(math.inf)


class TestCramerRaoBound:
  @pytest.mark.parametrize('noise', _NOISES)
  def test_least_squares_meets_it(self, noise):
    release, rng = LinearRelease(noise), np.random.default_rng(1)
    weights = pixel_weights(REGION, 1)
    images = rng.random((_DRAWS, 6))
    estimates = release.estimates(release.draw(images, rng))
    bound = cramer_rao_bound(release.information, weights)
    assert_met(region_errors(estimates, images, weights), bound)

  def test_a_shrunk_estimate_is_below_it(self):
    release, rng = LinearRelease('isotropic'), np.random.default_rng(1)
    release.covariance *= 100.0
    weights = pixel_weights(REGION, 1)
    images = 0.5 + 0.01 * rng.normal(size=(200, 6))
    bound = cramer_rao_bound(release.information / 100.0, weights)
    assert region_errors(0.5, images, weights).mean() < 0.1 * bound

  def test_infinite_exactly_where_the_region_is_not_identified(self):
    jacobian = np.random.default_rng(2).normal(size=(20, 6))
    jacobian[:, 0] = 0.0
    information = update_information(jacobian, 0.1)
    weights = np.array([0.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    expected = weights[1:] @ np.diag(np.linalg.inv(information[1:, 1:])) / weights.sum()
    assert cramer_rao_bound(information, weights) == pytest.approx(expected, rel=1e-9)
    weights[0] = 0.01
    assert cramer_rao_bound(information, weights) == math.inf
    assert cramer_rao_bound(np.zeros((6, 6)), weights) == math.inf

  def test_rounding_of_a_float32_jacobian_is_not_information(self):
    rng = np.random.default_rng(3)
    jacobian = rng.normal(size=(200, 40))
    # Two pixels of which only the sum is seen.
    mix = np.eye(40)
    mix[0, :2] = mix[1, :2] = 0.5
    rounded = (jacobian @ mix).astype(np.float32) * np.float32(1 / 3)
    assert np.linalg.matrix_rank(rounded) == 39
    information = update_information(rounded * (1 + 6e-8 * rng.normal(size=rounded.shape)), 1.0)
    assert np.linalg.eigvalsh(information)[0] > 0
    assert cramer_rao_bound(information, np.eye(40)[0]) == math.inf
    assert cramer_rao_bound(information, np.eye(40)[2]) < 1.0

  def test_ill_conditioned_is_not_singular(self):
    information = np.diag([1.0, 1e-9])
    assert cramer_rao_bound(information, np.ones(2)) == pytest.approx(0.5 * (1.0 + 1e9))


class TestVanTreesBound:
  @pytest.mark.parametrize('noise', _NOISES)
  def test_the_posterior_mean_meets_it(self, noise):
    release, rng = LinearRelease(noise), np.random.default_rng(4)
    mean, covariance = _prior(rng)
    weights = pixel_weights(REGION, 1)
    prior_information = np.linalg.inv(covariance)
    images = rng.multivariate_normal(mean, covariance, _DRAWS)
    estimates = release.estimates(release.draw(images, rng), mean, prior_information)
    bound = van_trees_bound(release.information, prior_information, weights)
    assert_met(region_errors(estimates, images, weights), bound)
    assert bound < 0.95 * cramer_rao_bound(release.information, weights)

  def test_without_a_release_it_is_the_prior_s_variance(self):
    _, covariance = _prior(np.random.default_rng(5))
    weights = pixel_weights(REGION, 1)
    bound = van_trees_bound(np.zeros((6, 6)), np.linalg.inv(covariance), weights)
    assert bound == pytest.approx(weights @ np.diag(covariance) / weights.sum())

  def test_a_flat_prior_gives_cramer_rao(self):
    information = LinearRelease('isotropic').information
    weights = pixel_weights(REGION, 1)
    bound = van_trees_bound(information, 1e-9 * np.eye(6), weights)
    assert bound == pytest.approx(cramer_rao_bound(information, weights), rel=1e-8)

  def test_needs_prior_information_where_the_release_has_none(self):
    with pytest.raises(ValueError, match='prior_information'):
      van_trees_bound(np.diag([1.0, 0.0]), np.diag([1.0, 0.0]), np.ones(2))


class TestTraceBound:
  @settings(max_examples=60, deadline=None)
  @given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 3.0), rank=st.integers(1, 8))
  def test_never_above_the_exact_one(self, seed, spread, rank):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(rank, 6)) * 10.0 ** rng.uniform(-spread, spread, 6)
    information = update_information(jacobian, 0.3)
    weights = rng.random(6) * (rng.random(6) < 0.7) + 1e-3 * np.eye(6)[0]
    assert trace_bound(information, weights) <= cramer_rao_bound(information, weights) * (1 + 1e-9)
    prior = 0.1 * np.eye(6)
    exact = van_trees_bound(information, prior, weights)
    assert trace_bound(information + prior, weights) <= exact * (1 + 1e-9)

  def test_equal_for_equal_independent_pixels(self):
    assert trace_bound(4.0 * np.eye(3), np.array([1.0, 0.5, 0.0])) == pytest.approx(0.25)

  def test_infinite_without_information_on_the_region(self):
    assert trace_bound(np.diag([1.0, 0.0]), np.array([0.0, 1.0])) == math.inf


class TestArguments:
  @pytest.mark.parametrize(
    ('information', 'weights', 'message'),
    [
      (np.ones((2, 3)), np.ones(2), 'information must be a square'),
      (np.diag([1.0, math.nan]), np.ones(2), 'information must be finite'),
      (np.array([[1.0, 0.5], [0.0, 1.0]]), np.ones(2), 'information must be symmetric'),
      (np.eye(2), np.ones(3), 'information is of 2 pixels, weights of 3'),
      (np.eye(2), np.ones((2, 1)), 'weights must have one dimension'),
      (np.eye(2), np.array([1.0, -1.0]), 'weights must be finite and not negative'),
      (np.eye(2), np.zeros(2), 'weights are zero everywhere'),
    ],
  )
  def test_are_checked(self, information, weights, message):
    for bound in (cramer_rao_bound, trace_bound):
      with pytest.raises(ValueError, match=message):
        bound(information, weights)
    with pytest.raises(ValueError, match=message):
      van_trees_bound(information, np.eye(2), weights)

  def test_of_the_region(self):
    weights = pixel_weights(np.array([[[0.25], [1.0]]]), 2)
    np.testing.assert_array_equal(weights, [0.25, 0.25, 1.0, 1.0])
    with pytest.raises(ValueError, match=r'region must be \[...'):
      pixel_weights(np.ones((4, 4)), 1)
    with pytest.raises(ValueError, match='in'):
      pixel_weights(np.full((2, 2, 1), 1.1), 1)
    with pytest.raises(ValueError, match='zero everywhere'):
      pixel_weights(np.zeros((2, 2, 1)), 1)
    with pytest.raises(ValueError, match='channels'):
      pixel_weights(np.ones((2, 2, 1)), 0)
