"""Distances between a reconstruction and the true image, over the image and over its region.

Images are [H, W, C] with values in [0, 1]; regions are [H, W, 1] with values in [0, 1], the weight
of each pixel. Everything is computed in float64. No image is rescaled or clipped before measuring.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from skimage import metrics as skimage_metrics

# Identical images have an infinite PSNR, which no mean survives; 100 dB is an error of 1e-10.
PSNR_CAP_DB = 100.0
# Side of the uniform SSIM window: scikit-image's default, and the smallest image it can measure.
SSIM_WINDOW = 7
# Relative to less than this, a difference of SSIMs says nothing.
MIN_PRIOR_SSIM = 0.01

# From two images [H, W, C] to their distance and its map [H, W]; `attacks.scoring.lpips.Lpips`.
Perceptual = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Quality:
  """The metrics of one reconstruction against one true image.

  Attributes:
    mse: Mean squared error over pixels and channels.
    psnr: dB, for a data range of 1, at most `PSNR_CAP_DB`.
    ssim: Mean structural similarity, -1 to 1.
    region_mse: As `mse`, weighted by the region; None where the region is zero everywhere.
    region_psnr: dB, from `region_mse`; None as above.
    region_ssim: Mean of the SSIM map weighted by the region; None as above.
    lpips: Perceptual distance, lower is closer; None where no weights were given.
    region_lpips: Mean of the map of `lpips` weighted by the region; None as both above.
  """

  mse: float
  psnr: float
  ssim: float
  region_mse: float | None
  region_psnr: float | None
  region_ssim: float | None
  lpips: float | None = None
  region_lpips: float | None = None

  @property
  def closeness(self) -> float:
    """Region PSNR, and PSNR where there is no region, in dB."""
    return self.psnr if self.region_psnr is None else self.region_psnr


METRIC_NAMES = tuple(field.name for field in dataclasses.fields(Quality))


def measure(
  reconstruction: np.ndarray,
  truth: np.ndarray,
  region: np.ndarray,
  perceptual: Perceptual | None = None,
) -> Quality:
  """All metrics of `reconstruction` [H, W, C] against `truth` [H, W, C] over `region` [H, W, 1].

  LPIPS only where `perceptual` is given.

  Raises:
    ValueError: If the shapes differ, a value is not finite, or a side is under `SSIM_WINDOW`.
    UserError: If the images do not suit `perceptual`.
  """
  reconstruction, truth = _checked_pair(reconstruction, truth)
  region = _checked_region(region, truth.shape)
  error = (reconstruction - truth) ** 2
  mse = float(error.mean())
  mean_ssim, ssim_map = structural_similarity(reconstruction, truth)
  region_mse = _weighted_mean(error, region)
  lpips, region_lpips = None, None
  if perceptual is not None:
    lpips, lpips_map = perceptual(reconstruction, truth)
    region_lpips = _weighted_mean(lpips_map[..., None], region)
  return Quality(
    mse=mse,
    psnr=psnr_from_mse(mse),
    ssim=mean_ssim,
    region_mse=region_mse,
    region_psnr=None if region_mse is None else psnr_from_mse(region_mse),
    region_ssim=_weighted_mean(ssim_map, region),
    lpips=lpips,
    region_lpips=region_lpips,
  )


def relative_data_leakage(ssim: float, prior_ssim: float) -> float | None:
  """RDLV: by which share a reconstruction's SSIM exceeds that of a public image, the prior.

  (SSIM(x, reconstruction) - SSIM(x, prior)) / SSIM(x, prior), of A. Hatamizadeh et al., "Do
  gradient inversion attacks make federated learning unsafe?", IEEE TMI 2023; above 0 where the
  update gave something away. None where the prior's SSIM is under `MIN_PRIOR_SSIM`: near 0 the
  ratio explodes, and below it turns its sign.
  """
  return (ssim - prior_ssim) / prior_ssim if prior_ssim >= MIN_PRIOR_SSIM else None


def psnr_from_mse(mse: float) -> float:
  """Peak signal-to-noise ratio in dB for a data range of 1: -10 log10(mse), at most the cap."""
  return PSNR_CAP_DB if mse <= 10 ** (-PSNR_CAP_DB / 10) else -10 * math.log10(mse)


def structural_similarity(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
  """SSIM (Wang et al. 2004) as scikit-image computes it by default: 7x7 uniform window.

  Returns:
    The mean, which leaves out a border of 3 pixels where the window is cut off, and the whole map
    [H, W, C], whose border is computed on mirrored pixels. A region mean uses the whole map, so
    that a region at the border counts; over a region of ones it differs slightly from the mean.
  """
  first, second = _checked_pair(first, second)
  if min(first.shape[:2]) < SSIM_WINDOW:
    raise ValueError(
      f'image of {first.shape[0]}x{first.shape[1]} pixels is smaller than the SSIM window '
      f'of {SSIM_WINDOW}x{SSIM_WINDOW}'
    )
  mean, ssim_map = skimage_metrics.structural_similarity(
    first, second, win_size=SSIM_WINDOW, data_range=1.0, channel_axis=-1, full=True
  )
  return float(mean), ssim_map


def _weighted_mean(values: np.ndarray, region: np.ndarray) -> float | None:
  weight = region.sum() * values.shape[-1]
  return float((region * values).sum() / weight) if weight > 0 else None


def _checked_pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if first.shape != second.shape or first.ndim != 3:
    raise ValueError(f'images must share one shape [H, W, C], found {first.shape}, {second.shape}')
  if not (np.isfinite(first).all() and np.isfinite(second).all()):
    raise ValueError('images must be finite')
  return first, second


def _checked_region(region: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
  region = np.asarray(region, np.float64)
  if region.shape != (*image_shape[:2], 1):
    raise ValueError(f'region must have shape {(*image_shape[:2], 1)}, found {region.shape}')
  if not np.isfinite(region).all() or region.min() < 0 or region.max() > 1:
    raise ValueError('region must hold values in [0, 1]')
  return region
