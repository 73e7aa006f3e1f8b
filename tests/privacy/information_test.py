import numpy as np
import pytest

from tests.privacy.linear_release import REGION, LinearRelease
from tff_shadow.privacy import (
  cramer_rao_bound,
  image_noise_variances,
  information_after_rounds,
  pixel_weights,
  spread_information,
  through_image_noise,
  unbiased_floor,
  update_information,
)


def _explicit(release):
  return release.jacobian.T @ np.linalg.solve(release.covariance, release.jacobian)


class TestUpdateInformation:
  @pytest.mark.parametrize('noise', ['isotropic', 'diagonal'])
  def test_is_the_definition(self, noise):
    release = LinearRelease(noise)
    np.testing.assert_allclose(release.information, _explicit(release), rtol=1e-10)

  def test_rows_in_pieces(self):
    jacobian = np.random.default_rng(0).normal(size=(9000, 3)).astype(np.float32)
    variances = np.linspace(1.0, 2.0, 9000)
    wide = jacobian.astype(np.float64)
    expected = wide.T @ (wide / variances[:, None])
    np.testing.assert_allclose(update_information(jacobian, variances), expected, rtol=1e-12)

  def test_arguments(self):
    for variances in (0.0, -1.0, np.inf, np.array([1.0, 0.0])):
      with pytest.raises(ValueError, match='variances must be finite and above 0'):
        update_information(np.ones((2, 3)), variances)
    with pytest.raises(ValueError, match='one or 2'):
      update_information(np.ones((2, 3)), np.ones(3))
    with pytest.raises(ValueError, match='jacobian'):
      update_information(np.ones(3), 1.0)


class TestSpreadInformation:
  def test_is_the_definition(self):
    rng = np.random.default_rng(0)
    jacobian, spread = rng.normal(size=(9, 4)), rng.normal(size=(3, 9))
    covariance = 0.3 * np.eye(9) + 2.5 * spread.T @ spread
    information = spread_information(
      jacobian.T @ jacobian, spread @ jacobian, spread @ spread.T, 0.3, 2.5
    )
    expected = jacobian.T @ np.linalg.solve(covariance, jacobian)
    np.testing.assert_allclose(information, expected, rtol=1e-10, atol=1e-12)

  def test_arguments(self):
    plain, shared, products = np.eye(2), np.ones((3, 2)), np.eye(3)
    with pytest.raises(ValueError, match='shared must be'):
      spread_information(plain, shared.T, products, 1.0, 1.0)
    for floor, scale in ((0.0, 1.0), (1.0, -1.0), (np.inf, 1.0), (1.0, np.nan)):
      with pytest.raises(ValueError, match='floor must be above 0'):
        spread_information(plain, shared, products, floor, scale)
    with pytest.raises(ValueError, match='products must be'):
      spread_information(plain, shared, shared, 1.0, 1.0)


class TestThroughImageNoise:
  def test_is_the_correlated_shape_on_its_floor(self):
    release = LinearRelease('correlated')
    np.testing.assert_allclose(release.information, _explicit(release), rtol=1e-10)

  def test_stays_right_on_a_floor_near_zero(self):
    release = LinearRelease('isotropic')
    variances = np.linspace(0.01, 0.06, 6)
    left = through_image_noise(update_information(release.jacobian, 1e-14), variances)
    np.testing.assert_allclose(left, np.diag(1.0 / variances), rtol=1e-9, atol=1e-9)

  def test_singular_information_and_pixels_without_noise(self):
    information = update_information(np.array([[1.0, 1.0, 0.0]]), 0.5)
    left = through_image_noise(information, np.array([0.5, 0.0, 3.0]))
    # y = x_0 + n_0 + x_1 + z: variance 1 instead of 0.5.
    np.testing.assert_allclose(left, 0.5 * information, atol=1e-15)

  def test_arguments(self):
    with pytest.raises(ValueError, match=r'variances must be \[2\]'):
      through_image_noise(np.eye(2), np.ones(3))
    with pytest.raises(ValueError, match='variances must be finite'):
      through_image_noise(np.eye(2), np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match='information must be symmetric'):
      through_image_noise(np.array([[1.0, 2.0], [0.0, 1.0]]), np.ones(2))
    with pytest.raises(ValueError, match='tau'):
      image_noise_variances(REGION, -0.1, 1)

  def test_variances_repeat_over_channels(self):
    variances = image_noise_variances(np.array([[[0.5], [1.0]]]), 0.2, 3)
    np.testing.assert_allclose(variances, [0.01] * 3 + [0.04] * 3)


class TestRounds:
  def test_fresh_noise_averages_out(self):
    release, weights = LinearRelease('correlated'), pixel_weights(REGION, 1)
    per_weight = update_information(release.jacobian, release.variances)
    for kwargs in ({}, {'image_variances': release.image_variances, 'frozen': False}):
      one, ten = (
        cramer_rao_bound(information_after_rounds(per_weight, rounds, **kwargs), weights)
        for rounds in (1, 10)
      )
      assert ten == pytest.approx(one / 10, rel=1e-9)

  def test_frozen_noise_has_a_floor(self):
    release, weights = LinearRelease('correlated'), pixel_weights(REGION, 1)
    per_weight = update_information(release.jacobian, release.variances)
    bounds = [
      cramer_rao_bound(
        information_after_rounds(per_weight, rounds, image_variances=release.image_variances),
        weights,
      )
      for rounds in (1, 10, 10**8)
    ]
    floor = unbiased_floor(weights, release.image_variances)
    assert bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] == pytest.approx(floor, rel=1e-6)

  def test_ten_rounds_of_frozen_noise_by_hand(self):
    release, rounds = LinearRelease('correlated'), 10
    stacked = np.tile(release.jacobian, (rounds, 1))
    covariance = stacked * release.image_variances @ stacked.T
    covariance += np.diag(np.tile(release.variances, rounds))
    found = information_after_rounds(
      update_information(release.jacobian, release.variances),
      rounds,
      image_variances=release.image_variances,
    )
    np.testing.assert_allclose(found, stacked.T @ np.linalg.solve(covariance, stacked), rtol=1e-8)

  def test_arguments(self):
    with pytest.raises(ValueError, match='rounds must be at least 1, found 0'):
      information_after_rounds(np.eye(2), 0)
