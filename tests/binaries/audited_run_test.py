import dataclasses
import json

import numpy as np
import pytest

from binaries.audited_run import AuditedRun, defense_words
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.errors import UserError
from tff_shadow.learning import ShadowNoise
from tff_shadow.observations import (
  Truth,
  round_directory_name,
  write_observation,
  write_truth,
)
from tff_shadow.published import PublishedSettings

_RATIO = NoiseStrength('image_ratio', 100.0)


@pytest.mark.parametrize(
  ('noise', 'words'),
  [
    (ShadowNoise('isotropic', _RATIO), 'shape isotropic, strength image_ratio 100.0, probes 8'),
    (
      ShadowNoise('decoy', NoiseStrength('scale', 3.0)),
      'shape decoy, strength scale 3.0, floor 0.999, local epochs 1, decoys 32, decoy augmentations'
      ' shifts and brightness',
    ),
    (
      ShadowNoise('correlated', NoiseStrength('scale', 0.1), propagation='images'),
      'strength scale 0.1, saliency gradcam_pp, propagation images',
    ),
    (
      ShadowNoise('diagonal', _RATIO, propagation='local_training'),
      'probes 8, epsilon 0.1, floor 0.01',
    ),
  ],
)
def test_tells_the_settings_in_force_alone(noise, words):
  told = defense_words({'name': 'shadow', 'frozen': False, **dataclasses.asdict(noise)})
  assert told.startswith('shadow: drawn anew in each round, shape ')
  assert words in told
  assert ('floor' in told) == (noise.shape != 'isotropic' and not noise.in_images)
  assert ('decoy' in told) == (noise.shape == 'decoy')


def test_other_defences_are_told_whole():
  assert defense_words({'name': 'none'}) == 'none'
  assert defense_words({'name': 'top_k', 'fraction': 0.1}) == 'top_k: fraction 0.1'
  told = defense_words({'name': 'published', **dataclasses.asdict(PublishedSettings())})
  assert 'latents (learning rate 0.001, weight decay 0.01, steps 500,' in told
  assert 'update shadow yes' in told
  assert 'shadow learning rate by its own rule' in told


_POOL = smooth_images(12)


@pytest.fixture(scope='module')
def played():
  """Three clients of 4 images, which took one step on all of them."""
  sets = [(_POOL[4 * k : 4 * k + 4], [0, 1, 0, 1]) for k in range(3)]
  return play_round(small_model(), sets)


def _audited(run_dir, played, used, max_clients=16, rounds=None, flags=None, **client):
  """A run whose rounds saw `used`, for each round from client to positions in `_POOL`."""
  (run_dir / 'truth').mkdir(parents=True)
  flags = {'secure_measurements': True} if flags is None else flags
  config = {'program': 'train', 'flags': {'rounds': rounds or len(used), **flags}}
  (run_dir / 'config.json').write_text(json.dumps(config))
  for number, own in enumerate(used, start=1):
    clients = tuple(
      dataclasses.replace(played.client(name), num_images=len(images), **client)
      for name, images in own.items()
    )
    name = round_directory_name(number)
    observation = dataclasses.replace(played, round_num=number, clients=clients)
    write_observation(run_dir / 'observations' / name, observation)
    truth = {
      client: Truth(
        _POOL[images], np.int32(images) % 2, np.ones((len(images), 8, 8, 1), np.float32)
      )
      for client, images in own.items()
    }
    write_truth(run_dir / 'truth' / f'{name}.safetensors', number, truth)
  return AuditedRun(run_dir, None, max_clients)


def test_clients_recur_in_whatever_order_their_images_were_first_used(tmp_path, played):
  first = {'client_00': [0, 1, 2, 3], 'client_01': [4, 5, 6, 7]}
  again = {'client_00': [2, 0, 3, 1], 'client_01': [7, 6, 5, 4]}
  audited = _audited(tmp_path / 'run', played, [first, again, first])
  assert audited.recurring == ['client_00', 'client_01']
  assert audited.apart(audited.seen) == []


@pytest.mark.parametrize(
  ('other', 'why'),
  [
    ({'client_01': [4, 5, 6, 7], 'client_02': [8, 9, 10, 11]}, 'no part in round 2'),
    ({'client_00': [0, 1, 2, 8], 'client_01': [4, 5, 6, 7]}, 'other images in some of the rounds'),
    ({'client_00': [0, 1], 'client_01': [4, 5, 6, 7]}, 'other images in some of the rounds'),
  ],
)
def test_images_that_were_not_attacked_jointly_are_told(tmp_path, played, other, why):
  own = {'client_00': [0, 1, 2, 3], 'client_01': [4, 5, 6, 7]}
  audited = _audited(tmp_path / 'run', played, [own, other, own])
  assert audited.recurring == ['client_01']
  (problem,) = audited.apart(audited.seen)
  assert problem == (
    'Several rounds show the same images of client_00, and these rounds were not attacked together:'
    f' {why}.'
  )


@pytest.mark.parametrize(
  ('flags', 'clients'),
  [({}, 2), ({'secure_measurements': False}, 2), ({'secure_measurements': True}, 1)],
)
def test_measurements_of_single_clients_are_a_doubt(tmp_path, played, flags, clients):
  own = {f'client_{k:02d}': [k] for k in range(clients)}
  audited = _audited(tmp_path / 'run', played, [own], flags=flags)
  (problem,) = audited.apart(audited.seen)
  assert 'training loss and accuracy of single clients' in problem


def test_steps_on_parts_of_the_images_are_not_attacked_jointly(tmp_path, played):
  own = {f'client_{k:02d}': [4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(3)}
  audited = _audited(tmp_path / 'run', played, [own, own], batch_size=2, num_steps=2)
  assert audited.recurring == []
  (problem,) = audited.apart(audited.seen)
  assert 'client_00, client_01, client_02,' in problem
  assert problem.endswith(
    'steps on parts of the images, in an order that is another in each round.'
  )
  with pytest.raises(UserError, match='--separate_rounds'):
    audited.separate([''])


def test_a_client_that_is_attacked_in_a_later_round_alone_is_told(tmp_path, played):
  small = {'client_00': [0], 'client_01': [4, 5]}
  large = {'client_00': [1, 2, 3], 'client_01': [5, 4]}
  audited = _audited(tmp_path / 'run', played, [small, large], max_clients=1)
  assert audited.recurring == []
  (problem,) = audited.apart(audited.seen)
  assert problem.endswith(
    'client_01, and these rounds were not attacked together: not among those attacked in round 1.'
  )


def test_clients_that_are_attacked_nowhere_are_told(tmp_path, played):
  first = {'client_00': [0], 'client_01': [4]}
  second = {'client_00': [1], 'client_01': [4]}
  audited = _audited(tmp_path / 'run', played, [first, second])
  assert audited.recurring == ['client_01']
  assert audited.apart(audited.seen) == []
  assert audited.apart(audited.seen[1:]) == ['Round 1 was not attacked for client_00.']


def test_rounds_that_were_not_audited_are_told(tmp_path, played):
  own = {'client_00': [0, 1, 2, 3], 'client_01': [4, 5, 6, 7]}
  audited = _audited(tmp_path / 'run', played, [own, own], rounds=20)
  (problem,) = audited.apart(audited.seen)
  assert problem.startswith('18 of the 20 rounds of the training were not audited')
  first = AuditedRun(tmp_path / 'run', ['1'], 16)
  (problem,) = first.apart(first.seen)
  assert problem.startswith('19 of the 20 rounds')


def test_an_audit_that_goes_on_finds_other_observations(tmp_path, played):
  own = {'client_00': [0, 1, 2, 3]}
  audited = _audited(tmp_path / 'run', played, [own, own])
  digests = audited.digests()
  assert digests == AuditedRun(tmp_path / 'run', None, 16).digests()
  one = AuditedRun(tmp_path / 'run', ['1'], 16).digests()
  assert (digests['audited_rounds'], one['audited_rounds']) == ([1, 2], [1])
  assert one['observations_sha256'] != digests['observations_sha256']
  # A round that was trained again has other noise.
  other = dataclasses.replace(audited.seen[1].observation, aggregate=played.clients[1].update)
  write_observation(tmp_path / 'run' / 'observations' / 'round_00002', other)
  changed = AuditedRun(tmp_path / 'run', None, 16).digests()
  assert changed['observations_sha256'] != digests['observations_sha256']


def test_rounds_that_share_no_image_need_no_joint_attack(tmp_path, played):
  used = [{'client_00': [0], 'client_01': [4]}, {'client_00': [1], 'client_01': [5]}]
  audited = _audited(tmp_path / 'run', played, used)
  assert (audited.recurring, audited.apart(audited.seen)) == ([], [])
