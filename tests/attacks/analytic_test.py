import numpy as np
import pytest
import tensorflow as tf

from attacks.analytic import has_first_dense, recover_from_first_dense
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.errors import UserError
from tff_shadow.models import build_model, classification_loss

layers = tf.keras.layers
_SHAPE = (8, 8, 1)


def _mlp(*hidden, image_shape=_SHAPE, num_classes=2, front=(), activation='relu', seed=0):
  tf.keras.utils.set_random_seed(seed)
  inputs = x = tf.keras.Input(image_shape)
  for layer in (*front, layers.Flatten()):
    x = layer(x)
  for units in hidden:
    x = layers.Dense(units, activation=activation)(x)
  return tf.keras.Model(inputs, layers.Dense(num_classes)(x))


def _standardised():
  return (layers.Rescaling(4.0, offset=-2.0),)


def _gradient(model, images, labels):
  with tf.GradientTape() as tape:
    loss = classification_loss(model)(np.asarray(labels), model(images, training=True))
  return tape.gradient(loss, model.trainable_variables)


def _noise_images(count, image_shape=_SHAPE, seed=0):
  return np.random.default_rng(seed).uniform(size=(count, *image_shape)).astype(np.float32)


def _found(result, images):
  """Which image each found one shows to 60 dB; None for a mixture."""
  matches = []
  for found in result.images:
    errors = np.mean((images.astype(np.float64) - found) ** 2, axis=(1, 2, 3))
    matches.append(int(np.argmin(errors)) if errors.min() <= 1e-6 else None)
  return matches


class TestOneImage:
  @pytest.mark.parametrize('image_shape', [(8, 8, 1), (6, 5, 3)])
  @pytest.mark.parametrize(
    'front',
    [
      lambda: (),
      _standardised,
      lambda: (layers.Rescaling(1 / 0.3, offset=-0.5), layers.Reshape((-1,))),
      lambda: (layers.Normalization(mean=0.4, variance=0.05),),
      lambda: (tf.keras.Sequential(_standardised()),),
    ],
    ids=['plain', 'rescaled', 'reshaped', 'normalised', 'nested'],
  )
  def test_is_exact(self, image_shape, front):
    model = _mlp(32, 16, image_shape=image_shape, num_classes=3, front=front())
    image = _noise_images(1, image_shape)
    result = recover_from_first_dense(model, _gradient(model, image, [2]), 1, image_shape)
    assert result.images.dtype == np.float32
    np.testing.assert_allclose(result.images, image, atol=1e-5)
    assert result.support.tolist() == [result.units]
    assert 0 < result.units <= 32

  def test_needs_no_rectifier_and_no_scale(self):
    model = _mlp(16, activation='tanh', front=_standardised())
    image = _noise_images(1)
    gradient = [-0.03 * part for part in _gradient(model, image, [1])]
    result = recover_from_first_dense(model, gradient, 1, _SHAPE)
    np.testing.assert_allclose(result.images, image, atol=1e-5)

  def test_a_sequential_model_of_one_layer(self):
    model = tf.keras.Sequential([tf.keras.Input(_SHAPE), layers.Flatten(), layers.Dense(2)])
    image = _noise_images(1)
    result = recover_from_first_dense(model, _gradient(model, image, [1]), 1, _SHAPE)
    np.testing.assert_allclose(result.images, image, atol=1e-5)

  def test_pixels_out_of_range_are_clipped(self):
    model = _mlp(16)
    image = _noise_images(1) + 0.5
    result = recover_from_first_dense(model, _gradient(model, image, [1]), 1, _SHAPE)
    np.testing.assert_allclose(result.images, np.clip(image, 0, 1), atol=1e-5)

  def test_of_an_observed_update(self):
    images = smooth_images(1)
    observation = play_round(_mlp(64, front=_standardised()), [(images, [1])])
    simulator = ClientSimulator(observation)
    gradient = simulator.observed_gradient(observation.clients[0])
    result = recover_from_first_dense(simulator.model, gradient, 1, _SHAPE)
    assert psnr(result.images[0], images[0]) > 80


class TestSeveralImages:
  @pytest.mark.parametrize(('num_classes', 'hidden'), [(2, (256,)), (5, (256,)), (2, (256, 32))])
  def test_all_four_are_exact(self, num_classes, hidden):
    model = _mlp(*hidden, num_classes=num_classes, front=_standardised())
    images = _noise_images(4)
    gradient = _gradient(model, images, [0, 1, 1, 0])
    result = recover_from_first_dense(model, gradient, 4, _SHAPE)
    assert sorted(_found(result, images)) == [0, 1, 2, 3]
    assert (np.diff(result.support) <= 0).all()
    assert (result.support >= 2).all()

  def test_a_mixture_that_more_units_vouch_for_is_no_image(self):
    model = _mlp(256, front=_standardised())
    images = smooth_images(2)
    # Of the same class: the mixture of both is between them, within the range of pixels.
    gradient = [part.numpy() for part in _gradient(model, images, [1, 1])]
    quotients = ((gradient[0] / np.where(gradient[1] == 0, 1, gradient[1]) + 2) / 4).T
    mixed = quotients[np.argmax(np.abs(gradient[1]))]
    mixed_support = np.sum(np.abs(quotients - mixed).max(axis=1) < 1e-4)
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    result = recover_from_first_dense(model, gradient, 2, _SHAPE)
    assert sorted(_found(result, images)) == [0, 1]
    assert mixed_support > result.support.max()

  def test_images_that_few_units_vouch_for_are_not_lost_among_mixtures(self):
    model = _mlp(64, front=_standardised())
    images = smooth_images(4)
    result = recover_from_first_dense(model, _gradient(model, images, [0, 1, 1, 0]), 4, _SHAPE)
    assert sorted(_found(result, images)) == [0, 1, 2, 3]
    assert result.support.min() <= 3

  def test_a_mixture_out_of_range_is_no_image(self):
    model = _mlp(16, front=_standardised())
    kernel, bias, last_kernel, last_bias = model.get_weights()
    # All units are on for both images, which pull about as hard in opposite directions.
    model.set_weights([kernel, bias + 10, 0.01 * last_kernel, last_bias])
    images = _noise_images(2)
    result = recover_from_first_dense(model, _gradient(model, images, [0, 1]), 2, _SHAPE)
    assert result.units == 16
    assert len(result.images) == 0

  def test_a_mixture_that_would_not_switch_its_unit_on_is_no_image(self):
    model = _mlp(1)
    # The unit is on for both images; one pulls 0.7 times as hard as the other, the other way.
    weights = [np.full((64, 1), 1 / 64), [-0.45], [[0.01, 0]], [np.log(1 / 0.7), 0]]
    model.set_weights([np.array(array) for array in weights])
    images = np.concatenate([np.full((1, *_SHAPE), level, np.float32) for level in (0.6, 0.5)])
    gradient = [part.numpy() for part in _gradient(model, images, [0, 1])]
    mixed = gradient[0] / gradient[1]
    assert mixed.min() > 0.2
    assert mixed.max() < 0.3
    assert len(recover_from_first_dense(model, gradient, 2, _SHAPE).images) == 0

  def test_order_of_images_and_of_units_does_not_matter(self):
    model = _mlp(256, num_classes=3, front=_standardised())
    images, labels = _noise_images(4), np.array([0, 2, 1, 1])
    first = recover_from_first_dense(model, _gradient(model, images, labels), 4, _SHAPE)
    order = np.random.default_rng(1).permutation(256)
    kernel, bias, *rest = model.get_weights()
    model.set_weights([kernel[:, order], bias[order], rest[0][order], rest[1]])
    turned = _gradient(model, images[[2, 0, 3, 1]], labels[[2, 0, 3, 1]])
    second = recover_from_first_dense(model, turned, 4, _SHAPE)
    np.testing.assert_allclose(second.images, first.images, atol=1e-5)
    np.testing.assert_array_equal(second.support, first.support)

  def test_of_an_observed_update_behind_a_layer_of_its_own(self):
    tf.keras.utils.set_random_seed(0)
    inputs = tf.keras.Input(_SHAPE)
    x = layers.Dense(256)(layers.Flatten()(*[layer(inputs) for layer in _standardised()]))
    model = tf.keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x)))
    images = _noise_images(3)
    # The simulator replaces the rectifier by its own.
    observation = play_round(model, [(images, [1, 0, 1])])
    simulator = ClientSimulator(observation)
    gradient = simulator.observed_gradient(observation.clients[0])
    result = recover_from_first_dense(simulator.model, gradient, 3, _SHAPE)
    assert sorted(_found(result, images)) == [0, 1, 2]

  def test_a_narrow_layer_gives_at_most_as_many_as_asked_for(self):
    model = _mlp(12, front=_standardised())
    images = smooth_images(6)
    result = recover_from_first_dense(model, _gradient(model, images, [0, 1] * 3), 6, _SHAPE)
    assert len(result.images) <= 6
    assert result.images.shape[1:] == _SHAPE
    assert len(result.support) == len(result.images)

  def test_a_zero_gradient_gives_no_image(self):
    model = _mlp(12)
    for num_images in (1, 2):
      zeros = [np.zeros(v.shape, np.float32) for v in model.trainable_variables]
      result = recover_from_first_dense(model, zeros, num_images, _SHAPE)
      assert result.images.shape == (0, *_SHAPE)
      assert result.units == 0


def _frozen_front():
  return _mlp(4, front=(layers.Conv2D(2, 3, trainable=False),))


def _branched():
  inputs = tf.keras.Input(_SHAPE)
  x = layers.Concatenate()([layers.Rescaling(2.0)(inputs), inputs])
  return tf.keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (small_model, "begins with 'conv2d.*', a Conv2D"),
    (
      lambda: build_model('conv_small', image_shape=_SHAPE, num_classes=2, seed=0),
      "begins with 'conv0', a Conv2D",
    ),
    (lambda: _mlp(4, front=(layers.BatchNormalization(),)), 'a BatchNormalization'),
    (lambda: _mlp(front=(layers.Flatten(), layers.Dense(4, use_bias=False))), 'has none'),
    (lambda: _mlp(front=(layers.Dense(4),)), 'sees pixels one by one'),
    (_frozen_front, "sees not the image but what 'conv2d"),
    (lambda: _mlp(4, front=(layers.Permute((2, 1, 3)),)), "what 'permute"),
    (_branched, "what 'concatenate"),
  ],
)
def test_other_models_are_refused(model, message):
  model = model()
  assert not has_first_dense(model)
  gradient = [np.ones(v.shape, np.float32) for v in model.trainable_variables]
  with pytest.raises(UserError, match=message):
    recover_from_first_dense(model, gradient, 1, _SHAPE)


def test_a_model_without_trainable_layers_is_refused():
  model = _mlp(4)
  model.trainable = False
  assert not has_first_dense(model)
  with pytest.raises(UserError, match='no trainable layer'):
    recover_from_first_dense(model, [], 1, _SHAPE)


def _normalised():
  inputs = tf.keras.Input(_SHAPE)
  x = layers.BatchNormalization()(layers.Dense(8)(layers.Flatten()(inputs)))
  return tf.keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x)))


@pytest.mark.parametrize(
  'model',
  [
    lambda: _mlp(8, activation='tanh'),
    lambda: _mlp(8, activation='linear'),
    lambda: _mlp(8, activation=tf.nn.relu6),
    _normalised,
    _mlp,
  ],
  ids=['tanh', 'linear', 'relu6', 'batch_norm', 'logits'],
)
def test_several_images_need_a_rectifier(model):
  model = model()
  assert has_first_dense(model)
  gradient = _gradient(model, _noise_images(2), [0, 1])
  with pytest.raises(UserError, match='2 images can be told apart only where a rectifier'):
    recover_from_first_dense(model, gradient, 2, _SHAPE)


def test_images_of_another_shape_are_refused():
  model = _mlp(8)
  gradient = _gradient(model, _noise_images(1), [0])
  with pytest.raises(UserError, match=r'sees 64 values, an image of shape \(9, 9, 1\) has 81'):
    recover_from_first_dense(model, gradient, 1, (9, 9, 1))
