import numpy as np
import pytest
import tensorflow as tf

from tests.privacy.linear_release import REGION, assert_met, region_errors
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.privacy import (
  fit_gaussian_prior,
  gallery_floor,
  gaussian_floor,
  image_noise_variances,
  mmse_floor,
  pixel_weights,
  region_psnr,
  unbiased_floor,
  van_trees_bound,
)


def _two_point_images(count, seed=0):
  """One pixel, 0.3 or 0.7, and noise for which both are plausible."""
  return np.random.default_rng(seed).choice([0.3, 0.7], (count, 1))


def _two_point_mmse(deviation):
  """By quadrature of the posterior variance over x', given x = 0.3."""
  nodes, node_weights = np.polynomial.hermite_e.hermegauss(80)
  seen = 0.3 + deviation * nodes
  odds = np.exp((np.square(seen - 0.3) - np.square(seen - 0.7)) / (2 * deviation**2))
  upper = odds / (1 + odds)
  return node_weights @ (0.16 * upper * (1 - upper)) / node_weights.sum()


class TestGaussianFloor:
  def test_the_best_attacker_on_gaussian_images_meets_it(self):
    rng = np.random.default_rng(0)
    root = rng.normal(0, 0.2, (6, 6))
    covariance = root @ root.T
    variances, weights = image_noise_variances(REGION, 0.3, 1), pixel_weights(REGION, 1)
    images = rng.multivariate_normal(np.zeros(6), covariance, 6000)
    noised = images + np.sqrt(variances) * rng.normal(size=images.shape)
    gain = np.linalg.solve(covariance + np.diag(variances), covariance)
    bound = gaussian_floor(np.linalg.inv(covariance), weights, variances)
    assert_met(region_errors(noised @ gain, images, weights), bound)
    assert bound < 0.9 * unbiased_floor(weights, variances)

  def test_is_van_trees_of_x_prime(self):
    prior = np.diag([3.0, 1.0]) + 0.5
    variances, weights = np.array([0.1, 0.4]), np.array([1.0, 0.5])
    expected = van_trees_bound(np.diag(1 / variances), prior, weights)
    assert gaussian_floor(prior, weights, variances) == pytest.approx(expected)

  def test_a_pixel_without_noise_is_known_and_tells_of_its_neighbour(self):
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    found = gaussian_floor(np.linalg.inv(covariance), np.ones(2), np.array([0.0, 1e9]))
    assert found == pytest.approx(0.5 * (1 - 0.81), rel=1e-6)


class TestUnbiasedFloor:
  @pytest.mark.parametrize('psnr', [8.0, 14.0])
  def test_is_what_noise_strength_promises(self, psnr):
    weights = np.square(pixel_weights(REGION, 1))
    squared_scale = NoiseStrength('region_psnr', psnr).squared_scale(
      'correlated',
      update_energy=tf.constant(1.0),
      image_energy=tf.constant(1.0),
      shape_energy=tf.constant(1.0),
      sensitivity_energy=tf.constant(1.0),
      region_energy=tf.constant(np.sum(REGION**2), tf.float32),
      region_fourth_moment=tf.constant(np.sum(REGION**4), tf.float32),
      num_weights=3,
    )
    variances = image_noise_variances(REGION, float(np.sqrt(squared_scale)), 1)
    assert region_psnr(unbiased_floor(weights, variances)) == pytest.approx(psnr, abs=1e-4)


class TestGalleryFloor:
  def test_is_below_the_true_mmse_and_grows_towards_it(self):
    images, noise = _two_point_images(6000), 0.2
    expected = _two_point_mmse(noise)
    floors = [
      gallery_floor(images, np.ones(1), np.array([noise**2]), gallery_size=size, draws=4, seed=1)
      for size in (1, 2, 4, 40)
    ]
    means = [floor.mean for floor in floors]
    assert means[0] == 0.0
    assert means == sorted(means)
    # Two images are the same half of the time.
    assert floors[1].low < 0.5 * expected < floors[1].high
    assert floors[1].high - floors[1].low < 0.1 * expected
    assert 0.93 * expected < means[3] < 1.02 * expected
    gaussian = gaussian_floor(np.array([[1 / 0.04]]), np.ones(1), np.array([noise**2]))
    assert gaussian > 1.1 * expected

  def test_the_posterior_mean_of_two_images_errs_as_much(self):
    rng = np.random.default_rng(2)
    pair = rng.random((2, 3)) * 0.4
    variances, weights = np.array([0.04, 0.09, 0.01]), np.array([1.0, 0.2, 0.7])
    truth = rng.integers(0, 2, 20000)
    noised = pair[truth] + np.sqrt(variances) * rng.normal(size=(20000, 3))
    posterior = np.exp(-0.5 * (np.square(noised[:, None] - pair) / variances).sum(axis=2))
    estimates = (posterior / posterior.sum(axis=1, keepdims=True)) @ pair
    errors = region_errors(estimates, pair[truth], weights)
    # Galleries of two hold both images half of the time, else one image twice.
    images = pair[rng.integers(0, 2, 8000)]
    found = gallery_floor(images, weights, variances, gallery_size=2, draws=2, seed=0)
    assert found.mean == pytest.approx(0.5 * errors.mean(), rel=0.06)

  def test_vacuous_for_small_noise_or_a_pixel_without(self):
    images = np.random.default_rng(3).random((40, 4))
    kwargs = {'gallery_size': 10, 'draws': 3, 'seed': 0}
    for variances in (np.full(4, 1e-6), np.array([10.0, 10.0, 10.0, 0.0])):
      floor = gallery_floor(images, np.ones(4), variances, **kwargs)
      assert (floor.mean, floor.low, floor.galleries) == (pytest.approx(0.0, abs=1e-12), 0.0, 4)
    # Where that pixel is the same in all it tells nothing.
    images[:, 3] = 0.5
    floor = gallery_floor(images, np.ones(4), np.array([10.0, 10.0, 10.0, 0.0]), **kwargs)
    assert floor.low > 0.02

  def test_arguments(self):
    valid = {'gallery_size': 2, 'draws': 1, 'seed': 0}
    for changed, message in (
      ({'gallery_size': 3}, 'gallery_size must leave two galleries of 4 images, found 3'),
      ({'gallery_size': 0}, 'gallery_size and draws'),
      ({'draws': 0}, 'gallery_size and draws'),
    ):
      with pytest.raises(ValueError, match=message):
        gallery_floor(np.ones((4, 2)), np.ones(2), np.ones(2), **{**valid, **changed})
    with pytest.raises(ValueError, match='images have 3 values'):
      gallery_floor(np.ones((4, 3)), np.ones(2), np.ones(2), **valid)
    with pytest.raises(ValueError, match=r'variances must be \[2\]'):
      unbiased_floor(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match='variances must be finite'):
      unbiased_floor(np.ones(2), -np.ones(2))
    with pytest.raises(ValueError, match='prior_information'):
      gaussian_floor(np.eye(3), np.ones(2), np.ones(2))


def test_mmse_floor_is_all_three_in_their_order():
  images = np.random.default_rng(4).random((60, 2, 3, 1)) ** 3
  weights, variances = pixel_weights(REGION, 1), image_noise_variances(REGION, 0.4, 1)
  kwargs = {'gallery_size': 20, 'draws': 5, 'seed': 7}
  floor = mmse_floor(images, weights, variances, **kwargs)
  assert floor.gallery == gallery_floor(images, weights, variances, **kwargs)
  prior = fit_gaussian_prior(images).information()
  assert floor.gaussian == gaussian_floor(prior, weights, variances)
  assert floor.gallery.high < floor.gaussian < floor.unbiased
