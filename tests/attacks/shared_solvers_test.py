import dataclasses

import numpy as np
import pytest

from attacks import engine
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.initialization import UniformStart
from attacks.shared_solvers import SharedSolvers
from tests.attacks.observed_rounds import play_round, small_model, smooth_images

_CONFIG = AttackConfig(iterations=20, xla='off')


@pytest.fixture(scope='module')
def observation():
  images = smooth_images(2)
  return play_round(small_model(), [(images[:1], [1]), (images[1:], [0])])


@pytest.fixture
def made(monkeypatch):
  """Solvers made, with a matching term or as a control."""
  kinds = []

  class Counted(engine.Solver):
    def __init__(self, *arguments, matching, **settings):
      kinds.append('attack' if matching else 'control')
      super().__init__(*arguments, matching=matching, **settings)

  monkeypatch.setattr(engine, 'Solver', Counted)
  return kinds


def _smoother(config, weight):
  variation = dataclasses.replace(config.total_variation, weight=weight)
  return dataclasses.replace(config, total_variation=variation)


@pytest.mark.usefixtures('made')
def test_attacks_that_share_solvers_find_what_they_find_alone(observation, made):
  shared = SharedSolvers([observation])
  configs = [_smoother(_CONFIG, weight) for weight in (0.15, 4.0)]
  configs.append(dataclasses.replace(_CONFIG, seed=3, start=UniformStart(), label_rule='idlg'))
  found = [attack_observation(observation, config, shared=shared) for config in configs]
  # For each of several and of one lane, both kinds.
  assert sorted(made) == ['attack', 'control']
  for config, together in zip(configs, found, strict=True):
    alone = attack_observation(observation, config)
    for own, other in zip(together, alone, strict=True):
      assert own.loss == other.loss
      for name, images in own.reconstructions.items():
        np.testing.assert_array_equal(images, other.reconstructions[name])
  images = [results[0].reconstructions['attack'] for results in found]
  assert np.abs(images[0] - images[1]).max() > 1e-3


def test_without_that_prior_it_is_another_solver(observation, made):
  shared = SharedSolvers([observation])
  for weight in (0.15, 0.0):
    attack_observation(observation, _smoother(_CONFIG, weight), controls=False, shared=shared)
  assert made == ['attack', 'attack']


def test_controls_may_be_left_out(observation):
  (with_controls, _) = attack_observation(observation, _CONFIG)
  (without, _) = attack_observation(observation, _CONFIG, controls=False)
  assert set(without.reconstructions) == {'attack'}
  assert set(with_controls.reconstructions) == {'attack', 'prior_only', 'mean_image'}
  np.testing.assert_array_equal(
    without.reconstructions['attack'], with_controls.reconstructions['attack']
  )


def test_rounds_of_other_weights_do_not_share(observation):
  shared = SharedSolvers([observation])
  assert shared.fits([dataclasses.replace(observation, clients=observation.clients[:1])])
  weights = dataclasses.replace(observation.global_weights)
  other = dataclasses.replace(observation, global_weights=weights)
  assert not shared.fits([other])
  assert not shared.fits([observation, observation])
  assert not shared.fits([observation], 'float64')
  with pytest.raises(ValueError, match='other rounds'):
    attack_observation(other, _CONFIG, shared=shared)
