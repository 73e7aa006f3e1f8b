import dataclasses
import types

import numpy as np
import pytest

from attacks.adaptive import attacker
from attacks.adaptive.attacker import AdaptiveAttacker, Effort
from attacks.adaptive.calibrated import CANDIDATES, Trial
from attacks.config import AttackConfig
from attacks.presets import PRESETS
from tests.attacks.adaptive.simulated_defense_test import _defended, _public
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.errors import UserError
from tff_shadow.learning import DpSgd

_TRIALS = [
  Trial(CANDIDATES[1], 0.0, 0.5, False, 20.0),
  Trial(CANDIDATES[2], 0.0, 0.0, False, 15.0),
  Trial(CANDIDATES[0], 0.0, 0.0, False, 10.0),
]


@pytest.fixture
def calls(monkeypatch):
  """Of stand-ins for what takes long: for whom what was done."""
  seen = types.SimpleNamespace(played=[], configs=[], attacked={})

  def simulate_round(observation, like, public, *, num_clients, **settings):
    seen.played.append((like.num_images, num_clients))
    return types.SimpleNamespace(mean_map=np.ones((1, 8, 8, 1), np.float32))

  def calibrate(simulated, config, denoiser, learned, candidates, **settings):
    seen.configs.append(config)
    seen.covariances = settings['covariances']
    return _TRIALS

  def attack_calibrated(
    observations, trial, config, denoiser, maps, learned, earlier, shared, covariances
  ):
    own = learned and learned.like.num_images
    seen.attacked |= {name: (trial.learned_share, own) for name in maps}
    return [types.SimpleNamespace(target=name) for name in maps]

  monkeypatch.setattr(attacker, 'simulate_round', simulate_round)
  monkeypatch.setattr(attacker, 'calibrate', calibrate)
  monkeypatch.setattr(attacker, 'attack_calibrated', attack_calibrated)
  # In place of the network the client whose kind it is for.
  monkeypatch.setattr(
    AdaptiveAttacker,
    '_trained_inversion',
    lambda self, observations, like, *rest: types.SimpleNamespace(
      like=like, reads_labels=like.num_images == 1
    ),
  )
  return seen


def _round(*sizes):
  """Clients with so many images, all in one step."""
  clients = [(smooth_images(size, seed=size), [0] * size) for size in sizes]
  return play_round(small_model(), clients)


def _attack(observation, clients=None, **settings):
  own = AdaptiveAttacker(_public(12), AttackConfig(), Effort(8, 0, 0), **settings)
  clients = clients or [client.client_id for client in observation.clients]
  (made,) = own.attack([observation], clients)
  assert [result.target for result in made.results] == clients
  return made


def test_settings_are_chosen_for_each_kind_of_clients(calls):
  observation = _round(1, 3, 1)
  made = _attack(observation, batch_config=PRESETS['best_batch'].build())
  assert calls.played == [(1, 6), (3, 2)]
  assert calls.attacked == {'client_00': (0.5, 1), 'client_01': (0.5, 3), 'client_02': (0.5, 1)}
  assert [config.restarts for config in calls.configs] == [1, 4]
  assert made.uncalibrated == ()
  knows = ' '.join(made.knows(observation))
  assert 'Clients of 1 image in 1 step: It has played the round itself with 6' in knows
  assert 'Clients of 3 images in 1 step: It has played the round itself with 2' in knows
  assert 'Clients of 1 image in 1 step: It infers labels by how updates' in knows
  assert 'Clients of 3 images in 1 step: It infers labels' not in knows


def test_of_one_kind_nothing_is_said_of_kinds(calls):
  observation = _round(1, 1)
  made = _attack(observation)
  assert calls.played == [(1, 6)]
  knows = ' '.join(made.knows(observation))
  assert 'Clients of' not in knows
  assert 'clips' not in knows
  clipped = dataclasses.replace(observation, defense=DpSgd(3.0, 0.1).public_settings())
  assert 'It clips the gradient of each image that it tries at 3.0' in ' '.join(made.knows(clipped))
  assert calls.configs[0].start == AttackConfig().start


def test_the_covariance_of_decoy_noise_is_played(calls):
  observation = _defended(_round(1, 1), 'decoy', 'scale', 1.0, decoys=4)
  _attack(observation)
  (covariance,) = calls.covariances
  assert len(covariance.ratios)
  _attack(_round(1, 1))
  assert calls.covariances == []


def test_clients_of_rare_kinds_are_attacked_without_what_was_learned_of_others(calls):
  observation = _round(1, 1, 4, 4, 2, 2, 5, 3)
  made = _attack(observation)
  assert sorted(calls.played) == [(1, 6), (2, 3), (4, 1)]
  assert set(made.uncalibrated) == {'client_06', 'client_07'}
  assert {calls.attacked[name] for name in made.uncalibrated} == {(0.0, None)}
  assert made.calibrations[1].others == ('client_06', 'client_07')
  assert any(
    'not played clients like client_06, client_07' in own for own in made.knows(observation)
  )


def test_kinds_with_too_many_images_to_play_them(calls):
  observation = _round(7, 1)
  assert _attack(observation).uncalibrated == ('client_00',)
  with pytest.raises(UserError, match=r'6 public images .* they have 7 or more'):
    _attack(observation, ['client_00'])


def test_the_number_of_steps_is_part_of_the_kind(calls):
  observation = _round(2, 2)
  training = dataclasses.replace(observation.client_training, batch_size=1)
  clients = [
    dataclasses.replace(client, batch_size=size, num_steps=2 // size)
    for client, size in zip(observation.clients, (1, 2), strict=True)
  ]
  observation = dataclasses.replace(observation, client_training=training, clients=tuple(clients))
  made = _attack(observation, batch_config=PRESETS['best_batch'].build())
  assert [own.like.num_steps for own in made.calibrations] == [2, 1]
  # In one step or one by one, several images are sought.
  assert [config.restarts for config in calls.configs] == [4, 4]
