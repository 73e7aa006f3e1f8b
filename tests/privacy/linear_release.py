"""Releases y = J x + n whose best attackers are known in closed form."""

import numpy as np

from tff_shadow.privacy import image_noise_variances, through_image_noise, update_information

PIXELS = 6
REGION = np.array([0.0, 0.2, 0.5, 1.0, 1.0, 0.7])[:, None]


class LinearRelease:
  """J [15, 6]; noise per weight, and for 'correlated' noise tau m v in the image beside it."""

  def __init__(self, noise, seed=0):
    rng = np.random.default_rng(seed)
    self.jacobian = rng.normal(size=(15, PIXELS))
    self.variances = 0.04 * np.ones(15)
    if noise == 'diagonal':
      self.variances = rng.uniform(0.01, 0.1, 15)
    self.image_variances = image_noise_variances(REGION, 0.3 if noise == 'correlated' else 0.0, 1)
    root = self.jacobian * np.sqrt(self.image_variances)
    self.covariance = root @ root.T + np.diag(self.variances)

  @property
  def information(self):
    per_weight = update_information(self.jacobian, self.variances)
    return through_image_noise(per_weight, self.image_variances)

  def draw(self, images, rng):
    noise = rng.multivariate_normal(np.zeros(15), self.covariance, len(images))
    return images @ self.jacobian.T + noise

  def estimates(self, released, prior_mean=None, prior_information=None):
    """Posterior means, or generalised least squares without a prior."""
    weighted = np.linalg.solve(self.covariance, self.jacobian)
    precision = self.jacobian.T @ weighted
    projected = released @ weighted
    if prior_information is not None:
      precision = precision + prior_information
      projected = projected + prior_information @ prior_mean
    return np.linalg.solve(precision, projected.T).T


def region_errors(estimates, images, weights):
  """Region mean squared error of each reconstruction."""
  return np.square(estimates - images) @ weights / weights.sum()


def assert_met(errors, bound):
  """The errors' mean is the bound up to sampling error: far within 0.5 dB, a factor of 1.12."""
  standard_error = errors.std(ddof=1) / np.sqrt(len(errors))
  assert standard_error < 0.02 * bound
  assert abs(errors.mean() - bound) < 4 * standard_error
