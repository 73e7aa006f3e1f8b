import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.published import exposure


def _softmax(values, temperature):
  flat = values.reshape(len(values), -1).astype(np.float64) / temperature
  flat = np.exp(flat - flat.max(axis=1, keepdims=True))
  return (flat / flat.sum(axis=1, keepdims=True)).reshape(values.shape)


def _equalized(noise):
  """Slowly, as the paper's step reads: levels, counts, shares."""
  scaled = (noise - noise.min()) * 255 / (noise.max() - noise.min())
  luminance = scaled @ np.array([0.299, 0.587, 0.114]) if noise.shape[-1] == 3 else scaled[..., 0]
  bins = np.minimum((luminance * 256 / 255).astype(int), 255)
  counts = np.array([(bins == level).sum() for level in range(256)])
  shares = np.cumsum(counts).astype(np.float64)
  shares = np.floor((shares - shares[0]) * 255 / (shares[-1] - shares[0]) + 1e-9)
  return np.repeat(shares[np.minimum(luminance.astype(int), 255)][..., None], noise.shape[-1], -1)


def _images(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestSoftmax:
  def test_equals_numpy(self):
    values = _images((3, 4, 5, 3)) * 30
    found = exposure.softmax_over_image(tf.constant(values), 20.0)
    np.testing.assert_allclose(found, _softmax(values, 20.0), rtol=1e-5)

  def test_sums_to_one_over_pixels_and_channels(self):
    found = exposure.softmax_over_image(tf.constant(_images((2, 6, 6, 3))), 20.0)
    np.testing.assert_allclose(tf.reduce_sum(found, (1, 2, 3)), 1.0, rtol=1e-5)


class TestEqualization:
  @pytest.mark.parametrize('channels', [1, 3])
  def test_equals_numpy(self, channels):
    noise = np.exp(_images((2, 16, 16, channels), 1))
    found = exposure.equalize_histogram(tf.constant(noise)).numpy()
    expected = _equalized(noise)
    # A luminance at the edge of a level may fall on either side in float32.
    assert np.mean(found == expected) > 0.99
    np.testing.assert_allclose(found, expected, atol=3)

  def test_is_flat_afterwards(self):
    noise = np.exp(3 * _images((1, 64, 64, 1), 2))
    found = exposure.equalize_histogram(tf.constant(np.log(noise))).numpy().ravel()
    counts = np.histogram(found, bins=8, range=(0, 256))[0] / found.size
    np.testing.assert_allclose(counts, 1 / 8, atol=0.03)

  def test_keeps_the_order(self):
    noise = _images((1, 8, 8, 1), 3)
    found = exposure.equalize_histogram(tf.constant(noise)).numpy().ravel()
    assert np.all(np.diff(found[np.argsort(noise.ravel())]) >= 0)

  def test_equal_values_give_zeros(self):
    np.testing.assert_array_equal(exposure.equalize_histogram(tf.fill((2, 4, 4, 3), 7.0)), 0)

  def test_what_is_not_finite_stays_seen(self):
    noise = tf.constant([[[[1.0], [np.inf]]]])
    assert np.isnan(exposure.equalize_histogram(noise)).all()

  def test_batch_is_equalised_as_one(self):
    noise = np.concatenate([_images((1, 8, 8, 1)), _images((1, 8, 8, 1)) + 100])
    found = exposure.equalize_histogram(tf.constant(noise)).numpy()
    assert found[0].max() < 130
    assert found[1].min() > 124

  def test_scrambled_as_the_released_code_reads_it_back(self):
    noise = np.exp(_images((2, 6, 6, 3), 4))
    plain = exposure.equalize_histogram(tf.constant(noise)).numpy()
    found = exposure.equalize_histogram(tf.constant(noise), scramble=True).numpy()
    # [pixels, 3] read as [B, 3, H, W], then channels last again.
    expected = plain.reshape(-1, 3).reshape(2, 3, 6, 6).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, expected)
    assert np.mean(found != plain) > 0.5
    # The first channel of an image shows its upper third alone.
    np.testing.assert_array_equal(np.unique(found[0, ..., 0]), np.unique(plain[0, :2, :, 0]))


class TestExposureMap:
  @pytest.mark.parametrize('channels', [1, 3])
  def test_without_equalisation_equals_numpy(self, channels):
    images, drawn = _images((2, 8, 8, channels), 5), _images((2, 8, 8, channels), 6)
    found = exposure.exposure_map(tf.constant(drawn), tf.constant(images), equalization='none')
    expected = _softmax(1 / _softmax((drawn - images) ** 2, 20.0), 20.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)

  def test_equals_the_steps_of_numpy(self):
    images, drawn = _images((2, 16, 16, 1), 5), _images((2, 16, 16, 1), 6)
    found = exposure.exposure_map(tf.constant(drawn), tf.constant(images)).numpy()
    expected = _softmax(_equalized(1 / _softmax((drawn - images) ** 2, 20.0)), 20.0)
    # One level is a factor of exp(1 / 20), and a few pixels lie at the edge of a level.
    assert np.quantile(np.abs(np.log(found / expected)), 0.98) < 0.06

  def test_what_is_reconstructed_well_gets_most(self):
    images = np.zeros((1, 8, 8, 1), np.float32)
    drawn = images.copy()
    drawn[:, :, 4:] = 1.0
    found = exposure.exposure_map(tf.constant(drawn), tf.constant(images)).numpy()
    assert found[:, :, :4].min() > 100 * found[:, :, 4:].max()

  def test_released_differs_for_colour_alone(self):
    for channels, same in ((1, True), (3, False)):
      images, drawn = _images((1, 8, 8, channels), 5), _images((1, 8, 8, channels), 6)
      a, b = (
        exposure.exposure_map(tf.constant(drawn), tf.constant(images), equalization=kind).numpy()
        for kind in ('luminance', 'released')
      )
      assert np.allclose(a, b) == same


class TestCam:
  def test_equals_numpy(self):
    noise, cam = _images((2, 5, 4, 3), 7), np.random.default_rng(8).uniform(size=(2, 5, 4, 1))
    cam = cam.astype(np.float32)
    found = exposure.subtract_cam(tf.constant(noise), tf.constant(cam), 0.4).numpy()
    kept = np.where(cam >= np.sort(cam.reshape(2, -1), axis=1)[:, -6][:, None, None, None], cam, 0)
    np.testing.assert_allclose(found, noise - 0.4 * np.sign(noise) * _softmax(kept, 20), rtol=1e-5)

  def test_keeps_exactly_the_fraction_of_equal_values(self):
    found = exposure.subtract_cam(tf.ones((1, 10, 10, 1)), tf.ones((1, 10, 10, 1)), 1.0)
    assert len(np.unique(np.round(found.numpy(), 7))) == 2
    assert np.sum(found.numpy() < found.numpy().max()) == 30

  def test_published_temperature_makes_it_nearly_the_same_number_everywhere(self):
    cam = np.random.default_rng(1).uniform(size=(1, 32, 32, 1)).astype(np.float32)
    subtracted = 1 - exposure.subtract_cam(tf.ones((1, 32, 32, 1)), tf.constant(cam), 1.0).numpy()
    assert subtracted.max() / subtracted.min() < 1.06

  @pytest.mark.parametrize(('progress', 'alpha'), [(0, 0.1), (0.05, 0.1), (0.3, 0.3), (0.9, 0.5)])
  def test_weight_follows_the_rounds(self, progress, alpha):
    assert exposure.cam_weight(progress, 0.1, 0.5) == alpha


class TestAmplitude:
  @pytest.mark.parametrize('progress', [0.0, 0.5])
  def test_maximum_is_a_share_of_the_image(self, progress):
    noise, images = np.abs(_images((3, 6, 6, 3), 9)), _images((3, 6, 6, 3), 10)
    found = exposure.scaled_noise(
      tf.constant(noise), tf.constant(images), amplitude=0.19, progress=progress
    ).numpy()
    expected = 0.19 * np.exp(progress) * np.abs(images.max(axis=(1, 2, 3)))
    np.testing.assert_allclose(found.max(axis=(1, 2, 3)), expected, rtol=1e-5)
    ratio = found / noise
    np.testing.assert_allclose(ratio, ratio[:, :1, :1, :1] * np.ones_like(ratio), rtol=1e-5)

  def test_no_noise_stays_none(self):
    zeros = tf.zeros((1, 4, 4, 1))
    found = exposure.scaled_noise(zeros, tf.ones_like(zeros), amplitude=0.19, progress=0.0)
    np.testing.assert_array_equal(found, 0)


def test_averaged_map():
  found = exposure.averaged_map(tf.constant([1.0, 2.0]), tf.constant([3.0, 6.0]), 0.1)
  np.testing.assert_allclose(found, [2.8, 5.6], rtol=1e-6)


class TestWhiteNoise:
  def test_energy_is_that_of_the_noise_and_keys_decide(self):
    noise = tf.constant(np.abs(_images((3, 16, 16, 1), 11)))
    keys = tf.constant([[1, 2], [3, 4], [1, 2]])
    found = exposure.white_noise_of_same_energy(noise, keys).numpy()
    np.testing.assert_allclose(
      np.linalg.norm(found.reshape(3, -1), axis=1),
      np.linalg.norm(noise.numpy().reshape(3, -1), axis=1),
      rtol=1e-5,
    )
    units = found.reshape(3, -1) / np.linalg.norm(found.reshape(3, -1), axis=1)[:, None]
    assert units[0] @ units[2] > 0.999
    assert abs(units[0] @ units[1]) < 0.25
    assert abs(units[0].mean() * 16) < 3.5
