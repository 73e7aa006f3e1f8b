import numpy as np
import pytest
from skimage import metrics as skimage_metrics

from attacks.scoring import metrics
from tests.attacks import synthetic_run


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [7, 32, 60])
def test_agrees_with_scikit_image(channels, size):
  truth = synthetic_run.photographs(1, size, channels)[0]
  other = synthetic_run.noisy(truth[None], np.array([0.1]), seed=3)[0]
  found = metrics.measure(other, truth, np.ones((size, size, 1), np.float32))
  expected_ssim = skimage_metrics.structural_similarity(
    truth, other, data_range=1.0, channel_axis=-1
  )
  assert found.psnr == pytest.approx(
    skimage_metrics.peak_signal_noise_ratio(truth, other, data_range=1.0), abs=1e-4
  )
  assert found.ssim == pytest.approx(expected_ssim, abs=1e-4)
  assert found.mse == pytest.approx(skimage_metrics.mean_squared_error(truth, other), rel=1e-5)


def test_known_values():
  truth = np.zeros((8, 8, 1))
  found = metrics.measure(truth + 0.1, truth, np.ones((8, 8, 1)))
  assert found.mse == pytest.approx(0.01)
  assert found.psnr == pytest.approx(20.0)
  # Two flat images: no variance, so SSIM is its luminance term (C1 / (0.1^2 + C1)), C1 = 1e-4.
  assert found.ssim == pytest.approx(1e-4 / (0.01 + 1e-4))
  assert found.region_psnr == pytest.approx(20.0)


def test_identical_images_reach_the_cap():
  image = synthetic_run.photographs(1, 16, 3)[0]
  found = metrics.measure(image, image, np.ones((16, 16, 1)))
  assert (found.mse, found.psnr, found.region_psnr) == (0.0, 100.0, 100.0)
  assert found.ssim == pytest.approx(1.0)


def test_region_weights_every_channel():
  truth = np.zeros((8, 8, 3))
  image = truth.copy()
  image[:4, :, 0] = 0.4
  image[4:] = 1.0
  region = np.zeros((8, 8, 1))
  region[:4] = 0.5
  found = metrics.measure(image, truth, region)
  assert found.region_mse == pytest.approx(0.4**2 / 3)
  assert found.region_psnr == pytest.approx(-10 * np.log10(0.16 / 3))
  assert found.mse == pytest.approx((0.16 / 3 + 1) / 2)


def test_soft_region_weights_add_up():
  truth = np.zeros((8, 8, 1))
  image = truth.copy()
  image[0, 0] = 1.0
  region = np.full((8, 8, 1), 0.25)
  region[0, 0] = 1.0
  assert metrics.measure(image, truth, region).region_mse == pytest.approx(1 / (1 + 63 * 0.25))


def test_region_ssim_sees_only_the_region():
  truth = synthetic_run.photographs(1, 40, 3)[0]
  image = truth.copy()
  image[20:] = 1 - image[20:]
  top, bottom = np.zeros((40, 40, 1)), np.zeros((40, 40, 1))
  top[:16], bottom[24:] = 1, 1
  assert metrics.measure(image, truth, top).region_ssim == pytest.approx(1.0, abs=1e-6)
  found = metrics.measure(image, truth, bottom)
  assert found.region_ssim < found.ssim - 0.2


def test_region_ssim_is_the_weighted_mean_of_the_map():
  truth = synthetic_run.photographs(1, 24, 3)[0]
  image = synthetic_run.noisy(truth[None], np.array([0.2]), seed=1)[0]
  region = np.random.default_rng(0).random((24, 24, 1))
  _, ssim_map = skimage_metrics.structural_similarity(
    truth.astype(np.float64), image.astype(np.float64), data_range=1, channel_axis=-1, full=True
  )
  expected = np.average(ssim_map.mean(axis=-1), weights=region[..., 0])
  assert metrics.measure(image, truth, region).region_ssim == pytest.approx(expected)


def test_empty_region_has_no_region_metrics():
  image = synthetic_run.photographs(1, 16, 1)[0]
  found = metrics.measure(1 - image, image, np.zeros((16, 16, 1)))
  assert (found.region_mse, found.region_psnr, found.region_ssim) == (None, None, None)
  assert np.isfinite([found.mse, found.psnr, found.ssim]).all()


def test_perceptual_distance_and_its_mean_over_the_region():
  image = synthetic_run.photographs(1, 16, 3)[0]
  seen = []

  def perceptual(first, second):
    seen.append((first, second))
    spatial = np.zeros((16, 16))
    spatial[:4] = 0.6
    return 0.2, spatial

  region = np.zeros((16, 16, 1))
  region[2:8] = 0.5
  found = metrics.measure(1 - image, image, region, perceptual)
  assert found.lpips == 0.2
  assert found.region_lpips == pytest.approx(0.6 * 2 / 6)
  np.testing.assert_allclose(seen, [[1 - image, image]])
  empty = metrics.measure(1 - image, image, np.zeros((16, 16, 1)), perceptual)
  assert (empty.lpips, empty.region_lpips) == (0.2, None)
  plain = metrics.measure(1 - image, image, region)
  assert (plain.lpips, plain.region_lpips) == (None, None)


@pytest.mark.parametrize(
  ('ssim', 'prior', 'expected'),
  [
    (0.9, 0.3, 2.0),
    (0.3, 0.3, 0.0),
    (0.15, 0.3, -0.5),
    (-0.3, 0.3, -2.0),
    (0.9, 0.01, 89.0),
    # A ratio to nearly nothing, or to less, says nothing.
    (0.9, 0.009, None),
    (0.9, 0.0, None),
    (0.9, -0.3, None),
  ],
)
def test_relative_data_leakage(ssim, prior, expected):
  found = metrics.relative_data_leakage(ssim, prior)
  assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
  ('image', 'truth', 'region', 'message'),
  [
    (np.zeros((8, 8, 1)), np.zeros((8, 9, 1)), np.ones((8, 9, 1)), 'share one shape'),
    (np.full((8, 8, 1), np.nan), np.zeros((8, 8, 1)), np.ones((8, 8, 1)), 'finite'),
    (np.zeros((6, 8, 1)), np.zeros((6, 8, 1)), np.ones((6, 8, 1)), 'smaller than the SSIM window'),
    (np.zeros((8, 8, 1)), np.zeros((8, 8, 1)), np.ones((8, 8)), 'region must have shape'),
    (np.zeros((8, 8, 1)), np.zeros((8, 8, 1)), np.full((8, 8, 1), 255), 'values in'),
  ],
)
def test_rejects(image, truth, region, message):
  with pytest.raises(ValueError, match=message):
    metrics.measure(image, truth, region)
