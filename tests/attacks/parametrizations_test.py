import itertools

import numpy as np
import pytest
import scipy.fft
import tensorflow as tf

from attacks.parametrizations import (
  PARAMETRIZATIONS,
  PixelParametrization,
  SpectralParametrization,
)

_LEADING = [(), (2,), (3, 2)]


def _images(*shape, seed=0):
  return np.random.default_rng(seed).uniform(size=shape)


@pytest.mark.parametrize('name', sorted(PARAMETRIZATIONS))
@pytest.mark.parametrize('leading', _LEADING)
def test_parameters_invert_images(name, leading):
  images = _images(*leading, 6, 5, 3)
  parametrization = PARAMETRIZATIONS[name]()
  assert parametrization.invertible
  parameters = parametrization.parameters(tf.constant(images))
  assert parameters.shape == images.shape
  np.testing.assert_allclose(parametrization.images(parameters), images, atol=1e-12)


@pytest.mark.parametrize('leading', _LEADING)
def test_spectral_coefficients_are_those_of_the_cosine_transform(leading):
  images = _images(*leading, 6, 5, 2)
  expected = scipy.fft.dctn(images, axes=(-3, -2), norm='ortho')
  plain = SpectralParametrization(exponent=0)
  np.testing.assert_allclose(plain.parameters(tf.constant(images)), expected, atol=1e-12)
  damped = SpectralParametrization().parameters(tf.constant(images)).numpy()
  np.testing.assert_allclose(damped[..., 3, 4, :], 6 * expected[..., 3, 4, :], atol=1e-12)


def test_spectral_gradient_equals_differences():
  parametrization = SpectralParametrization()
  parameters = tf.constant(_images(2, 2, 5, 4, 2))
  weights = _images(2, 2, 5, 4, 2, seed=1)

  def value(coefficients):
    return tf.reduce_sum(weights * parametrization.images(coefficients) ** 2)

  with tf.GradientTape() as tape:
    tape.watch(parameters)
    loss = value(parameters)
  step = 1e-6 * _images(*parameters.shape, seed=2)
  expected = float(value(parameters + step) - value(parameters - step)) / 2
  slope = np.sum(tape.gradient(loss, parameters).numpy() * step)
  assert slope == pytest.approx(expected, rel=1e-7)


def _moving(parametrization, iteration, shape=(2, 1, 8, 16, 3), iterations=100):
  mask = tf.function(parametrization.active)(
    tf.zeros(shape, tf.float64), tf.constant(iteration), iterations
  )
  assert mask.shape == shape
  assert mask.dtype == tf.float64
  assert set(np.unique(mask)) <= {0.0, 1.0}
  return mask.numpy()


@pytest.mark.parametrize('parametrization', [PixelParametrization(), SpectralParametrization()])
def test_everything_moves_by_default(parametrization):
  assert all(_moving(parametrization, iteration).all() for iteration in (0, 99))


class TestCoarseToFine:
  def test_bandwidth_grows_by_octaves_until_all_move(self):
    parametrization = SpectralParametrization(start_bandwidth=0.25, full_bandwidth_at=0.4)
    for iteration, rows in ((0, 2), (20, 4), (40, 8), (99, 8)):
      expected = np.zeros((2, 1, 8, 16, 3))
      expected[:, :, :rows, : 2 * rows] = 1
      np.testing.assert_array_equal(_moving(parametrization, iteration), expected)

  def test_moving_coefficients_only_grow(self):
    parametrization = SpectralParametrization(start_bandwidth=0.1)
    masks = [_moving(parametrization, iteration) for iteration in range(0, 60, 5)]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(masks))
    assert masks[0][..., 0, 0, :].all()
    assert not masks[0][..., -1, -1, :].any()

  def test_can_end_at_once(self):
    assert _moving(SpectralParametrization(start_bandwidth=0.1, full_bandwidth_at=0), 0).all()

  @pytest.mark.parametrize(
    'change', [{'start_bandwidth': 0.0}, {'start_bandwidth': 1.1}, {'full_bandwidth_at': -0.1}]
  )
  def test_shares_are_checked(self, change):
    with pytest.raises(ValueError, match=next(iter(change))):
      SpectralParametrization(**change)
