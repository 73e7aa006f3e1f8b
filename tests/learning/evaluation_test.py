import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.learning import estimate_batch_norm_statistics, evaluate
from tff_shadow.models import build_model


def _fixed_outputs(outputs, softmax=False):
  """A model that maps the 1 px image i/255 to row i of `outputs`."""
  inputs = tf.keras.Input((1, 1, 1))
  index = tf.keras.layers.Rescaling(255.0)(inputs)
  index = tf.keras.layers.Flatten()(index)
  rows = tf.keras.layers.Embedding(
    len(outputs), outputs.shape[1], embeddings_initializer=tf.constant_initializer(outputs)
  )(index)
  x = tf.keras.layers.Flatten()(rows)
  x = tf.keras.layers.Softmax()(x) if softmax else tf.keras.layers.Activation('linear')(x)
  return tf.keras.Model(inputs, x)


def _images(count):
  return (np.arange(count, dtype=np.float32) / 255).reshape(count, 1, 1, 1)


@pytest.mark.parametrize('softmax', [False, True])
def test_metrics_of_known_outputs(softmax):
  logits = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]], np.float32))
  labels = np.array([0, 0, 1, 1], np.int32)
  metrics = evaluate(_fixed_outputs(logits, softmax), _images(4), labels)
  assert metrics['accuracy'] == pytest.approx(0.5)
  assert metrics['f1'] == pytest.approx(0.5)
  # Pairs (negative, positive) in the right order: 0.1<0.7, 0.1<0.2, 0.6<0.7 of four.
  assert metrics['auc'] == pytest.approx(0.75)
  expected_loss = -np.mean(np.log([0.9, 0.4, 0.7, 0.2]))
  assert metrics['loss'] == pytest.approx(expected_loss, rel=1e-5)


def test_three_classes_use_the_mean_over_classes():
  logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]] * 5
  metrics = evaluate(_fixed_outputs(logits), _images(4), np.array([0, 1, 2, 1], np.int32))
  assert metrics['f1'] == pytest.approx(np.mean([1.0, 2 / 3, 2 / 3]))


def test_auc_is_missing_where_a_class_is():
  metrics = evaluate(_fixed_outputs(np.eye(2, dtype=np.float32)), _images(2), np.zeros(2, np.int32))
  assert 'auc' not in metrics


def test_estimated_statistics_are_those_of_the_images():
  model = build_model('conv_small', image_shape=(8, 8, 1), num_classes=2, norm='batch', seed=0)
  images = np.random.default_rng(0).random((512, 8, 8, 1)).astype(np.float32)
  estimate_batch_norm_statistics(model, images)
  layer = model.get_layer('conv0_bn')
  assert layer.momentum == pytest.approx(0.9)
  features = model.get_layer('conv0')(model.get_layer('standardise')(images))
  mean, variance = tf.nn.moments(features, axes=(0, 1, 2))
  np.testing.assert_allclose(layer.moving_mean, mean, atol=1e-5)
  np.testing.assert_allclose(layer.moving_variance, variance, rtol=0.02)


def test_a_short_last_batch_counts_by_its_images():
  model = build_model('conv_small', image_shape=(8, 8, 1), num_classes=2, norm='batch', seed=0)
  images = np.random.default_rng(0).random((257, 8, 8, 1)).astype(np.float32)
  images[-1] = 1.0
  estimate_batch_norm_statistics(model, images)
  features = model.get_layer('conv0')(model.get_layer('standardise')(images))
  mean, variance = tf.nn.moments(features, axes=(0, 1, 2))
  layer = model.get_layer('conv0_bn')
  np.testing.assert_allclose(layer.moving_mean, mean, atol=1e-5)
  np.testing.assert_allclose(layer.moving_variance, variance, rtol=0.05)
