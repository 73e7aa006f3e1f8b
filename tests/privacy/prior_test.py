import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from tff_shadow.privacy import fit_gaussian_prior


def _images(count, seed=0):
  rng = np.random.default_rng(seed)
  root = rng.normal(0, 0.1, (12, 12)) * np.linspace(0.1, 1.5, 12)
  return 0.5 + (rng.normal(size=(count, 12)) @ root.T).reshape(count, 3, 4, 1), root @ root.T


class TestFit:
  @pytest.mark.parametrize('count', [3, 40])
  def test_is_the_inverse_of_scikit_learn_s_covariance(self, count):
    images, _ = _images(count)
    prior = fit_gaussian_prior(images)
    expected = LedoitWolf().fit(images.reshape(count, -1))
    np.testing.assert_allclose(prior.mean, expected.location_)
    information = prior.information()
    np.testing.assert_allclose(information @ expected.covariance_, np.eye(12), atol=1e-8)

  def test_products_without_the_matrix(self):
    prior = fit_gaussian_prior(_images(6)[0])
    vector = np.random.default_rng(1).normal(size=12)
    information = prior.information()
    np.testing.assert_allclose(prior.multiply_information(vector), information @ vector)
    back = prior.multiply_covariance(information @ vector)
    np.testing.assert_allclose(back, vector, rtol=1e-9)

  def test_many_images_find_the_true_covariance(self):
    images, covariance = _images(20000)
    found = np.linalg.inv(fit_gaussian_prior(images).information())
    assert np.abs(found - covariance).max() < 0.05 * np.abs(covariance).max()

  def test_arguments(self):
    with pytest.raises(ValueError, match='at least three'):
      fit_gaussian_prior(np.random.default_rng(0).random((2, 4, 4, 1)))
    with pytest.raises(ValueError, match='finite'):
      fit_gaussian_prior(np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match='all the same'):
      fit_gaussian_prior(np.full((3, 4), 0.5))
