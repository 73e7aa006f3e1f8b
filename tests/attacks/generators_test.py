import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from attacks.generators import DeepImagePrior, GenerativePrior
from tests.attacks.observed_rounds import psnr, smooth_images
from tests.conftest import make_generator

_SHAPE = (8, 8, 1)
_SMALL = DeepImagePrior(channels=3, noise_channels=2)


def _functional(generator):
  """What `make_generator` computes, by hand."""
  norm = next(
    layer for layer in generator.layers if isinstance(layer, tf.keras.layers.BatchNormalization)
  )

  def call(weights, inputs, training):
    assert not training
    kernel, bias, gamma, beta, last_kernel, last_bias = weights
    x = tf.reshape(inputs, (inputs.shape[0], -1)) @ kernel + bias
    x = (x - norm.moving_mean) * tf.math.rsqrt(norm.moving_variance + norm.epsilon) * gamma + beta
    x = tf.sigmoid(x @ last_kernel + last_bias)
    return tf.reshape(x, (-1, *generator.outputs[0].shape[1:]))

  return call


def _prior(generator=None, **kwargs):
  generator = generator or make_generator()
  return GenerativePrior(generator, _functional(generator), **kwargs)


def _images(*shape, dtype='float32'):
  return tf.constant(np.random.default_rng(7).uniform(size=shape).astype(dtype))


def _shapes(nest):
  return [tuple(tensor.shape) for tensor in tf.nest.flatten(nest)]


def _arrays(nest):
  return [tensor.numpy() for tensor in tf.nest.flatten(nest)]


def _slope(parametrization, parameters, step):
  """Of a function of the images along `step`: by the gradient, and by differences."""

  def value(nest):
    images = parametrization.images(nest)
    weights = np.random.default_rng(3).standard_normal(images.shape)
    return tf.reduce_sum(tf.cast(weights, images.dtype) * images)

  def moved(factor):
    return tf.nest.map_structure(lambda p, s: p + factor * s, parameters, step)

  flat = tf.nest.flatten(parameters)
  with tf.GradientTape() as tape:
    tape.watch(flat)
    loss = value(parameters)
  gradient = tape.gradient(loss, flat)
  by_gradient = sum(
    float(tf.reduce_sum(g * s)) for g, s in zip(gradient, tf.nest.flatten(step), strict=True)
  )
  return by_gradient, float(value(moved(1)) - value(moved(-1))) / 2


def _random_step(nest, size):
  rng = np.random.default_rng(4)
  return tf.nest.map_structure(lambda t: tf.constant(size * rng.standard_normal(t.shape)), nest)


class TestDeepImagePrior:
  @pytest.mark.parametrize('shape', [(2, 3, 32, 32, 3), (1, 1, 19, 42, 1), (1, 2, 64, 64, 1)])
  def test_shapes_and_range(self, shape):
    parameters = _SMALL.parameters(_images(*shape))
    assert {sizes[0] for sizes in _shapes(parameters)} == {shape[0]}
    images = _SMALL.images(parameters)
    assert images.shape == shape
    assert 0 < images.numpy().min() < images.numpy().max() < 1
    for index in range(1, shape[1]):
      assert np.abs(images[:, index] - images[:, 0]).max() > 1e-3

  def test_starts_near_the_mean_of_each_lane(self):
    start = tf.constant(np.array([0.2, 0.7]).reshape(2, 1, 1, 1, 1) * np.ones((2, 1, 16, 16, 1)))
    images = DeepImagePrior().images(DeepImagePrior().parameters(start))
    np.testing.assert_allclose(tf.reduce_mean(images, (1, 2, 3, 4)), [0.2, 0.7], atol=0.05)

  def test_seeds_decide_the_start_of_a_lane(self):
    images = _images(3, 1, 8, 8, 1)
    same = tf.tile(images[:1], (3, 1, 1, 1, 1))
    parameters = _SMALL.parameters(same, seeds=tf.constant([4, 9, 4]))
    for array in _arrays(parameters):
      np.testing.assert_array_equal(array[0], array[2])
    kernel = parameters['output']['kernel'].numpy()
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3
    # A lane does not depend on how many there are, nor where it stands.
    for array, alone in zip(
      _arrays(parameters), _arrays(_SMALL.parameters(same[:1], tf.constant([9]))), strict=True
    ):
      np.testing.assert_array_equal(array[1], alone[0])
    other = dataclasses.replace(_SMALL, seed=1).parameters(same)
    assert np.abs(other['noise'] - _SMALL.parameters(same)['noise']).max() > 0.1

  def test_lanes_are_independent(self):
    parameters = _SMALL.parameters(_images(2, 2, 16, 16, 1))
    before = _SMALL.images(parameters).numpy()
    shifted = tf.nest.map_structure(
      lambda t: t + tf.reshape(tf.constant([0.1, 0.0]), (2, *[1] * (t.shape.rank - 1))), parameters
    )
    after = _SMALL.images(shifted).numpy()
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0] - after[0]).max() > 1e-3

  def test_gradient_equals_differences(self):
    parameters = _SMALL.parameters(_images(2, 2, 8, 11, 2, dtype='float64'))
    by_gradient, by_differences = _slope(_SMALL, parameters, _random_step(parameters, 1e-6))
    assert abs(by_differences) > 1e-7
    assert by_gradient == pytest.approx(by_differences, rel=1e-4)

  def test_only_the_noise_stands_still(self):
    parameters = _SMALL.parameters(_images(2, 1, 16, 16, 1))
    mask = tf.function(_SMALL.active)(parameters, tf.constant(3), 10)
    tf.nest.assert_same_structure(mask, parameters)
    assert _shapes(mask) == _shapes(parameters)
    assert not np.any(mask.pop('noise'))
    assert all(array.all() for array in _arrays(mask))

  def test_fits_an_image(self):
    truth = smooth_images(1, (16, 16, 1))[None]
    prior = DeepImagePrior(channels=16)
    start = prior.parameters(tf.constant(np.full_like(truth, 0.5)))
    mask = tf.nest.flatten(prior.active(start, 0, 1))
    variables = [tf.Variable(tensor) for tensor in tf.nest.flatten(start)]
    adam = tf.keras.optimizers.legacy.Adam(0.01)

    def images():
      return prior.images(tf.nest.pack_sequence_as(start, variables))

    @tf.function
    def step():
      with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(images() - truth))
      gradients = tape.gradient(loss, variables)
      adam.apply_gradients([(g * m, v) for g, m, v in zip(gradients, mask, variables, strict=True)])

    before = psnr(images().numpy(), truth)
    for _ in range(150):
      step()
    assert before < 20
    assert psnr(images().numpy(), truth) > 30

  def test_bad_settings_and_images(self):
    with pytest.raises(ValueError, match='noise_channels must be at least 1'):
      DeepImagePrior(noise_channels=0)
    with pytest.raises(ValueError, match='at least 8 px'):
      _SMALL.parameters(_images(1, 1, 7, 16, 1))
    with pytest.raises(ValueError, match=r'seeds must have the shape \(1,\)'):
      _SMALL.parameters(_images(1, 1, 8, 8, 1), tf.constant([1, 2]))

  def test_settings_are_plain_values(self):
    assert json.loads(json.dumps(dataclasses.asdict(_SMALL)))['name'] == 'deep_image_prior'


class TestGenerativePrior:
  @pytest.mark.parametrize('weight_share', [0.0, 0.5])
  @pytest.mark.parametrize('latent', [(5,), (2, 3)])
  def test_starts_with_the_generator_s_own_images(self, weight_share, latent):
    generator = make_generator(latent=latent)
    prior = _prior(generator, weight_share=weight_share)
    parameters = prior.parameters(_images(3, 2, *_SHAPE))
    latents = parameters['latents']
    assert latents.shape == (3, 2, *latent)
    assert len(parameters['weights']) == (6 if weight_share else 0)
    images = prior.images(parameters)
    assert images.shape == (3, 2, *_SHAPE)
    for lane in range(3):
      np.testing.assert_allclose(images[lane], generator(latents[lane]), atol=1e-6)

  def test_latents_are_standard_normal_and_seeded(self):
    prior = _prior(make_generator(latent=(400,)), weight_share=0.0)
    images = _images(3, 4, *_SHAPE)
    latents = prior.parameters(images, seeds=tf.constant([3, 8, 3]))['latents'].numpy()
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 1) < 0.05
    np.testing.assert_array_equal(latents[0], latents[2])
    assert np.abs(np.corrcoef(latents[0].ravel(), latents[1].ravel())[0, 1]) < 0.1

  def test_moves_weights_by_their_scale(self):
    generator = make_generator()
    prior = _prior(generator, weight_scale=0.1)
    parameters = prior.parameters(_images(2, 1, *_SHAPE))
    parameters['weights'][-1] += tf.constant([[0.0], [2.0]])
    images = prior.images(parameters).numpy()
    last = generator.layers[-2]
    before = last.bias.numpy()
    np.testing.assert_allclose(images[0], generator(parameters['latents'][0]), atol=1e-6)
    last.bias.assign(before + 0.2)
    np.testing.assert_allclose(images[1], generator(parameters['latents'][1]), atol=1e-6)

  @pytest.mark.parametrize('weight_share', [0.0, 0.5])
  def test_gradient_equals_differences(self, weight_share):
    with_policy = tf.keras.backend.floatx()
    tf.keras.backend.set_floatx('float64')
    try:
      prior = _prior(make_generator(), weight_share=weight_share)
    finally:
      tf.keras.backend.set_floatx(with_policy)
    parameters = prior.parameters(_images(2, 2, *_SHAPE, dtype='float64'))
    by_gradient, by_differences = _slope(prior, parameters, _random_step(parameters, 1e-5))
    assert abs(by_differences) > 1e-7
    assert by_gradient == pytest.approx(by_differences, rel=1e-6)

  def test_another_type_than_the_generator_s(self):
    prior = _prior()
    parameters = prior.parameters(_images(1, 1, *_SHAPE, dtype='float64'))
    assert {tensor.dtype for tensor in tf.nest.flatten(parameters)} == {tf.float64}
    with tf.GradientTape() as tape:
      tape.watch(parameters)
      images = prior.images(parameters)
    assert images.dtype == tf.float64
    gradients = tape.gradient(images, parameters)
    assert np.abs(gradients['latents']).max() > 0
    assert np.abs(gradients['weights'][0]).max() > 0

  @pytest.mark.parametrize('latents_last', [True, False])
  def test_latents_move_first_and_then_the_weights(self, latents_last):
    prior = _prior(weight_share=0.25, latents_last=latents_last)
    parameters = prior.parameters(_images(2, 1, *_SHAPE))
    active = tf.function(prior.active)
    for iteration in (0, 74, 75, 99):
      mask = active(parameters, tf.constant(iteration), 100)
      assert _shapes(mask) == _shapes(parameters)
      last = iteration >= 75
      assert np.unique(mask['latents']) == [float(latents_last or not last)]
      assert all(np.unique(array) == [float(last)] for array in _arrays(mask['weights']))

  def test_settings_are_plain_values(self):
    settings = json.loads(json.dumps(dataclasses.asdict(_prior(source='g.keras'))))
    assert settings['source'] == 'g.keras'
    assert 'generator' not in settings
    with pytest.raises(ValueError, match='weight_share must be in'):
      _prior(weight_share=1.5)
