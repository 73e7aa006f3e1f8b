import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.privacy import (
  gradient_information,
  gradient_jacobian,
  image_gradients,
  update_information,
)

_LABELS = np.array([2, 0], np.int32)


def _model(dtype, batch_norm=False):
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input((5, 4, 1), dtype=dtype)
  x = tf.keras.layers.Conv2D(3, 3, strides=2, activation='tanh', dtype=dtype)(inputs)
  if batch_norm:
    x = tf.keras.layers.BatchNormalization()(x)
  x = tf.keras.layers.Flatten(dtype=dtype)(x)
  return tf.keras.Model(inputs, tf.keras.layers.Dense(3, dtype=dtype)(x))


def _images():
  return np.random.default_rng(1).random((2, 5, 4, 1))


def _gradient(model, images):
  with tf.GradientTape() as tape:
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(_LABELS, model(images))
    loss = tf.reduce_mean(losses)
  gradient = tape.gradient(loss, model.trainable_variables)
  return np.concatenate([tensor.numpy().ravel() for tensor in gradient])


@pytest.fixture(scope='module', name='jacobian')
def _jacobian():
  return gradient_jacobian(_model('float64'), _images(), _LABELS)


def test_gradients_of_single_images_have_their_mean():
  model, images = _model('float64'), _images()
  single = image_gradients(model, images, _LABELS)
  np.testing.assert_allclose(single.mean(axis=0), _gradient(model, images), rtol=1e-12)
  alone = image_gradients(model, images[1:], _LABELS[1:])
  np.testing.assert_allclose(single[1:], alone, rtol=1e-12)
  assert not np.allclose(single[0], single[1])


class TestJacobian:
  def test_equals_central_differences(self, jacobian):
    model, images, step = _model('float64'), _images(), 1e-5
    assert jacobian.dtype == np.float64
    assert jacobian.shape == (model.count_params(), images.size)
    expected = np.empty_like(jacobian)
    for pixel, unit in enumerate(np.eye(images.size).reshape(-1, *images.shape)):
      plus, minus = (_gradient(model, images + sign * step * unit) for sign in (1, -1))
      expected[:, pixel] = (plus - minus) / (2 * step)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(jacobian, expected, atol=1e-9)

  def test_float32_is_right_to_its_rounding(self, jacobian):
    model = _model('float32')
    model.set_weights(_model('float64').get_weights())
    rounded = gradient_jacobian(model, _images(), _LABELS)
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, jacobian, atol=1e-6 * np.abs(jacobian).max())

  def test_batch_norm_statistics_are_left(self):
    model = _model('float32', batch_norm=True)
    before = model.get_weights()
    jacobian = gradient_jacobian(model, _images(), _LABELS)
    assert np.abs(jacobian).max() > 0
    product = gradient_information(model, _images(), _LABELS, 1.0)(np.ones(40))
    # Uses the batch's statistics, as training does, whose Jacobian this is.
    expected = update_information(jacobian, 1.0) @ np.ones(40)
    np.testing.assert_allclose(product, expected, atol=1e-4 * np.abs(expected).max())
    for found, expected in zip(model.get_weights(), before, strict=True):
      np.testing.assert_array_equal(found, expected)


class TestInformation:
  @pytest.mark.parametrize('diagonal', [False, True])
  def test_products_are_those_of_the_matrix(self, jacobian, diagonal):
    model, rng = _model('float64'), np.random.default_rng(3)
    variances = rng.uniform(0.1, 2.0, len(jacobian)) if diagonal else 0.3
    multiply = gradient_information(model, _images(), _LABELS, variances)
    information = update_information(jacobian, variances)
    for vector in rng.normal(size=(2, len(information))):
      np.testing.assert_allclose(multiply(vector), information @ vector, atol=1e-9)

  def test_arguments(self):
    model = _model('float32')
    with pytest.raises(ValueError, match='variances'):
      gradient_information(model, _images(), _LABELS, 0.0)
    with pytest.raises(ValueError, match='labels'):
      gradient_information(model, _images(), _LABELS[:1], 1.0)
    with pytest.raises(ValueError, match='images'):
      gradient_jacobian(model, _images()[0], _LABELS)
