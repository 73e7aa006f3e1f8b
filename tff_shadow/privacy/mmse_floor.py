"""What frozen region noise leaves hidden from any attacker, after any number of rounds.

A client trains on x' = x + tau m v, with v drawn once per image and m public. All that it ever
sends is computed from x' (and from independent noise), so no attacker's mean region error is below
the MMSE: the error of the posterior mean of x given x'. The MMSE depends on the prior of images,
which nobody knows; it is enclosed here by a number that errs upward and one that errs downward.

Variances are per pixel value, tau^2 m^2 of `information.image_noise_variances`; where they are 0
the attacker sees the pixel itself. Weights are as in `region_bounds`.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from tff_shadow.privacy.prior import fit_gaussian_prior
from tff_shadow.privacy.region_bounds import checked_information, checked_weights

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class GalleryFloor:
  """Mean MMSE over random galleries, with a 95 % confidence interval (Student's t).

  Attributes:
    mean: Region mean squared error.
    low: Lower end, at least 0.
    high: Upper end.
    galleries: Number of galleries, which share no image.
  """

  mean: float
  low: float
  high: float
  galleries: int


@dataclasses.dataclass(frozen=True)
class MmseFloor:
  """An enclosure of the region mean squared error that frozen noise guarantees.

  Attributes:
    gallery: Errs downward: its `low` may be stated as a floor (with its confidence, for attackers
      whose images come as the public ones do).
    gaussian: Errs upward: among all priors with the same covariance the Gaussian's MMSE is the
      largest. An attacker with a better prior gets below it.
    unbiased: The error of x' itself, and the least of any attacker without bias.
  """

  gallery: GalleryFloor
  gaussian: float
  unbiased: float


def mmse_floor(
  images: np.ndarray,
  weights: np.ndarray,
  variances: np.ndarray,
  *,
  gallery_size: int,
  draws: int,
  seed: int,
) -> MmseFloor:
  """All three numbers of one noise, with the prior from public images.

  Args:
    images: [n, ...] in [0, 1], public, independent draws of the prior; d values each.
    weights: [d].
    variances: [d] of the noise.
    gallery_size: See `gallery_floor`.
    draws: See `gallery_floor`.
    seed: See `gallery_floor`.

  Raises:
    ValueError: If an argument has another form.
  """
  return MmseFloor(
    gallery_floor(images, weights, variances, gallery_size=gallery_size, draws=draws, seed=seed),
    gaussian_floor(fit_gaussian_prior(images).information(), weights, variances),
    unbiased_floor(weights, variances),
  )


def unbiased_floor(weights: np.ndarray, variances: np.ndarray) -> float:
  """The mean of the variances over the region: sum w_p tau^2 m_p^2 / sum w_p.

  With w = m^2 it is tau^2 tr(M^4) / tr(M^2), as in `NoiseStrength`.

  Raises:
    ValueError: If an argument has another form.
  """
  weights, variances = _checked(weights, variances)
  return float(weights @ variances / weights.sum())


def gaussian_floor(
  prior_information: np.ndarray, weights: np.ndarray, variances: np.ndarray
) -> float:
  """The MMSE for a Gaussian prior: sum w_p [(C^-1 + D^-1)^-1]_pp / sum w_p, D = diag(variances).

  It is the error of the best linear estimate for every prior with covariance C, hence at least the
  MMSE of that prior: it errs upward (and by what the estimated C is wrong).

  Args:
    prior_information: C^-1, [d, d], positive definite.
    weights: [d].
    variances: [d].

  Raises:
    ValueError: If an argument has another form.
  """
  weights, variances = _checked(weights, variances)
  prior_information = checked_information(prior_information, 'prior_information')
  if len(prior_information) != len(weights):
    raise ValueError(
      f'prior_information is of {len(prior_information)} pixels, weights of {len(weights)}'
    )
  noise = np.sqrt(variances)
  # D^(1/2) (1 + D^(1/2) C^-1 D^(1/2))^-1 D^(1/2): variances may be 0.
  factor = np.linalg.cholesky(np.eye(len(noise)) + noise[:, None] * prior_information * noise)
  diagonal = np.square(np.linalg.inv(factor)).sum(axis=0)
  return float(weights @ (variances * diagonal) / weights.sum())


def gallery_floor(
  images: np.ndarray,
  weights: np.ndarray,
  variances: np.ndarray,
  *,
  gallery_size: int,
  draws: int,
  seed: int,
) -> GalleryFloor:
  """The mean MMSE for priors that are uniform over a few public images: errs downward.

  Given one gallery the posterior is exact. The MMSE is a minimum, over estimators, of errors linear
  in the prior, so it is concave in it; galleries are independent draws of the true prior, so their
  mean MMSE is at most the true one (Jensen). It grows with the gallery. Safe, but soon vacuous: as
  soon as the noise is too small to confuse one image of the gallery with another it is 0, and so it
  is where a pixel without noise tells them apart.

  Args:
    images: [n, ...] in [0, 1]; split at random into galleries that share no image.
    weights: [d].
    variances: [d].
    gallery_size: Images in a gallery; there must be enough for two galleries.
    draws: Of the noise, per image.
    seed: Of split and noise.

  Raises:
    ValueError: If an argument has another form or there are too few images.
  """
  weights, variances = _checked(weights, variances)
  images = np.asarray(images, np.float64)
  flat = images.reshape(len(images), -1)
  if flat.shape[1] != len(weights):
    raise ValueError(f'images have {flat.shape[1]} values each, weights {len(weights)}')
  if gallery_size < 1 or draws < 1:
    raise ValueError(f'gallery_size and draws must be at least 1, found {gallery_size}, {draws}')
  galleries = len(flat) // gallery_size
  if galleries < 2:
    raise ValueError(
      f'gallery_size must leave two galleries of {len(flat)} images, found {gallery_size}'
    )
  rng = np.random.default_rng(seed)
  split = rng.permutation(len(flat))[: galleries * gallery_size].reshape(galleries, -1)
  errors = [_gallery_mmse(flat[members], weights, variances, draws, rng) for members in split]
  mean = float(np.mean(errors))
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, galleries - 1) * stats.sem(errors))
  return GalleryFloor(mean, max(0.0, mean - half), mean + half, galleries)


def _gallery_mmse(gallery, weights, variances, draws, rng) -> float:
  """Mean posterior variance over the region, images taken in turn, noise drawn."""
  noisy = variances > 0
  scaled = gallery[:, noisy] / np.sqrt(variances[noisy])
  squares = np.square(scaled).sum(axis=1)
  total = 0.0
  for index, image in enumerate(gallery):
    seen = scaled[index] + rng.standard_normal((draws, scaled.shape[1]))
    # Terms of |seen|^2 are the same for every image of the gallery.
    log_posterior = seen @ scaled.T - 0.5 * squares
    same = (gallery[:, ~noisy] == image[~noisy]).all(axis=1)
    log_posterior[:, ~same] = -math.inf
    posterior = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    # Relative to the image, so that what is certain cancels to 0.
    offsets = gallery - image
    variance = posterior @ np.square(offsets) - np.square(posterior @ offsets)
    total += float((np.maximum(variance, 0.0) @ weights).mean())
  return total / (len(gallery) * weights.sum())


def _checked(weights, variances):
  weights, variances = checked_weights(weights), np.asarray(variances, np.float64)
  if variances.shape != weights.shape:
    raise ValueError(f'variances must be [{len(weights)}], found shape {variances.shape}')
  if not ((variances >= 0) & np.isfinite(variances)).all():
    raise ValueError('variances must be finite and not negative')
  return weights, variances
