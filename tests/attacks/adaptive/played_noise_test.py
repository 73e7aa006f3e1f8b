import dataclasses

import numpy as np
import pytest

from attacks.adaptive.played_noise import has_public_covariance, played_covariance
from attacks.adaptive.players import Equipment, build_player
from attacks.adaptive.simulated_updates import SimulatedClients, flat
from attacks.local_steps import local_steps
from tests.attacks.adaptive.simulated_defense_test import _defended, _observed, _public
from tests.attacks.observed_rounds import small_model
from tff_shadow.learning import DpSgd

_DRAWS = 300


def _clients(like, count, seed):
  return SimulatedClients(_public(12), like, count, ('shifts', 'brightness'), seed)


@pytest.mark.parametrize(('kind', 'norm'), [('ratio', 'none'), ('scale', 'batch')])
def test_real_noise_has_the_covariance_that_was_played(kind, norm):
  observation = _defended(
    _observed(small_model(norm=norm)), 'decoy', kind, 0.7, floor=0.8, decoys=8
  )
  like = observation.clients[0]
  equipment = Equipment(decoys=_public(12))
  found = played_covariance(observation, like, _clients(like, _DRAWS, 1), equipment, is_first=True)
  assert 1 <= len(found.ratios) <= _DRAWS
  assert found.ratios.min() > 1.2
  np.testing.assert_allclose(
    found.directions.T @ found.directions, np.eye(len(found.ratios)), atol=1e-3
  )
  # Of the defence as it is, other draws.
  shares = bool(like.update.non_trainable)
  player = build_player(observation, shares, equipment)
  clean = build_player(dataclasses.replace(observation, defense={'name': 'none'}), shares)
  steps = local_steps(like, observation.client_training)
  noises = []
  for truths in _clients(like, _DRAWS, 2).chunks(_DRAWS):
    for number, truth in truths.items():
      sent, plain = (own.update(truth, steps, (7, number)) for own in (player, clean))
      noises.append(flat(sent)[0] - flat(plain)[0])
  noises = np.stack(noises)[:, : len(found.directions)]
  if kind == 'ratio':
    # The noise of each client is as loud as its update.
    noises /= np.linalg.norm(noises, axis=1, keepdims=True)
  along = noises @ found.directions
  beside = noises - along @ found.directions.T
  variance = np.square(beside).sum() / _DRAWS / (noises.shape[1] - len(found.ratios))
  ratio = np.square(along[:, 0]).mean() / variance
  # A variance of 300 draws, on either side.
  assert ratio == pytest.approx(found.ratios[0], rel=0.35)
  total = (np.square(along) / found.ratios).sum() / variance / _DRAWS
  assert total == pytest.approx(len(found.ratios), rel=0.2)


def test_only_decoy_noise_is_alike_for_all_clients():
  observation = _observed()
  assert has_public_covariance(_defended(observation, 'decoy', 'scale', 1.0))
  others = [_defended(observation, shape).defense for shape in ('isotropic', 'diagonal')]
  for defense in ({'name': 'none'}, DpSgd().public_settings(), *others):
    assert not has_public_covariance(dataclasses.replace(observation, defense=defense))


def test_of_no_noise_there_is_no_covariance():
  observation = _defended(_observed(), 'decoy', 'scale', 0.0)
  like = observation.clients[0]
  equipment = Equipment(decoys=_public(12))
  assert (
    played_covariance(observation, like, _clients(like, 3, 1), equipment, is_first=True) is None
  )
