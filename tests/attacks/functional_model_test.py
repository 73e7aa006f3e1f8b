import numpy as np
import pytest
import tensorflow as tf

from attacks.functional_model import FunctionalModel
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.errors import UserError
from tff_shadow.models import classification_loss

layers = tf.keras.layers

LAYERS = {
  'conv': lambda: layers.Conv2D(4, 3),
  'depthwise': lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
  'separable': lambda: layers.SeparableConv2D(4, 3),
  'batch_norm': lambda: layers.BatchNormalization(momentum=0.5),
  'group_norm': lambda: layers.GroupNormalization(2),
  'layer_norm': lambda: layers.LayerNormalization(axis=(1, 2, 3)),
  'prelu': lambda: layers.PReLU(alpha_initializer='uniform'),
  'nested': lambda: tf.keras.Sequential(
    [layers.Conv2D(4, 3), tf.keras.Sequential([layers.BatchNormalization(momentum=0.5)])]
  ),
  'wrapped': lambda: layers.TimeDistributed(layers.Dense(3)),
  'attention': lambda: _attention(),
}


def _attention():
  inputs = tf.keras.Input((6, 6, 2))
  x = layers.Reshape((36, 2))(inputs)
  return tf.keras.Model(inputs, layers.MultiHeadAttention(2, 3)(x, x))


def _model(layer) -> tf.keras.Model:
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input((6, 6, 2))
  return tf.keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layer(inputs))))


def _other_weights(model, seed=1):
  rng = np.random.default_rng(seed)
  return [
    tf.constant(v.numpy() + rng.normal(0, 0.2, v.shape), v.dtype) for v in model.trainable_variables
  ]


def _assigned(model, weights, images, upstream):
  """Outputs and their derivatives with respect to the variables, by assigning `weights`."""
  clone = tf.keras.models.clone_model(model)
  clone.set_weights(model.get_weights())
  for variable, weight in zip(clone.trainable_variables, weights, strict=True):
    variable.assign(weight)
  with tf.GradientTape() as tape:
    outputs = clone(images, training=True)
  return outputs, tape.gradient(outputs, clone.trainable_variables, upstream)


@pytest.mark.parametrize('traced', [False, True], ids=['eager', 'traced'])
@pytest.mark.parametrize('name', LAYERS)
def test_equals_assigning_the_weights(name, traced):
  model = _model(LAYERS[name]())
  images = tf.constant(smooth_images(3, (6, 6, 2)))
  upstream = tf.constant([[1.0, -2.0], [0.5, 1.0], [3.0, 1.0]])
  weights = _other_weights(model)
  before = model.get_weights()
  functional = FunctionalModel(model)

  def call(weights, images):
    with tf.GradientTape() as tape:
      tape.watch(weights)
      outputs = functional(weights, images)
    return outputs, tape.gradient(outputs, weights, upstream)

  if traced:
    call = tf.function(call)
  outputs, gradient = call(weights, images)
  expected_outputs, expected_gradient = _assigned(model, weights, images, upstream)
  np.testing.assert_allclose(outputs, expected_outputs, rtol=1e-5, atol=1e-5)
  assert len(gradient) == len(expected_gradient) > 2
  for a, b in zip(gradient, expected_gradient, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  for old, new in zip(before, model.get_weights(), strict=True):
    np.testing.assert_array_equal(old, new)


def test_variables_are_back_in_their_places():
  model = _model(layers.BatchNormalization())
  norm, dense = model.layers[1], model.layers[-1]
  places = (norm.gamma, norm.beta, dense.kernel, dense.bias)
  functional = FunctionalModel(model)
  functional(_other_weights(model), smooth_images(1, (6, 6, 2)))
  with pytest.raises(ValueError, match='incompatible'):
    functional(_other_weights(model), smooth_images(1, (5, 5, 2)))
  assert all(
    a is b for a, b in zip(places, (norm.gamma, norm.beta, dense.kernel, dense.bias), strict=True)
  )
  # Only replaced during a call: the model itself trains its statistics as ever.
  mean = norm.moving_mean.numpy()
  model(smooth_images(1, (6, 6, 2)), training=True)
  assert np.abs(norm.moving_mean.numpy() - mean).max() > 1e-4


def test_shared_layer_uses_one_tensor_twice():
  tf.keras.utils.set_random_seed(0)
  shared = layers.Dense(2)
  inputs = tf.keras.Input((2,))
  model = tf.keras.Model(inputs, shared(shared(inputs)))
  images = tf.constant([[0.3, 0.7]])
  kernel, bias = weights = _other_weights(model)
  expected = tf.matmul(tf.matmul(images, kernel) + bias, kernel) + bias
  np.testing.assert_allclose(FunctionalModel(model)(weights, images), expected, rtol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_model_of_a_simulator_gives_its_gradient(dtype):
  images = smooth_images(3)
  labels = tf.constant([0, 1, 1])
  observation = play_round(small_model(norm='batch'), [(images, [0, 1, 1])])
  simulator = ClientSimulator(observation, dtype)
  functional = FunctionalModel(simulator.model)
  loss_fn = classification_loss(simulator.model)
  images = tf.constant(images, dtype)
  with tf.GradientTape() as tape:
    weights = [tf.convert_to_tensor(v) for v in simulator.model.trainable_variables]
    tape.watch(weights)
    loss = loss_fn(labels, functional(weights, images))
  gradient = tape.gradient(loss, weights)
  expected = simulator.gradient(images, labels)
  for a, b in zip(gradient, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 if dtype == 'float32' else 1e-14)


class _Listed(layers.Layer):
  """Keeps its variable in a list."""

  def build(self, shape):
    self.scales = [self.add_weight('hidden_scale', (shape[-1],), initializer='ones')]

  def call(self, inputs):
    return inputs * self.scales[0]


class _Aliased(layers.Layer):
  """Reads its variable past the attribute."""

  def build(self, shape):
    self.scale = self.add_weight('aliased_scale', (shape[-1],), initializer='ones')
    self._read = lambda scale=self.scale: tf.convert_to_tensor(scale)

  def call(self, inputs):
    return inputs * self._read()


def test_variable_that_is_no_attribute_is_named():
  with pytest.raises(UserError, match='hidden_scale'):
    FunctionalModel(_model(_Listed()))


def test_variable_that_is_read_all_the_same_is_named():
  model = _model(_Aliased())
  with pytest.raises(UserError, match='aliased_scale'):
    FunctionalModel(model)(_other_weights(model), smooth_images(1, (6, 6, 2)))


def test_weights_of_other_shapes_are_refused():
  model = _model(layers.Conv2D(4, 3))
  with pytest.raises(ValueError, match='weights: shapes'):
    FunctionalModel(model)(_other_weights(model)[::-1], smooth_images(1, (6, 6, 2)))
  with pytest.raises(ValueError, match='weights: shapes'):
    FunctionalModel(model)(_other_weights(model)[:-1], smooth_images(1, (6, 6, 2)))
