"""What an attacker knows of the images beforehand, as a Gaussian fitted to public ones."""

import dataclasses

import numpy as np
from sklearn.covariance import ledoit_wolf_shrinkage


@dataclasses.dataclass(frozen=True)
class GaussianPrior:
  """N(mean, C) with C diagonal in an orthonormal basis, one variance outside of its span.

  Attributes:
    mean: float64 [d].
    components: float64 [r, d], orthonormal rows.
    variances: float64 [r], along the components.
    remaining_variance: In every direction orthogonal to them, above 0.
  """

  mean: np.ndarray
  components: np.ndarray
  variances: np.ndarray
  remaining_variance: float

  def multiply_covariance(self, vector: np.ndarray) -> np.ndarray:
    """C v for v [d]."""
    return self._multiply(vector, self.variances, self.remaining_variance)

  def multiply_information(self, vector: np.ndarray) -> np.ndarray:
    """C^-1 v for v [d]."""
    return self._multiply(vector, 1.0 / self.variances, 1.0 / self.remaining_variance)

  def information(self) -> np.ndarray:
    """C^-1 as float64 [d, d]."""
    remaining = 1.0 / self.remaining_variance
    scaled = self.components.T * (1.0 / self.variances - remaining)
    return scaled @ self.components + remaining * np.eye(len(self.mean))

  def _multiply(self, vector, along, remaining):
    scaled = (along - remaining) * (self.components @ vector)
    return remaining * np.asarray(vector, np.float64) + self.components.T @ scaled


def fit_gaussian_prior(images: np.ndarray) -> GaussianPrior:
  """Fits a Gaussian with the covariance of Ledoit and Wolf (2004) to public images.

  The van Trees bound takes the prior's location information, and C^-1 stands in for it. Of all
  priors with covariance C the Gaussian has the least information (its Cramer-Rao bound is met; Stam
  1959), so for real images, which are not Gaussian, the true one is larger and the bound smaller:
  what `van_trees_bound` gives with this prior is an ESTIMATE THAT ERRS UPWARD, no guarantee.
  Shrinkage adds an error of its own, of either sign.

  A conservative one needs an upper limit of the prior's information. Images lie near a thin set, so
  there is none of use: of the prior smoothed by noise of variance s^2 it is 1/s^2 less the mean
  posterior variance over s^4 (Tweedie's formula), hence a learned denoiser, whose error is above
  the posterior's, errs in this same direction. See `mmse_floor.gallery_floor` for a safe number.

  Args:
    images: [n, ...] in [0, 1], at least three and not all the same; d values each.

  Returns:
    The prior; never singular, also for fewer images than pixels.

  Raises:
    ValueError: If there are too few images, they are not finite or all the same.
  """
  images = np.asarray(images, np.float64)
  # Two deviate from their mean by the same vector: no shrinkage, and a singular covariance.
  if images.ndim < 2 or len(images) < 3:
    raise ValueError(f'images must be at least three, [n, ...], found shape {images.shape}')
  if not np.isfinite(images).all():
    raise ValueError('images must be finite')
  flat = images.reshape(len(images), -1)
  mean = flat.mean(axis=0)
  centered = flat - mean
  _, singular, components = np.linalg.svd(centered, full_matrices=False)
  variances = np.square(singular) / len(flat)
  mean_variance = variances.sum() / flat.shape[1]
  if not mean_variance > 0:
    raise ValueError('images are all the same: they tell nothing of how images differ')
  shrinkage = ledoit_wolf_shrinkage(centered, assume_centered=True)
  remaining = shrinkage * mean_variance
  return GaussianPrior(mean, components, (1.0 - shrinkage) * variances + remaining, remaining)
