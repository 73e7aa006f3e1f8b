import contextlib
import dataclasses

import numpy as np
import pytest

from attacks.adaptive import attacker, calibrated
from attacks.audit import suite as suites
from attacks.audit.budget import BUDGETS
from tests.attacks.adaptive.simulated_defense_test import (
  _defended,
  _observed,
  _public,
  dense_model,
)
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.observations import Truth

_BUDGET = dataclasses.replace(
  BUDGETS['default'], iterations=6, calibration_clients=2, denoiser_steps=2, inversion_clients=8
)


@contextlib.contextmanager
def _watch(what, total):
  yield lambda done, text: None


def _suite(directory, budget=_BUDGET, public=None):
  return suites.Suite(
    budget,
    directory,
    public=public or _public(),
    augmentations=(),
    seed=0,
    lanes=4,
    watch=_watch,
  )


@pytest.fixture(scope='module')
def observation():
  return _defended(_observed(), 'isotropic', value=0.5)


@pytest.fixture
def one_candidate(monkeypatch):
  first = calibrated.CANDIDATES[:1]
  monkeypatch.setattr(attacker, 'candidates_for', lambda observation, config: first)
  monkeypatch.setattr(calibrated, 'candidates_for', lambda observation, config: first)


def _only_regions(observation):
  shape = (1, *observation.image_shape)
  return {
    client.client_id: Truth(
      np.full(shape, np.nan, np.float32),
      np.zeros(1, np.int32),
      np.ones((*shape[:3], 1), np.float32),
    )
    for client in observation.clients
  }


@pytest.mark.usefixtures('one_candidate')
def test_the_attacker_who_knows_the_defence_attacks_once(tmp_path, observation):
  clients = [client.client_id for client in observation.clients]
  truth = _only_regions(observation)
  # Of the truth it is given the regions alone: the images are NaN.
  unknown, known = _suite(tmp_path).adaptive('here', [observation], truth, clients)
  assert (unknown.name, known.name) == (suites.ADAPTIVE, suites.ADAPTIVE_REGION)
  assert any('not those of the clients' in fact for fact in unknown.knows)
  assert any('is told the region' in fact for fact in known.knows)
  for attacked in (unknown, known):
    assert [result.target for result in attacked.results] == clients
    assert all(np.isfinite(r.reconstructions['attack']).all() for r in attacked.results)
  written = (tmp_path / 'here' / 'adaptive' / 'result.json').stat().st_mtime_ns
  again = _suite(tmp_path).adaptive('here', [observation], truth, clients)
  assert [own.knows for own in again] == [unknown.knows, known.knows]
  np.testing.assert_array_equal(
    again[0].results[0].reconstructions['attack'], unknown.results[0].reconstructions['attack']
  )
  assert (tmp_path / 'here' / 'adaptive' / 'result.json').stat().st_mtime_ns == written


def test_what_cannot_be_simulated_is_a_problem_and_no_crash(tmp_path, observation):
  unknown = dataclasses.replace(observation, defense={'name': 'prayer'})
  (attacked,) = _suite(tmp_path).adaptive(
    'here', [unknown], _only_regions(observation), ['client_00']
  )
  assert 'prayer' in attacked.problem
  assert not attacked.results


def test_a_map_that_the_model_has_not_is_a_problem_and_no_crash(tmp_path):
  defended = _defended(_observed(dense_model()), 'correlated', saliency='gradcam_pp')
  (attacked,) = _suite(tmp_path).adaptive(
    'here', [defended], _only_regions(defended), ['client_00']
  )
  assert 'no convolutional layer' in attacked.problem


def test_known_images_are_tried_once(tmp_path, observation):
  images = _public().float_images()
  shape = (1, *observation.image_shape[:2], 1)
  truth = {
    client.client_id: Truth(images[k : k + 1], np.array([k], np.int32), np.ones(shape, np.float32))
    for k, client in enumerate(observation.clients)
  }
  found = _suite(tmp_path).recognized('here', [observation], truth, list(truth))
  assert (found.of, found.choices) == (len(truth), len(images))
  path = tmp_path / 'here' / 'recognized.json'
  written = path.stat().st_mtime_ns
  assert _suite(tmp_path).recognized('here', [observation], {}, list(truth)) == found
  assert path.stat().st_mtime_ns == written


def test_no_budget_for_it_means_no_test_of_known_images(tmp_path, observation):
  budget = dataclasses.replace(_BUDGET, calibration_clients=0)
  assert _suite(tmp_path, budget).recognized('here', [observation], {}, ['client_00']) is None


def test_presets_that_cannot_attack_are_problems(tmp_path, observation):
  training = dataclasses.replace(observation.client_training, optimizer='adam')
  other = dataclasses.replace(observation, client_training=training)
  (attacked,) = _suite(tmp_path).unaware('here', [other], ['client_00'])
  assert 'adam' in attacked.problem


def test_batches_are_attacked_with_what_public_images_say(tmp_path, monkeypatch):
  images = smooth_images(4)
  batch = play_round(small_model(), [(images[:2], [0, 1]), (images[2:], [1, 0])])
  used = []
  real = suites.attack_observation

  def attack(observations, config, *arguments, **settings):
    used.append(config)
    return real(observations, config, *arguments, **settings)

  monkeypatch.setattr(suites, 'attack_observation', attack)
  attacked = _suite(tmp_path / 'a').unaware('here', [batch], ['client_00'])
  names = ['best', 'best_batch', 'best_public', 'best_public_strong']
  assert [own.name for own in attacked] == names
  assert used[0].gaussian_images is used[1].gaussian_images is None
  weights = [config.gaussian_images.weight for config in used[2:]]
  assert weights == pytest.approx([0.03 / 64, 0.3 / 64])
  public = attacked[-1]
  assert any('fitted to public images' in fact for fact in public.knows)
  # Where there are none to fit a prior to, without.
  same = dataclasses.replace(_public(), images=_public().images[:1].repeat(len(_public()), axis=0))
  suite = _suite(tmp_path / 'b', public=same)
  monkeypatch.setattr(suite, '_invert', lambda *arguments: [])
  assert [own.name for own in suite.unaware('here', [batch], ['client_00'])] == [
    'best',
    'best_batch',
  ]
  # One image of each client: as ever.
  one = play_round(small_model(), [(images[:1], [0])])
  assert [own.name for own in suite.unaware('here', [one], ['client_00'])] == ['best']


def test_no_budget_for_it_means_no_such_attacker(tmp_path, observation):
  budget = dataclasses.replace(_BUDGET, calibration_clients=0)
  assert _suite(tmp_path, budget).adaptive('here', [observation], {}, ['client_00']) == []


def test_clients_without_settings_of_their_own_are_a_doubt_of_the_audit(tmp_path, observation):
  client = observation.clients[0]
  trial = calibrated.Trial(calibrated.CANDIDATES[0], 0.0, 0.0, False, 0.0)
  suite = _suite(tmp_path)
  calibration = attacker.Calibration(trial, 2, client, ('client_01',))
  found = [attacker.AdaptiveAttack((calibration,), []) for _ in range(2)]
  suite._attacker.attack = lambda *arguments, **settings: found
  *_, doubt = suite.adaptive('here', [observation], _only_regions(observation), ['client_00'])
  assert doubt.name == 'adaptive calibrated for client_01'
  assert 'too rare' in doubt.problem
  assert not doubt.results
  # It is remembered.
  (again,) = _suite(tmp_path)._uncalibrated('here')
  assert again == doubt
