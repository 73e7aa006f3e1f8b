import collections

import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.learning import keras_model_fn
from tff_shadow.learning.soteria import build_soteria_gradient_fn, feature_scores
from tff_shadow.models import classification_loss, freeze_batch_norm

_SHAPE = (4, 4, 1)
_LAYERS = tf.keras.layers


def _model(*, softmax=False, norm=False):
  """Twelve smooth features, of both signs."""
  tf.keras.utils.set_random_seed(2)
  layers = [tf.keras.Input(_SHAPE), _LAYERS.Conv2D(3, 3, activation='tanh', name='conv')]
  if norm:
    layers.append(_LAYERS.BatchNormalization())
  layers += [_LAYERS.Flatten(), _LAYERS.Dense(2, name='logits')]
  if softmax:
    layers.append(_LAYERS.Softmax())
  return tf.keras.Sequential(layers)


def _batch(size=3):
  rng = np.random.default_rng(1)
  return collections.OrderedDict(
    x=tf.constant(rng.random((size, *_SHAPE)), tf.float32),
    y=tf.constant(np.arange(size) % 2, tf.int32),
  )


def _representation(kernel, bias, images):
  """The features by numpy, in float64: [B, 12]."""
  patches = np.stack(
    [images[:, i : i + 3, j : j + 3, 0].reshape(-1, 9) for i in range(2) for j in range(2)], axis=1
  )
  return np.tanh(patches @ kernel.reshape(9, 3) + bias).reshape(len(images), -1)


def _expected_scores(model, images):
  """By central differences, pixel by pixel."""
  kernel, bias = (weight.astype(np.float64) for weight in model.get_layer('conv').get_weights())
  images = np.asarray(images, np.float64)
  squared = 0.0
  for row in range(4):
    for column in range(4):
      moved = [images.copy(), images.copy()]
      moved[0][:, row, column] += 1e-5
      moved[1][:, row, column] -= 1e-5
      plus, minus = (_representation(kernel, bias, m) for m in moved)
      squared = squared + ((plus - minus) / 2e-5) ** 2
  return np.sum(np.sqrt(squared) / (np.abs(_representation(kernel, bias, images)) + 0.1), axis=0)


def _gradients(model, percentile, batch, **kwargs):
  """By Soteria, where the model trains at other weights than those of `model` when it was given."""
  build = build_soteria_gradient_fn(model, percentile)
  local = keras_model_fn(model, _SHAPE, **kwargs)()
  for kind in ('trainable_variables', 'non_trainable_variables'):
    for variable, value in zip(getattr(local, kind), getattr(model, kind), strict=True):
      variable.assign(value)
  num_examples, gradients = tf.function(build(local))(batch)
  assert num_examples == len(batch['y'])
  return gradients


def _plain_gradients(model, batch):
  with tf.GradientTape() as tape:
    loss = classification_loss(model)(batch['y'], model(batch['x'], training=True))
  return tape.gradient(loss, model.trainable_variables)


def test_scores_are_those_of_finite_differences():
  model, batch = _model(), _batch()
  features = tf.keras.Model(model.inputs, model.layers[-1].input)
  scores = tf.function(feature_scores)(features, batch['x'])
  np.testing.assert_allclose(scores, _expected_scores(model, batch['x']), rtol=1e-4)


@pytest.mark.parametrize('softmax', [False, True])
def test_rows_below_the_percentile_are_zero_and_all_else_is_plain(softmax):
  model, batch = _model(softmax=softmax), _batch()
  gradients = _gradients(model, 40.0, batch)
  plain = _plain_gradients(model, batch)
  scores = _expected_scores(model, batch['x'])
  pruned = scores < np.percentile(scores, 40.0)
  assert pruned.sum() == 5
  assert np.all(np.abs(plain[2]) > 0)
  expected = np.where(pruned[:, None], 0.0, plain[2])
  np.testing.assert_allclose(gradients[2], expected, rtol=1e-4, atol=1e-7)
  for index in (0, 1, 3):
    np.testing.assert_allclose(gradients[index], plain[index], rtol=1e-4, atol=1e-7)


def test_nothing_is_pruned_at_zero():
  model, batch = _model(), _batch()
  for own, plain in zip(_gradients(model, 0.0, batch), _plain_gradients(model, batch), strict=True):
    np.testing.assert_allclose(own, plain, rtol=1e-4, atol=1e-7)


def test_frozen_batch_norm_keeps_the_variables_in_step():
  model, batch = _model(norm=True), _batch()
  freeze_batch_norm(model)
  gradients = _gradients(model, 40.0, batch, batch_norm_sharing='frozen')
  assert np.count_nonzero(np.all(gradients[2] == 0, axis=1)) == 5


@pytest.mark.parametrize(
  ('layers', 'message'),
  [
    ([_LAYERS.Conv2D(2, 4), _LAYERS.Flatten()], 'they come from .*conv'),
    ([_LAYERS.Dense(2), _LAYERS.GlobalAveragePooling2D()], 'they come from .*dense'),
    ([_LAYERS.Flatten(), _LAYERS.Dense(2, trainable=False)], 'is frozen'),
    ([_LAYERS.Flatten(), tf.keras.Sequential([_LAYERS.Dense(2)])], 'they come from .*sequential'),
    ([_LAYERS.Flatten()], 'they come from .*input'),
  ],
  ids=['conv', 'maps', 'frozen', 'nested', 'no_weights'],
)
def test_models_without_a_last_dense_layer_are_refused(layers, message):
  model = tf.keras.Sequential([tf.keras.Input(_SHAPE), *layers])
  with pytest.raises(ValueError, match=message):
    build_soteria_gradient_fn(model, 60.0)


def test_a_sum_of_two_dense_layers_is_refused():
  inputs = tf.keras.Input((4,))
  outputs = _LAYERS.Add(name='both')([_LAYERS.Dense(2)(inputs), _LAYERS.Dense(2)(inputs)])
  with pytest.raises(ValueError, match=r'they come from .*both'):
    build_soteria_gradient_fn(tf.keras.Model(inputs, outputs), 60.0)
