import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from attacks.engine import attack_observation
from attacks.generators import GenerativePrior
from attacks.matching import NoMatching
from attacks.presets import PRESETS
from attacks.shared_solvers import SharedSolvers
from tests.attacks.batch_norm_statistics_test import _statistics_sent
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.observations import WeightArrays


@pytest.mark.parametrize('name', [n for n, preset in PRESETS.items() if not preset.needs_generator])
def test_preset_runs_and_is_plain_data(name):
  image = smooth_images(1, (16, 16, 1))
  observation = play_round(small_model((16, 16, 1)), [(image, [1])])
  config = PRESETS[name].build()
  json.dumps(config.as_dict(), allow_nan=False)
  config = dataclasses.replace(
    config,
    iterations=4,
    xla='off',
    restarts=2,
    # This model has no BatchNorm.
    batch_norm_statistics=dataclasses.replace(config.batch_norm_statistics, required=False),
  )
  result = attack_observation(observation, config, controls=False)[0]
  assert result.status == 'ok'
  assert result.labels == (1,)
  assert np.isfinite(result.reconstructions['attack']).all()
  assert PRESETS[name].source


def test_line_search_finds_an_image_through_a_smooth_network():
  image = smooth_images(1, seed=4)
  observation = play_round(small_model(activation='sigmoid'), [(image, [1])])
  config = dataclasses.replace(
    PRESETS['idlg'].build(), iterations=120, xla='off', dtype='float64', seed=1
  )
  result = attack_observation(observation, config, controls=False)[0]
  assert psnr(result.reconstructions['attack'][0], image[0]) > 40


_SHAPE = (16, 16, 1)


@pytest.fixture(scope='module')
def with_statistics():
  """A round of one client that shares its BatchNorm statistics."""
  model = small_model(_SHAPE, norm='batch')
  observation = play_round(model, [(smooth_images(2, _SHAPE), [0, 1])])
  client = observation.clients[0]
  update = WeightArrays(client.update.trainable, _statistics_sent(model, observation))
  return dataclasses.replace(observation, clients=(dataclasses.replace(client, update=update),))


def _generator():
  inputs = tf.keras.Input((6,))
  x = tf.keras.layers.Dense(256, activation='sigmoid')(inputs)
  return tf.keras.Model(inputs, tf.keras.layers.Reshape(_SHAPE)(x))


def _config(name, iterations=120):
  preset = PRESETS[name]
  config = dataclasses.replace(preset.build(), iterations=iterations, xla='off')
  if preset.needs_generator:
    tf.keras.utils.set_random_seed(1)
    config = dataclasses.replace(config, parametrization=preset.search_in(_generator(), 'g', 0))
  return config


def _changed(observation, part, factor):
  client = observation.clients[0]
  arrays = tuple(factor * array for array in getattr(client.update, part))
  update = dataclasses.replace(client.update, **{part: arrays})
  return dataclasses.replace(observation, clients=(dataclasses.replace(client, update=update),))


def _found(observation, config, shared):
  (result,) = attack_observation(
    observation, config, labels={'client_00': [0, 1]}, shared=shared, controls=False
  )
  assert result.status == 'ok'
  return result.reconstructions['attack']


@pytest.mark.parametrize('name', ['shadow_pixels', 'shadow_generator'])
def test_released_attacks_do_not_see_the_update_but_its_statistics(with_statistics, name):
  other_weights = _changed(with_statistics, 'trainable', -2.0)
  other_statistics = _changed(with_statistics, 'non_trainable', 1.5)
  # Other updates of the same round are attacked without tracing again.
  shared = SharedSolvers([with_statistics])
  released = _config(f'{name}_released')
  image = _found(with_statistics, released, shared)
  np.testing.assert_array_equal(image, _found(other_weights, released, shared))
  assert np.abs(image - _found(other_statistics, released, shared)).max() > 1e-4
  ours = _config(name)
  differentiated = _found(with_statistics, ours, shared)
  assert np.abs(differentiated - _found(other_weights, ours, shared)).max() > 1e-5
  assert dataclasses.replace(ours, matching=NoMatching()).as_dict() == released.as_dict()


def test_released_attack_comes_nearer_to_the_statistics_and_keeps_its_best(with_statistics):
  config = dataclasses.replace(_config('shadow_pixels_released'), langevin=0.0)
  result, short = (
    attack_observation(with_statistics, own, controls=False)[0]
    for own in (config, dataclasses.replace(config, iterations=1))
  )
  assert result.loss < 0.8 * short.loss


def test_without_statistics_the_released_attack_is_its_own_control():
  observation = play_round(small_model(_SHAPE), [(smooth_images(1, _SHAPE), [1])])
  config = _config('shadow_pixels_released')
  config = dataclasses.replace(
    config,
    batch_norm_statistics=dataclasses.replace(config.batch_norm_statistics, weight=0.0),
    # Best by its own loss for the attack, the last for the control: the same where it only falls.
    langevin=0.0,
  )
  result = attack_observation(observation, config, labels={'client_00': [1]})[0]
  distance = np.abs(result.reconstructions['attack'] - result.reconstructions['prior_only']).max()
  assert distance < 0.05


def test_generator_moves_latents_first_and_then_weights_alone():
  config = _config('shadow_generator')
  prior = config.parametrization
  assert isinstance(prior, GenerativePrior)
  parameters = prior.parameters(tf.zeros((1, 2, *_SHAPE)))
  first, last = (prior.active(parameters, tf.constant(k), config.iterations) for k in (59, 60))
  assert (first['latents'].numpy().all(), first['weights'][0].numpy().any()) == (True, False)
  assert (last['latents'].numpy().any(), last['weights'][0].numpy().all()) == (False, True)
  steps = config.optimizer.learning_rate * prior.weight_scale
  assert (config.optimizer.learning_rate, steps) == (1e-2, pytest.approx(1e-4))
