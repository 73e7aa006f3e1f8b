import zipfile

import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models import (
  build_model,
  classification_loss,
  freeze_batch_norm,
  layers_from_output,
  load_keras_file,
  model_from_config,
  model_to_config,
  outputs_logits,
)

_SHAPE = (8, 8, 1)


def _dense_model(units=2, shape=_SHAPE, activation=None):
  return tf.keras.Sequential(
    [
      tf.keras.Input(shape),
      tf.keras.layers.Flatten(),
      tf.keras.layers.Dense(units, activation=activation),
    ]
  )


def _load(path, **changes):
  return load_keras_file(str(path), **{'image_shape': _SHAPE, 'num_classes': 2, **changes})


def test_round_trip(tmp_path):
  model = _dense_model()
  model.save(tmp_path / 'm.keras')
  loaded = _load(tmp_path / 'm.keras')
  for actual, wanted in zip(loaded.get_weights(), model.get_weights(), strict=True):
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize(
  ('activation', 'logits'), [(None, True), ('linear', True), ('softmax', False)]
)
def test_loss_fits_the_outputs(activation, logits):
  model = _dense_model(activation=activation)
  assert outputs_logits(model) == logits
  labels, images = np.array([0, 1], np.int32), np.ones((2, *_SHAPE), np.float32)
  outputs = model(images)
  probabilities = tf.nn.softmax(outputs) if logits else outputs
  expected = -np.mean(np.log(probabilities.numpy()[[0, 1], labels]))
  assert float(classification_loss(model)(labels, outputs)) == pytest.approx(expected, rel=1e-5)


# Made in the test: what other tests build in a graph makes layers of before it not callable.
@pytest.mark.parametrize(
  ('end', 'logits'),
  [
    (lambda x: tf.keras.layers.Softmax()(x), False),
    (lambda x: tf.keras.layers.Activation('softmax')(x), False),
    (tf.nn.softmax, False),
    (lambda x: tf.keras.layers.Activation('linear')(tf.nn.softmax(x)), False),
    (lambda x: tf.keras.layers.Activation('linear')(x), True),
    (tf.identity, True),
    (lambda x: _dense_model(2, (2,), 'softmax')(x), False),
    (lambda x: _dense_model(2, (2,))(x), True),
    (lambda x: tf.keras.Sequential([tf.keras.Input(2), tf.keras.layers.Softmax()])(x), False),
  ],
)
def test_what_is_at_the_end_decides(end, logits):
  inputs = tf.keras.Input(_SHAPE)
  x = tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(inputs))
  model = tf.keras.Model(inputs, end(x))
  assert outputs_logits(model) == logits
  # Around it again, as whoever puts a preprocessing before a whole classifier.
  layers = [tf.keras.Input(_SHAPE), tf.keras.layers.Rescaling(2.0), model]
  assert outputs_logits(tf.keras.Sequential(layers)) == logits
  rebuilt = model_from_config(model_to_config(tf.keras.Sequential(layers)))
  assert outputs_logits(rebuilt) == logits


def test_layers_are_followed_back_through_nested_models():
  inner = tf.keras.Sequential([tf.keras.Input(2), tf.keras.layers.Softmax(name='last')])
  inputs = tf.keras.Input(_SHAPE)
  x = tf.keras.layers.Flatten(name='first')(inputs)
  x = tf.keras.layers.Dense(2, name='logits')(x)
  model = tf.keras.Model(inputs, inner(x))
  assert [layer.name for layer in layers_from_output(model)] == ['last', 'logits', 'first']
  merged = tf.keras.layers.Add(name='sum')([x, tf.keras.layers.Dense(2)(x)])
  model = tf.keras.Model(inputs, inner(merged))
  assert [layer.name for layer in layers_from_output(model)] == ['last', 'sum']


def test_wrong_files(tmp_path):
  with pytest.raises(UserError, match='no such file'):
    _load(tmp_path / 'none.keras')
  with pytest.raises(UserError, match=r'only the \.keras format'):
    _load(tmp_path / 'model.h5')
  (tmp_path / 'broken.keras').write_bytes(b'not a zip file')
  with pytest.raises(UserError, match=r'not of the \.keras format'):
    _load(tmp_path / 'broken.keras')
  with zipfile.ZipFile(tmp_path / 'empty.keras', 'w'):
    pass
  with pytest.raises(UserError, match='cannot be loaded'):
    _load(tmp_path / 'empty.keras')


@pytest.mark.parametrize(
  ('saved', 'message'),
  [
    ('lambda.keras', 'cannot be loaded|Lambda'),
    # Another format, of which Keras runs the code, by that name.
    ('lambda.h5', r'not of the \.keras format'),
  ],
)
def test_lambda_layers_are_not_run(saved, message, tmp_path):
  marker = str(tmp_path / 'ran')
  inputs = tf.keras.Input(_SHAPE)
  x = tf.keras.layers.Lambda(lambda t: (open(marker, 'w'), t)[1])(inputs)  # noqa: SIM115
  x = tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(x))
  tf.keras.Model(inputs, x).save(tmp_path / saved)
  (tmp_path / 'ran').unlink()  # Written while the model was built.
  (tmp_path / saved).rename(tmp_path / 'lambda.keras')
  with pytest.raises(UserError, match=message):
    _load(tmp_path / 'lambda.keras')
  assert not (tmp_path / 'ran').exists()


def test_weights_that_are_not_finite_are_named(tmp_path):
  model = _dense_model()
  model.layers[-1].bias.assign([0.0, np.nan])
  model.save(tmp_path / 'nan.keras')
  with pytest.raises(UserError, match='bias:0 has values that are not finite'):
    _load(tmp_path / 'nan.keras')


def test_half_precision_is_refused(tmp_path):
  x = inputs = tf.keras.Input(_SHAPE)
  x = tf.keras.layers.Flatten()(x)
  x = tf.keras.layers.Dense(2, dtype='mixed_float16', name='last')(x)
  tf.keras.Model(inputs, x).save(tmp_path / 'half.keras')
  with pytest.raises(UserError, match='layer last computes in float16'):
    _load(tmp_path / 'half.keras')


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (lambda: _dense_model(units=3), 'last layer must have 2 units'),
    (lambda: _dense_model(shape=(16, 16, 1)), 'set --image_size and --color'),
    (lambda: _dense_model(shape=(8, 8, 3)), 'set --image_size and --color'),
    (lambda: _dense_model(activation='sigmoid'), 'sigmoid of each of 2 classes .* use softmax'),
    (
      lambda: tf.keras.Sequential([tf.keras.Input(_SHAPE), _dense_model(activation='sigmoid')]),
      'sigmoid',
    ),
  ],
)
def test_model_that_does_not_fit_the_data(tmp_path, model, message):
  model().save(tmp_path / 'm.keras')
  with pytest.raises(UserError, match=message):
    _load(tmp_path / 'm.keras')


def test_damaged_config():
  with pytest.raises(UserError, match='cannot be rebuilt'):
    model_from_config({'class_name': 'Functional', 'config': {'layers': 3}})


def test_frozen_batch_norm_ignores_the_batch():
  model = build_model('conv_small', image_shape=_SHAPE, num_classes=2, norm='batch', seed=0)
  assert freeze_batch_norm(model) == 4
  images = np.random.default_rng(0).random((6, *_SHAPE)).astype(np.float32)
  np.testing.assert_allclose(model(images, training=True), model(images, training=False), atol=1e-6)
