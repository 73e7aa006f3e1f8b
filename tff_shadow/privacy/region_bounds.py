"""Lower bounds of the squared error of any reconstruction, over the sensitive region.

A client releases y = g(x) + n, n ~ N(0, Sigma), with x the d pixel values of its images and J the
derivative of g. If Sigma is public, the Fisher information of x is exactly I = J^T Sigma^-1 J; g
need not be linear. If Sigma depends on the private image, the true information has one more term,
not negative, so that a bound from I alone is an estimate that errs upward.

Every bound here is of the region's mean squared error sum_p w_p E(x^_p - x_p)^2 / sum_p w_p with
weights w: w = m is the region MSE that scoring reports, w = m^2 is E|M(x^ - x)|^2 / tr(M^2) with
M = diag(m), as `NoiseStrength` has it. For maps of zeros and ones they are one.
"""

import math

import numpy as np

# As in scoring: identical images have an infinite PSNR.
PSNR_CAP_DB = 100.0
_FLOAT32_ROUNDING = float(np.finfo(np.float32).eps)


def region_psnr(mean_squared_error: float) -> float:
  """Region PSNR in dB, images in [0, 1]: -10 log10(mean squared error), at most 100 as in scoring.

  A bound of the expected error becomes one of the PSNR of the mean error. It is not one of the mean
  of PSNRs: -log is convex, so that mean is at least as high (Jensen), and may lie above it.

  Raises:
    ValueError: If the error is negative or NaN; infinity gives -infinity.
  """
  if not mean_squared_error >= 0:
    raise ValueError(f'mean_squared_error must not be negative, found {mean_squared_error}')
  if mean_squared_error <= 10 ** (-PSNR_CAP_DB / 10):
    return PSNR_CAP_DB
  return -10.0 * math.log10(mean_squared_error) if mean_squared_error < math.inf else -math.inf


def mean_squared_error(psnr: float) -> float:
  """The region's mean squared error for a region PSNR in dB, images in [0, 1].

  Raises:
    ValueError: If the PSNR is not finite.
  """
  if not math.isfinite(psnr):
    raise ValueError(f'psnr must be finite, found {psnr}')
  return 10.0 ** (-psnr / 10.0)


def pixel_weights(region: np.ndarray, channels: int) -> np.ndarray:
  """A region map [..., 1] in [0, 1] as weights of the pixel values: float64 [d], d = H W C.

  Raises:
    ValueError: If the map has another form, values outside [0, 1], or is zero everywhere.
  """
  region = np.asarray(region, np.float64)
  if region.ndim < 1 or region.shape[-1] != 1:
    raise ValueError(f'region must be [..., H, W, 1], found {region.shape}')
  if not ((region >= 0) & (region <= 1)).all():
    raise ValueError('region must have values in [0, 1]')
  if channels < 1:
    raise ValueError(f'channels must be at least 1, found {channels}')
  return checked_weights(np.repeat(region, channels, axis=-1).reshape(-1))


def cramer_rao_bound(information: np.ndarray, weights: np.ndarray) -> float:
  """Least error of an attacker without bias: sum w_p [I^-1]_pp / sum w_p (Cramer-Rao).

  Infinity where the release does not identify the region: then no attacker without bias exists,
  and the statement is empty; a biased one may still do well, see `van_trees_bound`. The directions
  that I does not identify are those of eigenvalues up to d 2^-46 (d times the square of float32's
  rounding) of the largest: a float32 J has singular values right to about sqrt(d) 2^-23 of the
  largest, and eigenvalues of I are their squares. The region counts as untouched by them if less
  than the square root of that share of its weight is theirs, more than rounding tilts eigenvectors.

  Args:
    information: [d, d], symmetric, not negative.
    weights: [d], see above.

  Raises:
    ValueError: If an argument has another form.
  """
  information, weights = _checked(information, weights)
  eigenvalues, vectors = np.linalg.eigh(information)
  tolerance = len(weights) * _FLOAT32_ROUNDING**2
  unknown = eigenvalues <= tolerance * max(eigenvalues[-1], 0.0)
  shares = weights @ np.square(vectors) / weights.sum()
  if shares[unknown].sum() > math.sqrt(tolerance):
    return math.inf
  return float((shares[~unknown] / eigenvalues[~unknown]).sum())


def van_trees_bound(
  information: np.ndarray, prior_information: np.ndarray, weights: np.ndarray
) -> float:
  """Least mean error of any attacker, also a biased one that knows the prior of the images.

  sum w_p [(E[I] + I_prior)^-1]_pp / sum w_p, the mean taken over images and noise: the Bayesian
  Cramer-Rao bound (van Trees 1968, section 2.4; Gill and Levit 1995). Needs a prior whose density
  is smooth and vanishes at the border of its support. Met with equality if g is linear and the
  prior Gaussian. It is as good as the prior information: see `prior.fit_gaussian_prior` for which
  way that errs.

  Args:
    information: [d, d], the mean of I over images of the prior.
    prior_information: [d, d], positive definite.
    weights: [d].

  Raises:
    ValueError: If an argument has another form or the sum is not positive definite.
  """
  information, weights = _checked(information, weights)
  prior_information, _ = _checked(prior_information, weights, 'prior_information')
  try:
    factor = np.linalg.cholesky(information + prior_information)
  except np.linalg.LinAlgError:
    raise ValueError('prior_information must make the sum positive definite') from None
  inverse = np.linalg.inv(factor)
  return float(np.square(inverse).sum(axis=0) @ weights / weights.sum())


def trace_bound(information: np.ndarray, weights: np.ndarray) -> float:
  """The bound sum w_p / sum w_p I_pp: never above that by the inverse, needs the diagonal only.

  By Cauchy-Schwarz tr(M^2)^2 <= tr(M I^-1 M) tr(M I M), M = diag(sqrt(w)). Given I it is a bound
  for attackers without bias, given E[I] + I_prior one for any attacker.

  Args:
    information: [d, d].
    weights: [d].

  Returns:
    Infinity if the information is zero on the whole region.

  Raises:
    ValueError: If an argument has another form.
  """
  information, weights = _checked(information, weights)
  total = float(weights @ np.diag(information))
  return float(weights.sum()) / total if total > 0 else math.inf


def checked_weights(weights: np.ndarray) -> np.ndarray:
  """Weights as float64 [d].

  Raises:
    ValueError: If they are not finite, one is negative, or all are zero.
  """
  weights = np.asarray(weights, np.float64)
  if weights.ndim != 1:
    raise ValueError(f'weights must have one dimension, found shape {weights.shape}')
  if not (np.isfinite(weights).all() and (weights >= 0).all()):
    raise ValueError('weights must be finite and not negative')
  if not weights.any():
    raise ValueError('weights are zero everywhere: there is no region to bound the error of')
  return weights


def checked_information(information: np.ndarray, name: str = 'information') -> np.ndarray:
  """A symmetric finite matrix as float64 [d, d].

  Raises:
    ValueError: If it is something else.
  """
  information = np.asarray(information, np.float64)
  if information.ndim != 2 or information.shape[0] != information.shape[1]:
    raise ValueError(f'{name} must be a square matrix, found shape {information.shape}')
  if not np.isfinite(information).all():
    raise ValueError(f'{name} must be finite')
  if not np.allclose(information, information.T, rtol=1e-6, atol=1e-9 * np.abs(information).max()):
    raise ValueError(f'{name} must be symmetric')
  return information


def _checked(information, weights, name='information'):
  information, weights = checked_information(information, name), checked_weights(weights)
  if len(information) != len(weights):
    raise ValueError(f'{name} is of {len(information)} pixels, weights of {len(weights)}')
  return information, weights
