import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from attacks.adaptive import attacker as attacker_module
from attacks.adaptive.attacker import AdaptiveAttacker, Effort
from attacks.adaptive.players import NO_EQUIPMENT, build_player
from attacks.adaptive.recognition import log_likelihoods
from attacks.adaptive.simulated_updates import SimulatedClients, flat
from attacks.config import AttackConfig
from attacks.local_steps import local_steps
from attacks.noise_covariance import NoiseCovariance
from tests.attacks.adaptive.simulated_defense_test import _defended, _observed, _public
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.observations import Truth, WeightArrays

_SIDE = 4
_NOT_HEARD = 1e-9


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
  """Enough for these models, in less than half of the time."""
  monkeypatch.setattr(attacker_module, '_NOISE_DRAWS', 160)


def _linear_model(copies=1):
  """The gradient of its kernel is the image, by sign and half, as often as there are copies."""
  inputs = tf.keras.Input((_SIDE, _SIDE, 1))
  seen = tf.keras.layers.Flatten()(inputs)
  seen = tf.keras.layers.Concatenate()([seen] * copies) if copies > 1 else seen
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2, kernel_initializer='zeros')(seen))


def _images(count, seed, spread=0.1):
  rng = np.random.default_rng(seed)
  images = 0.5 + spread * rng.standard_normal((count, _SIDE, _SIDE, 1))
  return np.clip(images, 0, 1).astype(np.float32)


def _known(images):
  """All of one class."""
  region = np.ones((1, _SIDE, _SIDE, 1), np.float32)
  return [Truth(image[None], np.zeros(1, np.int32), region) for image in images]


def _round(model, kind, value):
  image = _images(1, seed=9)
  observation = play_round(model, [(image, [0])])
  return _defended(observation, 'isotropic', kind, value)


def _played(observation, spread=0.1):
  images = _images(60, seed=5, spread=spread)
  public = Examples(
    np.rint(255 * images).astype(np.uint8),
    np.zeros(60, np.int32),
    np.full((60, _SIDE, _SIDE, 1), 255, np.uint8),
  )
  return SimulatedClients(public, observation.clients[0], 60, (), 0)


def _clients(observation, known, draws):
  """What so many clients send that have the first of the known images."""
  player = build_player(observation, False)
  like = observation.clients[0]
  steps = local_steps(like, observation.client_training)
  return [
    dataclasses.replace(like, update=player.update(known[0], steps, (77, draw)))
    for draw in range(draws)
  ]


def test_of_two_images_it_errs_as_seldom_as_any_test_can():
  known = _known(_images(2, seed=3))
  observation = _round(_linear_model(), 'scale', 1.0)
  rate = observation.client_training.learning_rate
  # Both columns of the kernel's gradient are half the image.
  apart = rate * np.sqrt(0.5) * np.linalg.norm(known[0].images - known[1].images)
  deviation = apart / 1.5
  observation = _round(_linear_model(), 'scale', float(deviation))
  found = log_likelihoods(
    observation, _clients(observation, known, 300), known, _played(observation), NO_EQUIPMENT
  )
  right = int(np.sum(found[:, 0] > found[:, 1]))
  expected = stats.norm.cdf(apart / (2 * deviation))
  assert 0.7 < expected < 0.8
  assert stats.binomtest(right, 300, expected).pvalue > 1e-3


def test_noise_as_loud_as_the_update_tells_a_bright_image_from_a_dark_one():
  known = _known(np.stack([np.full((_SIDE, _SIDE, 1), v, np.float32) for v in (0.4, 0.5, 0.6)]))
  model, right = _linear_model(copies=64), {}
  for kind, value in (('ratio', 30.0), ('scale', _NOT_HEARD)):
    observation = _round(model, kind, value)
    if kind == 'scale':
      # As loud as the other, but the same for all.
      norm = np.linalg.norm(flat(_clients(observation, known, 1)[0].update))
      count = flat(observation.clients[0].update).size
      observation = _round(model, kind, float(30 * norm / np.sqrt(count)))
    found = log_likelihoods(
      observation,
      _clients(observation, known, 60),
      known,
      _played(observation, spread=0.2),
      NO_EQUIPMENT,
    )
    right[kind] = np.mean(np.argmax(found, axis=1) == 0)
  assert right['ratio'] > 0.95
  assert right['scale'] < 0.7


def test_noise_of_a_known_covariance_is_looked_past():
  known = _known(_images(20, seed=3))
  observation = _round(_linear_model(), 'scale', _NOT_HEARD)
  (client,) = _clients(observation, known, 1)
  rng = np.random.default_rng(0)
  size = flat(client.update).size
  directions = np.linalg.qr(rng.standard_normal((size, 3)))[0].astype(np.float32)
  loud = directions @ np.full(3, 10.0, np.float32)
  (kernel, bias) = client.update.trainable
  update = WeightArrays((kernel + loud[: kernel.size].reshape(kernel.shape), bias + loud[-2:]))
  clients = [dataclasses.replace(client, update=update)]

  def place(covariance):
    (found,) = log_likelihoods(
      observation, clients, known, _played(observation), NO_EQUIPMENT, covariance
    )
    return int(np.sum(found >= found[0]))

  assert place(NoiseCovariance(directions, np.full(3, 1e12, np.float32))) == 1
  assert place(None) > 1


def test_without_noise_the_own_image_fits_alone():
  observation = dataclasses.replace(_round(_linear_model(), 'scale', 1.0), defense={'name': 'none'})
  known = _known(_images(8, seed=3))
  (found,) = log_likelihoods(
    observation, _clients(observation, known, 1), known, _played(observation), NO_EQUIPMENT
  )
  assert np.argmax(found) == 0
  assert np.isfinite(found).all()
  assert found[0] > np.sort(found)[-2] + 100


def test_an_update_that_is_not_finite_tells_nothing():
  known = _known(_images(3, seed=3))
  observation = _round(_linear_model(), 'scale', 0.01)
  (client,) = _clients(observation, known, 1)
  broken = WeightArrays(tuple(np.full_like(array, np.nan) for array in client.update.trainable))
  clients = [client, dataclasses.replace(client, update=broken)]
  found = log_likelihoods(observation, clients, known, _played(observation), NO_EQUIPMENT)
  assert np.isfinite(found[0]).all()
  assert np.isnan(found[1]).all()


def _attacker(public=12):
  return AdaptiveAttacker(_public(public), AttackConfig(seed=0), Effort(0, 0, 0))


def _truth(observation, images):
  region = np.ones((1, *observation.image_shape[:2], 1), np.float32)
  return {
    client.client_id: Truth(image[None], np.array([k % 2], np.int32), region)
    for k, (client, image) in enumerate(zip(observation.clients, images, strict=True))
  }


def test_likelihoods_of_rounds_add_up():
  images = _public().float_images()[:2]
  truth = _truth(_observed(), images)
  defended = _defended(_observed(), 'isotropic', value=6.0)
  fresh = {**defended.defense, 'frozen': False}
  rounds = []
  for number in (1, 2):
    seen = dataclasses.replace(defended, round_num=number, defense=fresh)
    player = build_player(seen, False)
    clients = tuple(
      dataclasses.replace(
        own,
        update=player.update(
          truth[own.client_id], local_steps(own, seen.client_training), (number, place)
        ),
      )
      for place, own in enumerate(seen.clients)
    )
    rounds.append(dataclasses.replace(seen, clients=clients))
  names = list(truth)
  known = list(truth.values())
  apart = [_attacker()._log_likelihoods([seen], names, known, '') for seen in rounds]
  together = _attacker()._log_likelihoods(rounds, names, known, '')
  np.testing.assert_allclose(together, apart[0] + apart[1], rtol=1e-9)
  assert np.abs(apart[0] - apart[1]).min() > 0.01


def test_a_defence_that_cannot_be_played_is_told():
  observation = dataclasses.replace(_observed(), defense={'name': 'prayer'})
  truth = _truth(observation, _public().float_images()[:2])
  with pytest.raises(UserError, match='prayer'):
    _attacker().recognize([observation], list(truth), truth)


def _recognized(model, count, steps, value=None):
  """Of two clients of so many images: places of the own ones, and of those of the other."""
  images = smooth_images(2 * count, seed=3)
  labels = np.random.default_rng(1).integers(0, 2, 2 * count, np.int32)
  owned = [(images[:count], labels[:count]), (images[count:], labels[count:])]
  clean = play_round(model, owned, steps=steps)
  observation = clean if value is None else _defended(clean, 'isotropic', value=value)
  region = np.ones((count, 8, 8, 1), np.float32)
  truth = {
    client.client_id: Truth(*own, region) for client, own in zip(clean.clients, owned, strict=True)
  }
  if value is not None:
    player = build_player(observation, False)
    clients = [
      dataclasses.replace(
        client,
        update=player.update(
          truth[client.client_id], local_steps(client, clean.client_training), (1, place)
        ),
      )
      for place, client in enumerate(clean.clients)
    ]
    observation = dataclasses.replace(observation, clients=tuple(clients))
  found = _attacker(80).recognize([observation], list(truth), truth)
  owners = np.repeat([0, 1], count)
  assert found.owners == owners.tolist()
  assert found.choices == 80 + 2 * count
  places = np.arange(2 * count)
  return found.ranks[owners, places], found.ranks[1 - owners, places]


@pytest.mark.parametrize('steps', [1, 2])
def test_images_of_a_batch_are_found_among_others(steps):
  own, other = _recognized(small_model(), 3, steps, value=0.1)
  assert np.median(own) <= 2
  assert own.max() <= 8
  assert np.median(other) > 15


def test_images_that_add_alike_are_told_apart():
  own, other = _recognized(small_model(), 10, steps=1)
  assert own.max() == 1
  assert np.median(other) > 15


def test_images_that_were_normalised_with_others_are_found():
  own, other = _recognized(small_model(norm='batch'), 4, steps=1)
  assert np.median(own) == 1
  assert own.max() <= 3
  assert np.median(other) > 15
