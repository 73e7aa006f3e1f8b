import numpy as np
import pytest
import tensorflow as tf

from attacks.functional_model import FunctionalModel
from attacks.generators import GenerativePrior
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator
from tff_shadow.shadow import build_generator, synthesis_variables

_SMALL = {'latent_size': 6, 'channels': 2}


def _latents(count=3, size=6, seed=0):
  return tf.random.stateless_normal((count, size), (seed, 1))


@pytest.mark.parametrize(('size', 'channels'), [(32, 3), (64, 1), (96, 1), (128, 3), (224, 3)])
def test_images(size, channels):
  generator = build_generator((size, size, channels), **_SMALL)
  images = generator(_latents()).numpy()
  assert images.shape == (3, size, size, channels)
  assert 0 < images.min() < images.max() < 1
  # Each latent has its own image, with structure; and nothing is drawn at random.
  assert np.abs(images[0] - images[1]).max() > 0.05
  assert images.std(axis=(1, 2)).min() > 0.01
  np.testing.assert_array_equal(images, generator(_latents()))
  prefixes = {layer.name.split('_')[0] for layer in generator.layers}
  assert prefixes == {'latent', 'mapping', 'synthesis'}


def test_images_of_a_batch_do_not_meet():
  generator = build_generator((32, 32, 1), **_SMALL)
  together = generator(_latents())
  np.testing.assert_allclose(together[1:2], generator(_latents()[1:2]), atol=1e-6)


def test_seed_decides_the_weights_and_the_global_seed_does_not():
  def weights(seed):
    return build_generator((32, 32, 1), **_SMALL, seed=seed).get_weights()

  tf.keras.utils.set_random_seed(1)
  first = weights(0)
  tf.keras.utils.set_random_seed(2)
  for one, same in zip(first, weights(0), strict=True):
    np.testing.assert_array_equal(one, same)
  assert any(np.abs(one - other).max() > 0.01 for one, other in zip(first, weights(1), strict=True))
  kernels = [array.ravel()[:4].tolist() for array in first if array.ndim > 1 and array.size >= 4]
  assert len(np.unique(kernels, axis=0)) == len(kernels)


def test_file_loads_in_safe_mode_without_custom_objects(tmp_path):
  generator = build_generator((32, 32, 3), **_SMALL)
  generator.save(tmp_path / 'g.keras')
  loaded = load_generator(str(tmp_path / 'g.keras'), (32, 32, 3))
  np.testing.assert_array_equal(loaded(_latents()), generator(_latents()))
  names = [variable.name for variable in synthesis_variables(generator)]
  assert [variable.name for variable in synthesis_variables(loaded)] == names
  stock = tf.keras.layers.__dict__.values()
  assert all(type(layer) in stock for layer in loaded.layers)
  with pytest.raises(UserError, match=r'shape \(32, 32, 3\), the data has \(64, 64, 3\)'):
    load_generator(str(tmp_path / 'g.keras'), (64, 64, 3))


def test_synthesis_variables_are_all_but_the_mapping():
  generator = build_generator((32, 32, 1), **_SMALL)
  variables = synthesis_variables(generator)
  assert len(variables) == len(generator.trainable_variables) - 4
  assert all(variable.name.startswith('synthesis') for variable in variables)
  mapping = tf.keras.Sequential([tf.keras.Input((5,)), tf.keras.layers.Dense(4)], name='mapping')
  inputs = tf.keras.Input((5,))
  own = tf.keras.Model(inputs, tf.keras.layers.Dense(3, name='drawing')(mapping(inputs)))
  assert [variable.name for variable in synthesis_variables(own)] == [
    'drawing/kernel:0',
    'drawing/bias:0',
  ]
  assert len(synthesis_variables(mapping)) == 2  # Its own name is not a layer's.
  with pytest.raises(UserError, match='no trainable weights'):
    synthesis_variables(tf.keras.Model(inputs, mapping(inputs)))


def test_every_weight_moves_the_images():
  generator = build_generator((32, 32, 1), **_SMALL)
  target = np.random.default_rng(0).random((3, 32, 32, 1))
  with tf.GradientTape() as tape:
    loss = tf.reduce_mean(tf.square(generator(_latents()) - target))
  for variable, gradient in zip(
    generator.trainable_variables, tape.gradient(loss, generator.trainable_variables), strict=True
  ):
    assert gradient is not None, variable.name
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-9, variable.name


def test_as_a_function_of_its_weights():
  generator = build_generator((32, 32, 1), **_SMALL)
  functional = FunctionalModel(generator)
  weights = [tf.constant(variable) for variable in generator.trainable_variables]
  before = generator(_latents())
  np.testing.assert_allclose(functional(weights, _latents(), False), before, atol=1e-6)
  moved = [1.1 * weight for weight in weights]
  images = functional(moved, _latents(), False)
  for variable, weight in zip(generator.trainable_variables, moved, strict=True):
    variable.assign(weight)
  np.testing.assert_allclose(images, generator(_latents()), atol=1e-6)
  assert np.abs(images - before).max() > 0.01


def test_generative_prior_searches_latents_and_weights():
  prior = GenerativePrior(build_generator((32, 32, 1), **_SMALL))
  parameters = prior.parameters(tf.zeros((2, 1, 32, 32, 1)))
  with tf.GradientTape() as tape:
    tape.watch(parameters)
    images = prior.images(parameters)
  assert images.shape == (2, 1, 32, 32, 1)
  gradients = tape.gradient(images, parameters)
  assert np.abs(gradients['latents']).max() > 0
  assert all(np.abs(gradient).max() > 0 for gradient in gradients['weights'])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'image_shape': (50, 50, 1)}, r'\(50, 50, 1\).* 32, 40, 48, .*, 224, 256 px'),
    ({'image_shape': (16, 16, 1)}, r'\(16, 16, 1\)'),
    ({'image_shape': (64, 32, 1)}, 'must be square'),
    ({'image_shape': (32, 32, 2)}, 'grey or RGB'),
    ({'image_shape': (32, 32, 1), 'latent_size': 0}, 'latent_size must be at least 1'),
    ({'image_shape': (32, 32, 1), 'channels': -2}, 'channels must be at least 1'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(UserError, match=message):
    build_generator(**arguments)
