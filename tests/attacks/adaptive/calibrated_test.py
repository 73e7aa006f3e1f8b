import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.adaptive import calibrated
from attacks.adaptive.calibrated import (
  CANDIDATES,
  Candidate,
  attack_calibrated,
  calibrate,
  candidates_for,
)
from attacks.adaptive.players import Equipment
from attacks.adaptive.simulated_defense import simulate_round
from attacks.adaptive.weightings import weights_of
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.local_steps import local_steps
from attacks.matching import CosineMatching, SquaredMatching
from attacks.noise_covariance import NoiseCovariance
from attacks.presets import PRESETS
from attacks.priors import GaussianImages
from attacks.shared_solvers import SharedSolvers
from attacks.simulator import ClientSimulator
from tests.attacks.adaptive.simulated_defense_test import _defended, _observed, _public
from tests.attacks.batch_norm_statistics_test import _round
from tests.attacks.observed_rounds import small_model, smooth_images
from tff_shadow.learning import (
  DpFedAvg,
  DpSgd,
  PercentileGaussian,
  Quantization,
  Soteria,
  TopK,
)
from tff_shadow.observations import WeightArrays
from tff_shadow.privacy import fit_gaussian_prior

_CONFIG = AttackConfig(iterations=20, xla='off')


@pytest.fixture(scope='module')
def simulated():
  observation = _defended(_observed(), 'diagonal', value=1.0)
  return simulate_round(observation, observation.clients[0], _public(), num_clients=3, seed=1)


class _Halfway:
  """Stands in for a denoiser: moves images halfway to mid grey if told of 0.12."""

  def __call__(self, images, deviation, regions):
    assert regions.shape == (*images.shape[:3], 1)
    return (images + 0.5) / 2 if deviation[0] == 0.12 else np.zeros_like(images)


def test_the_best_trial_is_first_and_can_be_repeated(simulated):
  candidates = (Candidate(CosineMatching(balance=0.5), 0.15), Candidate(SquaredMatching(), 1.5))
  seen = []
  trials = calibrate(
    simulated,
    _CONFIG,
    _Halfway(),
    candidates=candidates,
    progress=lambda done, best: seen.append((done, best)),
  )
  assert len(trials) == 2 * 2 * len(calibrated.LEVELS)
  assert [t.region_psnr for t in trials] == sorted((t.region_psnr for t in trials), reverse=True)
  assert seen[-1] == (2, trials[0])
  assert len({t.region_psnr for t in trials if t.level == 0.5}) == 1  # All black.
  # What it reached on its own clients, it reaches again when it is told to.
  results = attack_calibrated(simulated.observation, trials[0], _CONFIG, _Halfway(), simulated.maps)
  images = [result.reconstructions['attack'] for result in results]
  again = calibrated._mean_region_psnr(results, images, simulated)
  assert again == pytest.approx(trials[0].region_psnr, abs=1e-6)


def test_another_clients_update_shows_what_the_maps_alone_tell(simulated):
  trial = calibrated.Trial(CANDIDATES[0], 0.12, 0.0, True, 0.0)
  names = ['public_00', 'public_01']
  maps = {name: simulated.maps[name] for name in names}

  def paint(images, deviation, regions):
    return images + 10 * regions

  found = attack_calibrated(simulated.observation, trial, _CONFIG, paint, maps)
  plain = attack_observation(simulated.observation, _CONFIG, names)
  for own, other in ((0, 1), (1, 0)):
    np.testing.assert_allclose(
      found[own].reconstructions['other_update'],
      plain[other].reconstructions['attack'] + 10 * maps[names[own]],
      rtol=1e-5,
    )
  alone = attack_calibrated(
    simulated.observation, trial, _CONFIG, paint, {names[0]: maps[names[0]]}
  )
  assert 'other_update' not in alone[0].reconstructions
  ignorant = dataclasses.replace(trial, knows_region=False)
  for result in attack_calibrated(simulated.observation, ignorant, _CONFIG, paint, maps):
    assert 'other_update' not in result.reconstructions


class _Knowing:
  """Stands in for a learned inversion: gives grey images, by the client's first weights."""

  def __init__(self, observation, grey, read=None):
    self.reads_labels = read is not None
    self._read = read
    self._names = {id(client.update): client.client_id for client in observation.clients}
    self._grey = grey
    self.told = []

  def fits(self, client):
    return client.client_id != 'public_02'

  def labels(self, updates):
    return self._read[self._names[id(updates[0])]]

  def __call__(self, updates, labels):
    self.told.append(tuple(labels))
    return np.full((1, 8, 8, 1), self._grey[self._names[id(updates[0])]], np.float32)


def test_what_was_learned_is_mixed_with_what_was_found(simulated):
  learned = _Knowing(simulated.observation, {'public_00': 0.2, 'public_01': 0.8})
  candidates = CANDIDATES[:1]
  trials = calibrate(simulated, _CONFIG, None, learned, candidates)
  assert {trial.learned_share for trial in trials} == set(calibrated.SHARES)
  plain = attack_observation(simulated.observation, _CONFIG, list(simulated.maps))
  inferred = [result.labels for result in plain]
  assert learned.told == inferred[:2]
  trial = calibrated.Trial(CANDIDATES[0], 0.0, 0.75, False, 0.0)
  found = attack_calibrated(simulated.observation, trial, _CONFIG, None, simulated.maps, learned)
  for own, before, grey in zip(found[:2], plain, (0.2, 0.8), strict=False):
    expected = 0.25 * before.reconstructions['attack'] + 0.75 * grey
    np.testing.assert_allclose(own.reconstructions['attack'], expected, atol=1e-5)
  # Of a client unlike those that were learned from, what was found alone.
  for own, before in zip(found[2:], plain[2:], strict=True):
    np.testing.assert_array_equal(own.reconstructions['attack'], before.reconstructions['attack'])


def test_clients_are_attacked_with_labels_that_are_read_of_updates(simulated, monkeypatch):
  truth = {name: int(own.labels[0]) for name, own in simulated.truth.items()}
  # One that is right, one that is not, and of the last client, which does not fit, none.
  read = {'public_00': (truth['public_00'],), 'public_01': (1 - truth['public_01'],)}
  learned = _Knowing(simulated.observation, dict.fromkeys(read, 0.5), read)
  attacks = []

  def attack(*args, **settings):
    attacks.append(attack_observation(*args, **settings))
    return attacks[-1]

  monkeypatch.setattr(calibrated, 'attack_observation', attack)
  trials = calibrate(simulated, _CONFIG, None, learned, CANDIDATES[:2])
  attack_calibrated(simulated.observation, trials[0], _CONFIG, None, simulated.maps, learned)
  assert len(attacks) == 3
  (plain,) = attack_observation(simulated.observation, _CONFIG, ['public_02'])
  expected = [*read.values(), plain.labels]
  for results in attacks:
    assert [result.labels for result in results] == expected
    assert {result.labels_source for result in results} == {'inferred'}
  assert set(learned.told) == set(read.values())


def test_updates_that_are_not_finite_are_not_read(simulated):
  first, *others = simulated.observation.clients
  nan = WeightArrays(tuple(np.full_like(array, np.nan) for array in first.update.trainable))
  clients = (dataclasses.replace(first, update=nan), *others)
  observation = dataclasses.replace(simulated.observation, clients=clients)
  learned = _Knowing(simulated.observation, {}, {client.client_id: (0,) for client in others})
  maps = {client.client_id: simulated.maps[client.client_id] for client in clients}
  trial = calibrated.Trial(CANDIDATES[0], 0.0, 0.0, False, 0.0)
  found = attack_calibrated(observation, trial, _CONFIG, None, maps, learned)
  assert [result.status for result in found] == ['failed', 'ok', 'ok']


def test_a_gaussian_prior_is_tried_where_there_is_one(simulated):
  prior = GaussianImages(fit_gaussian_prior(_public().float_images()), weight=1.0)
  candidates = [Candidate(SquaredMatching(), 0.0, gaussian_weight=1.0), CANDIDATES[0]]
  config = dataclasses.replace(_CONFIG, iterations=4)
  without = calibrate(simulated, config, None, candidates=candidates)
  assert {trial.candidate for trial in without} == {CANDIDATES[0]}
  config = dataclasses.replace(config, gaussian_images=prior)
  tried = calibrate(simulated, config, None, candidates=candidates)
  assert {trial.candidate for trial in tried} == set(candidates)
  assert 'l2 Gaussian prior 1' in {str(trial.candidate) for trial in tried}


def test_the_first_candidate_is_the_attack_that_knows_of_no_noise(simulated):
  trial = calibrated.Trial(CANDIDATES[0], 0.0, 0.0, False, 0.0)
  maps = {'public_01': simulated.mean_map}
  (found,) = attack_calibrated(simulated.observation, trial, _CONFIG, None, maps)
  (plain,) = attack_observation(simulated.observation, _CONFIG, ['public_01'])
  np.testing.assert_array_equal(found.reconstructions['attack'], plain.reconstructions['attack'])


def test_entries_of_much_noise_count_less(simulated):
  shared = SharedSolvers([simulated.observation])
  first = calibrated._invert(
    [simulated.observation], CANDIDATES[0], _CONFIG, [], simulated.maps, shared
  )
  flat = {}
  for name in ('deviations', 'low_noise'):
    weights = weights_of(simulated.observation, name, simulated.maps, first, shared.simulators[0])
    flat[name] = np.concatenate([array.ravel() for array in weights['public_00']])
  assert np.mean(flat['low_noise']) == pytest.approx(0.5, abs=0.02)
  quiet = flat['low_noise'] > 0
  assert flat['deviations'][quiet].min() >= flat['deviations'][~quiet].max() > 0
  # An entry that counts for nothing may hold anything.
  observation = simulated.observation
  client = observation.client('public_00')
  zero = [weights['public_00']]
  spoiled = tuple(
    np.where(weight == 0, array + 1e3, array)
    for weight, array in zip(zero[0], client.update.trainable, strict=True)
  )
  client = dataclasses.replace(client, update=dataclasses.replace(client.update, trainable=spoiled))
  other = dataclasses.replace(observation, clients=(client,))
  arguments = {'labels': {'public_00': [0]}, 'weights': {'public_00': zero}}
  (a,), (b,) = (
    attack_observation(seen, _CONFIG, ['public_00'], **arguments) for seen in (observation, other)
  )
  np.testing.assert_allclose(a.reconstructions['attack'], b.reconstructions['attack'], atol=1e-4)


def test_candidates_are_those_of_the_defence(simulated):
  def weightings(defense):
    observation = dataclasses.replace(simulated.observation, defense=defense)
    candidates = candidates_for(observation, _CONFIG)
    assert candidates[: len(CANDIDATES)] == CANDIDATES
    return {candidate.weighting for candidate in candidates}

  assert weightings(simulated.observation.defense) == {'none', 'deviations', 'low_noise'}
  assert weightings(TopK().public_settings()) == {'none', 'nonzero'}
  decoy = _defended(_observed(), 'decoy', 'scale', 1.0)
  assert weightings(decoy.defense) == {'none'}
  assert str(candidates_for(decoy, _CONFIG)[-1]) == 'l2 Gaussian prior 1 in units of the noise'
  assert weightings(Soteria().public_settings()) == {'none', 'nonzero', 'without_last_kernel'}
  for defense in (PercentileGaussian(), DpSgd(), DpFedAvg(), Quantization()):
    assert weightings(defense.public_settings()) == {'none'}
  assert str(candidates_for(simulated.observation, _CONFIG)[-1]) == 'l2 tv 5 low_noise'


def test_total_variation_is_in_proportion_to_that_of_the_attack(simulated):
  seen = simulated.observation
  batch = PRESETS['best_batch'].build()
  own, other = (candidates_for(seen, config) for config in (_CONFIG, batch))
  assert own[: len(CANDIDATES)] == CANDIDATES
  assert other[0].tv_weight == pytest.approx(batch.total_variation.weight)
  for one, two in zip(own, other, strict=True):
    assert two.tv_weight == pytest.approx(one.tv_weight * 0.5 / 0.15)
  # An attack without any can do with that of the others.
  assert candidates_for(seen, PRESETS['dlg'].build()) == own


def test_entries_that_were_not_sent_are_not_compared(simulated):
  observation = simulated.observation
  client = observation.client('public_00')
  arrays = list(client.update.trainable)
  arrays[0] = np.where(np.arange(12) < 5, arrays[0], 0)
  client = dataclasses.replace(client, update=WeightArrays(tuple(arrays)))
  observation = dataclasses.replace(observation, clients=(client,))
  maps = {'public_00': simulated.mean_map}
  simulator = ClientSimulator(observation)
  sent = weights_of(observation, 'nonzero', maps, (), simulator)['public_00']
  np.testing.assert_array_equal(sent[0], np.broadcast_to(np.arange(12) < 5, (3, 3, 1, 12)))
  for weight, array in zip(sent, arrays, strict=True):
    np.testing.assert_array_equal(weight, array != 0)
  kept = weights_of(observation, 'without_last_kernel', maps, (), simulator)['public_00']
  assert [set(np.unique(weight)) for weight in kept] == [{1.0}] * 4 + [{0.0}, {1.0}]


def test_rounds_are_attacked_jointly(simulated):
  candidate = Candidate(SquaredMatching(), 5.0, 'without_last_kernel')
  config = dataclasses.replace(_CONFIG, iterations=4)
  trial = calibrate([simulated, simulated], config, None, candidates=[candidate])[0]
  alone, twice = (
    attack_calibrated(seen, trial, config, None, simulated.maps)
    for seen in (simulated.observation, [simulated.observation] * 2)
  )
  images = [result.reconstructions['attack'] for result in twice]
  assert calibrated._mean_region_psnr(twice, images, simulated) == pytest.approx(trial.region_psnr)
  # The mean of two equal losses is one of them.
  for result, image in zip(alone, images, strict=True):
    np.testing.assert_allclose(image, result.reconstructions['attack'], atol=1e-3)


def test_images_that_are_tried_are_clipped_as_the_clients_clip(monkeypatch):
  observation = dataclasses.replace(_observed(), defense=DpSgd(0.5, 0.0).public_settings())
  like = observation.clients[0]
  simulated = simulate_round(observation, like, _public(), num_clients=2, seed=1)
  unaware = SharedSolvers([observation])
  informed = calibrated.informed_solvers([observation], 'float32', unaware)
  assert informed.example_clip_norm == 0.5
  assert calibrated.informed_solvers([observation], 'float32', informed) is informed
  assert calibrated.informed_solvers([_observed()], 'float32', unaware) is unaware
  # An update that only clipped gradients explain; whoever does not know of it misses the length.
  (target, truth), *_ = simulated.truth.items()
  client = simulated.observation.client(target)
  for shared, explains in ((informed, True), (unaware, False)):
    (simulator,) = shared.simulators
    observed = simulator.observed_gradient(client)
    steps = local_steps(client, observation.client_training)
    tried = simulator.mean_gradient(tf.constant(truth.images), tf.constant(truth.labels), steps)
    assert (float(SquaredMatching()(tried, observed)) < 1e-6) == explains
  used = []
  real = calibrated.attack_observation

  def attack(*arguments, shared, **settings):
    used.append(shared.example_clip_norm)
    return real(*arguments, shared=shared, **settings)

  monkeypatch.setattr(calibrated, 'attack_observation', attack)
  config = dataclasses.replace(_CONFIG, iterations=2)
  candidates = [Candidate(SquaredMatching(), 1.5)]
  (best, *_) = calibrate(simulated, config, None, candidates=candidates, shared=unaware)
  attack_calibrated(simulated.observation, best, config, None, simulated.maps, shared=unaware)
  assert set(used) == {0.5}


def test_candidates_that_know_the_covariance_are_told_it(monkeypatch):
  observation = _defended(_observed(), 'decoy', 'scale', 0.1, decoys=8)
  simulated = simulate_round(
    observation,
    observation.clients[0],
    _public(),
    num_clients=2,
    seed=1,
    equipment=Equipment(decoys=_public()),
  )
  told = []
  real = calibrated.attack_observation

  def attack(*arguments, covariances, **settings):
    told.append(covariances)
    return real(*arguments, covariances=covariances, **settings)

  monkeypatch.setattr(calibrated, 'attack_observation', attack)
  config = dataclasses.replace(_CONFIG, iterations=2)
  plain = Candidate(SquaredMatching(), 1.5)
  knowing = dataclasses.replace(plain, knows_covariance=True)
  size = sum(array.size for array in observation.clients[0].update.trainable)
  known = [NoiseCovariance(np.eye(size, 2, dtype=np.float32), np.full(2, 9, np.float32))]
  tried = calibrate(simulated, config, None, candidates=[plain, knowing], covariances=known)
  assert {trial.candidate for trial in tried} == {plain, knowing}
  assert told == [(), known]
  trial = next(trial for trial in tried if trial.candidate == knowing)
  attack_calibrated(simulated.observation, trial, config, None, simulated.maps, covariances=known)
  assert told[-1] == known
  without = calibrate(simulated, config, None, candidates=[plain, knowing])
  assert {trial.candidate for trial in without} == {plain}


@pytest.fixture(scope='module', name='normalised')
def _normalised():
  return _round(small_model(norm='batch'), smooth_images(1), batch_size=1)


def test_noised_statistics_count_as_much_as_they_tell(normalised):
  chosen, closeness = {}, {}
  config = dataclasses.replace(_CONFIG, iterations=60)
  for ratio in (1e-4, 0.3):
    observation = _defended(normalised, 'isotropic', value=ratio)
    like = observation.clients[0]
    simulated = simulate_round(observation, like, _public(), num_clients=6, seed=1)
    candidates = [
      dataclasses.replace(calibrated._WEIGHED, statistics_weight=weight) for weight in (1.0, 0.0)
    ]
    after = Candidate(CosineMatching(balance=0.5), 0.5, statistics_weight=None)
    trials = calibrate(simulated, config, None, candidates=[*candidates, after, candidates[0]])
    assert len(trials) == 2 * 3  # The last is the first again.
    closeness[ratio] = {
      trial.candidate.statistics_weight: trial.region_psnr
      for trial in trials
      if trial.candidate in candidates
    }
    (chosen[ratio],) = (
      trial.candidate.statistics_weight
      for trial in trials
      if trial.candidate.tv_weight == 0.5 and not trial.knows_region
    )
  assert chosen == {1e-4: 1.0, 0.3: 0.0}
  assert closeness[1e-4][1.0] > closeness[1e-4][0.0] + 3
  assert closeness[0.3][0.0] > closeness[0.3][1.0] + 1


def test_the_weight_of_statistics_is_tried_where_clients_sent_some(normalised):
  observation = _defended(normalised, 'isotropic')
  tried = candidates_for(observation, _CONFIG)
  weights = [candidate.statistics_weight for candidate in tried]
  assert weights == [1, *calibrated.STATISTICS_WEIGHTS, *[None] * (len(CANDIDATES) - 1)]
  assert tried[0] == CANDIDATES[0]
  assert {dataclasses.replace(own, statistics_weight=1.0) for own in tried} == set(CANDIDATES)
  assert str(tried[3]) == 'cosine tv 1.5 statistics 0.01'
  local = dataclasses.replace(observation, batch_norm_sharing='local')
  assert candidates_for(local, _CONFIG) == CANDIDATES
  without = dataclasses.replace(_CONFIG.batch_norm_statistics, weight=0.0)
  config = dataclasses.replace(_CONFIG, batch_norm_statistics=without)
  assert candidates_for(observation, config) == CANDIDATES
