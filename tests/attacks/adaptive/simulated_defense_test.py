import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.adaptive.simulated_defense import Sensitivity, simulate_round
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning import ShadowDefense, ShadowNoise
from tff_shadow.models import classification_loss
from tff_shadow.shadow import SaliencyConfig


def _public(count=12):
  regions = np.zeros((count, 8, 8, 1), np.uint8)
  regions[:, 2:7, 2:7] = 255
  images = np.rint(255 * smooth_images(count, seed=7)).astype(np.uint8)
  return Examples(images, np.arange(count, dtype=np.int32) % 2, regions)


def _observed(model=None, **settings):
  images = smooth_images(2)
  return play_round(model or small_model(), [(images[:1], [1]), (images[1:], [0])], **settings)


def _defended(observation, shape, kind='ratio', value=0.5, **settings):
  noise = ShadowNoise(shape, NoiseStrength(kind, value), SaliencyConfig(kind='given'), **settings)
  public = ShadowDefense(noise, True, {}).public_settings()
  return dataclasses.replace(observation, defense=public)


def _simulate(observation, num_clients=6, seed=3):
  return simulate_round(
    observation, observation.clients[0], _public(), num_clients=num_clients, seed=seed
  )


def _updates(simulated):
  return [
    np.concatenate([array.ravel() for array in client.update.trainable])
    for client in simulated.observation.clients
  ]


@pytest.mark.parametrize('settings', [{}, {'steps': 3, 'momentum': 0.5}])
def test_without_defence_it_is_the_clients_own_training(settings):
  observation = _observed(**settings)
  simulated = _simulate(observation)
  clients = [(own.images, list(own.labels)) for own in simulated.truth.values()]
  played = play_round(small_model(), clients, **settings)
  for own, other in zip(simulated.observation.clients, played.clients, strict=True):
    for a, b in zip(own.update.trainable, other.update.trainable, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
  for a, b in zip(simulated.observation.aggregate.trainable, played.aggregate.trainable):  # noqa: B905
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('shape', ['isotropic', 'diagonal', 'correlated'])
def test_noise_has_the_ratio_that_the_defence_says(shape):
  observation = _observed()
  clean = _updates(_simulate(observation))
  noised = _updates(_simulate(_defended(observation, shape)))
  ratios = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(clean, noised, strict=True)]
  assert np.mean(ratios) == pytest.approx(0.5, rel=0.05)


def test_clients_have_noises_of_their_own_and_the_seed_decides_them():
  observation = _observed()
  noise = [
    b - a
    for a, b in zip(
      _updates(_simulate(observation)),
      _updates(_simulate(_defended(observation, 'isotropic'))),
      strict=True,
    )
  ]
  assert abs(np.corrcoef(noise)[0, 1]) < 0.1
  again = _updates(_simulate(_defended(observation, 'isotropic')))
  other = _updates(_simulate(_defended(observation, 'isotropic'), seed=4))
  np.testing.assert_array_equal(again[0] - _updates(_simulate(observation))[0], noise[0])
  assert not np.array_equal(again[0], other[0])


def test_noise_in_the_images_moves_the_update_as_correlated_noise_does():
  # A smooth model, or the first order would not be all at rectifiers that switch.
  observation = _observed(small_model(activation='tanh'))
  clean = _updates(_simulate(observation))
  in_images = _simulate(_defended(observation, 'correlated', 'scale', 0.01, propagation='images'))
  in_update = _simulate(_defended(observation, 'correlated', 'scale', 0.01, floor=1e-6))
  for a, b, c in zip(clean, _updates(in_images), _updates(in_update), strict=True):
    assert np.linalg.norm(b - c) < 0.1 * np.linalg.norm(b - a)


def test_deviations_are_the_square_roots_of_sensitivities():
  observation = _defended(_observed(small_model(activation='tanh')), 'diagonal', floor=0.01)
  simulator = ClientSimulator(observation)
  image, label = smooth_images(1, seed=2), np.array([1], np.int32)
  region = np.zeros((1, 8, 8, 1), np.float32)
  region[:, 3:5, 3:5] = 1
  found = Sensitivity(simulator).relative_deviations(observation.defense, image, label, region)
  # All four pixels of the region, one by one, by central differences.
  loss_fn, model = classification_loss(simulator.model), simulator.model

  def gradient(images):
    with tf.GradientTape() as tape:
      loss = loss_fn(label, model(images, training=True))
    return np.concatenate(
      [t.numpy().ravel() for t in tape.gradient(loss, model.trainable_variables)]
    )

  squared = 0.0
  for row, column in np.argwhere(region[0, :, :, 0]):
    step = np.zeros_like(image)
    step[0, row, column, 0] = 1e-2
    squared = squared + np.square((gradient(image + step) - gradient(image - step)) / 2e-2)
  variances = np.sqrt(squared)
  expected = np.sqrt(0.99 * variances / variances.mean() + 0.01)
  flat = np.concatenate([array.ravel() for array in found])
  assert np.sqrt(np.mean(np.square(flat))) == pytest.approx(1, abs=1e-4)
  # Sixteen probes scatter around it.
  assert np.corrcoef(flat, expected)[0, 1] > 0.9
  nothing = Sensitivity(simulator).relative_deviations(
    observation.defense, image, label, np.zeros_like(region)
  )
  assert all((array == 1).all() for array in nothing)


def test_what_cannot_be_simulated_takes_one_line():
  observation = _observed()
  with pytest.raises(UserError, match='13 are needed'):
    _simulate(observation, num_clients=13)
  with pytest.raises(UserError, match="no simulation of the defence 'top_k'"):
    _simulate(dataclasses.replace(observation, defense={'name': 'top_k', 'fraction': 0.1}))
  shared = dataclasses.replace(
    observation.clients[0].update, non_trainable=(np.zeros(3, np.float32),)
  )
  like = dataclasses.replace(observation.clients[0], update=shared)
  with pytest.raises(UserError, match='BatchNorm statistics'):
    simulate_round(observation, like, _public(), num_clients=2, seed=0)
