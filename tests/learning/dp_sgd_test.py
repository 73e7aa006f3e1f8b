import collections

import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.learning import keras_model_fn
from tff_shadow.learning.dp_sgd import build_dp_sgd_gradient_fn
from tff_shadow.models import build_model, classification_loss, freeze_batch_norm

_SHAPE = (8, 8, 1)


def _model():
  """About 4,000 weights."""
  tf.keras.utils.set_random_seed(3)
  return tf.keras.Sequential(
    [
      tf.keras.Input(_SHAPE),
      tf.keras.layers.Conv2D(4, 3, padding='same', activation='relu'),
      tf.keras.layers.Flatten(),
      tf.keras.layers.Dense(16, activation='tanh'),
      tf.keras.layers.Dense(2),
    ]
  )


def _batch(size=5):
  rng = np.random.default_rng(0)
  # Of quite different gradients: some are clipped, others are not.
  x = rng.random((size, *_SHAPE)) * np.geomspace(0.1, 10.0, size)[:, None, None, None]
  return collections.OrderedDict(
    x=tf.constant(x, tf.float32), y=tf.constant(np.arange(size) % 2, tf.int32)
  )


def _flat(tensors):
  return np.concatenate([np.ravel(tensor) for tensor in tensors])


def _example_gradients(model, batch):
  """One by one, by plain TensorFlow: [B, weights]."""
  rows = []
  for image, label in zip(batch['x'], batch['y'], strict=True):
    with tf.GradientTape() as tape:
      loss = classification_loss(model)(label[None], model(image[None], training=True))
    rows.append(_flat(tape.gradient(loss, model.trainable_variables)))
  return np.stack(rows)


def _noised(clip_norm, noise_multiplier):
  model, batch = _model(), _batch()
  local = keras_model_fn(model, _SHAPE)()
  for variable, value in zip(local.trainable_variables, model.get_weights(), strict=True):
    variable.assign(value)
  gradient_fn = build_dp_sgd_gradient_fn(model, clip_norm, noise_multiplier)(local)
  num_examples, gradients = tf.function(gradient_fn)(batch)
  assert num_examples == 5
  assert [g.shape for g in gradients] == [w.shape for w in model.get_weights()]
  return _flat(gradients), _example_gradients(model, batch)


def test_each_example_is_clipped_over_all_variables_together():
  gradient, rows = _noised(3.0, 0.0)
  norms = np.linalg.norm(rows, axis=1)
  assert norms.min() < 2.5 < 4.0 < norms.max()
  expected = np.mean(rows * np.minimum(1.0, 3.0 / norms)[:, None], axis=0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_noise_has_the_scale_of_the_clipping_norm_over_the_batch():
  gradient, rows = _noised(1e3, 0.3)  # Nothing is clipped.
  noise = gradient - rows.mean(axis=0)
  # Standard error 1.1 %.
  assert noise.std() == pytest.approx(0.3 * 1e3 / 5, rel=0.05)
  assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)


def test_batch_norm_that_trains_is_refused():
  model = build_model('conv_small', image_shape=_SHAPE, num_classes=2, norm='batch', seed=3)
  with pytest.raises(ValueError, match='use --norm=group or none, or --batch_norm_sharing=frozen'):
    build_dp_sgd_gradient_fn(model, 1.0, 1.0)
  freeze_batch_norm(model)
  build_dp_sgd_gradient_fn(model, 1.0, 1.0)
