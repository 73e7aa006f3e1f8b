import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import make_generator
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator

_SHAPE = (8, 8, 1)


def test_round_trip(tmp_path):
  generator = make_generator()
  generator.save(tmp_path / 'g.keras')
  loaded = load_generator(str(tmp_path / 'g.keras'), _SHAPE)
  latents = tf.random.stateless_normal((2, 5), (1, 2))
  np.testing.assert_allclose(loaded(latents), generator(latents), atol=1e-6)


def test_unreadable_files(tmp_path):
  with pytest.raises(UserError, match=r'^--generator=.*no such file'):
    load_generator(str(tmp_path / 'none.keras'), _SHAPE)
  with pytest.raises(UserError, match=r'^--shadow_generator=.*no such file'):
    load_generator(str(tmp_path / 'none.keras'), _SHAPE, flag='--shadow_generator')
  (tmp_path / 'broken.keras').write_bytes(b'not a zip file')
  with pytest.raises(UserError, match=r'not of the \.keras format'):
    load_generator(str(tmp_path / 'broken.keras'), _SHAPE)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: make_generator((16, 16, 1)), r'shape \(16, 16, 1\), the data has \(8, 8, 1\)'),
    (lambda: make_generator((8, 8, 3)), r'shape \(8, 8, 3\), the data has'),
    (lambda: make_generator(activation='tanh'), 'pixel values from -'),
    (lambda: make_generator(activation='exponential'), 'must lie in'),
    (lambda: _two_inputs(), 'exactly one input'),
    (lambda: _open_latent(), r'\(None, 3\), is not fixed'),
    (lambda: _not_finite(), 'not finite'),
  ],
  ids=['size', 'channels', 'tanh', 'exponential', 'two_inputs', 'open', 'not_finite'],
)
def test_generators_that_do_not_fit(tmp_path, build, message):
  build().save(tmp_path / 'g.keras')
  with pytest.raises(UserError, match=message):
    load_generator(str(tmp_path / 'g.keras'), _SHAPE)


def test_lambda_layers_are_refused(tmp_path):
  inputs = tf.keras.Input((64,))
  x = tf.keras.layers.Lambda(lambda t: tf.sigmoid(t))(inputs)
  tf.keras.Model(inputs, tf.keras.layers.Reshape(_SHAPE)(x)).save(tmp_path / 'g.keras')
  with pytest.raises(UserError, match=r'cannot be loaded|Lambda'):
    load_generator(str(tmp_path / 'g.keras'), _SHAPE)


def _two_inputs():
  inputs = [tf.keras.Input((64,)), tf.keras.Input((64,))]
  x = tf.keras.layers.Activation('sigmoid')(tf.keras.layers.Add()(inputs))
  return tf.keras.Model(inputs, tf.keras.layers.Reshape(_SHAPE)(x))


def _open_latent():
  inputs = tf.keras.Input((None, 3))
  x = tf.keras.layers.Dense(64, activation='sigmoid')(
    tf.keras.layers.GlobalAveragePooling1D()(inputs)
  )
  return tf.keras.Model(inputs, tf.keras.layers.Reshape(_SHAPE)(x))


def _not_finite():
  generator = make_generator()
  generator.layers[-2].bias.assign(np.full(64, np.nan, np.float32))
  return generator
