"""Rounds of another program become a run that is audited."""

import dataclasses
import json

import numpy as np
import pytest

from binaries.audited_run import AuditedRun
from binaries.recorded_data import load_data_of
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning import record_round
from tff_shadow.observations import Truth, read_observation

_IMAGES = smooth_images(12)
_REGIONS = np.ones((2, 8, 8, 1), np.float32)
_LABELS = np.array([0, 1], np.int32)
_PUBLIC = Examples(
  np.round(255 * _IMAGES[6:]).astype(np.uint8),
  np.array([0, 1, 0, 1, 0, 1], np.int32),
  np.full((6, 8, 8, 1), 255, np.uint8),
)
_RUN = {'public': _PUBLIC, 'client_images': {'client_00': 2, 'client_01': 4}, 'rounds': 3}


def _truth(first=0):
  return Truth(_IMAGES[first : first + 2], _LABELS, _REGIONS)


_TRUTH = {'client_00': _truth(), 'client_01': _truth(2)}


@pytest.fixture(scope='module')
def observation():
  return play_round(small_model(), [(_IMAGES[2 * k : 2 * k + 2], [0, 1]) for k in range(2)])


def _record(run_dir, observation, truth=_TRUTH, **changes):
  record_round(run_dir, observation, truth, **{**_RUN, **changes})


def test_an_audit_reads_what_was_recorded(tmp_path, observation):
  _record(tmp_path, observation)
  slower = dataclasses.replace(observation.client_training, learning_rate=0.01)
  moved = tuple(2 * array for array in observation.global_weights.trainable)
  later = dataclasses.replace(
    observation,
    round_num=3,
    client_training=slower,
    global_weights=dataclasses.replace(observation.global_weights, trainable=moved),
  )
  _record(tmp_path, later, {'client_01': _TRUTH['client_01']})
  audited = AuditedRun(tmp_path, None, 16)
  assert [own.observation.round_num for own in audited.seen] == [1, 3]
  assert [own.clients for own in audited.seen] == [('client_00', 'client_01'), ('client_01',)]
  np.testing.assert_array_equal(audited.seen[1].truth['client_01'].images, _IMAGES[2:4])
  data = audited.data()
  np.testing.assert_array_equal(data.public.images, _PUBLIC.images)
  np.testing.assert_allclose(
    audited.seen[0].observation.public_mean_image, data.public.float_images().mean(axis=0)
  )
  assert (data.image_shape, data.client_images) == ((8, 8, 1), _RUN['client_images'])
  taken = audited.participation(data)
  assert (taken.rounds, taken.clients_per_round, taken.num_clients) == (3, 2, 2)
  assert audited.training['client_learning_rate'] == observation.client_training.learning_rate
  assert audited.scope()['Seed of the training'] == 'not recorded'
  doubts = ' '.join(audited.apart(audited.seen))
  assert 'single clients' in doubts
  assert '1 of the 3 rounds' in doubts


def test_secure_sums_and_batch_sizes_are_kept(tmp_path, observation):
  sizes = {'client_01': observation.client_training.batch_size}
  _record(tmp_path, observation, client_batch_sizes=sizes, secure_measurements=True, rounds=1)
  audited = AuditedRun(tmp_path, None, 16)
  assert audited.apart(audited.seen) == []
  assert audited.participation(audited.data()).uses == 1


def test_a_round_is_put_anew(tmp_path, observation):
  _record(tmp_path, observation)
  other = observation.clients[1].update
  _record(tmp_path, dataclasses.replace(observation, aggregate=other))
  found = read_observation(tmp_path / 'observations' / 'round_00001')
  np.testing.assert_array_equal(found.aggregate.trainable[0], other.trainable[0])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'public': _PUBLIC.take([0, 1])}, 'public: 2 images, at least 3'),
    (
      {'public': Examples(*(a[:, :6] if a.ndim > 1 else a for a in vars(_PUBLIC).values()))},
      r'public: images of shape \(6, 8, 1\)',
    ),
    (
      {'public': dataclasses.replace(_PUBLIC, labels=np.arange(6, dtype=np.int32))},
      'public: labels must be int32 from 0 to 1',
    ),
    ({'client_images': {'client_00': 2}}, 'client_images: None of client_01'),
    ({'client_images': {'client_00': 1, 'client_01': 4}}, 'client_images: 1 of client_00'),
    ({'client_batch_sizes': {'client_00': 77}}, 'client_batch_sizes: 77 of client_00'),
    ({'client_batch_sizes': {'other': 77}}, 'client_batch_sizes: other is not'),
    ({'rounds': 0}, 'rounds: 0, but this is round 1'),
    ({'clients_per_round': 3}, 'clients_per_round: 3 of 2'),
    ({'truth': {}}, 'truth: of no client'),
    ({'truth': {'client_07': _truth()}}, 'truth: client_07 took no part in round 1'),
    (
      {'truth': {'client_00': _truth().alone(0)}},
      r'truth: images of client_00 are float32 \[1, 8, 8, 1\], not float32 \[2, 8, 8, 1\]',
    ),
    (
      {'truth': {'client_00': dataclasses.replace(_truth(), images=255 * _IMAGES[:2])}},
      r'truth: images of client_00 are not in \[0, 1\]',
    ),
    (
      {'truth': {'client_00': dataclasses.replace(_truth(), regions=_REGIONS * np.nan)}},
      r'truth: regions of client_00 are not in \[0, 1\]',
    ),
    (
      {'truth': {'client_00': dataclasses.replace(_truth(), labels=_LABELS[:1])}},
      'truth: labels of client_00',
    ),
    (
      {'truth': {'client_00': dataclasses.replace(_truth(), labels=_LABELS + 1)}},
      'truth: of client_00: labels must be int32 from 0 to 1',
    ),
  ],
)
def test_what_does_not_fit_the_round_is_named_and_nothing_written(
  tmp_path, observation, changes, message
):
  with pytest.raises(ValueError, match=message):
    _record(tmp_path / 'run', observation, **changes)
  assert not (tmp_path / 'run').exists()


def test_a_directory_is_of_one_program(tmp_path, observation):
  _record(tmp_path, observation)
  with pytest.raises(UserError, match='recorded with rounds 3, now it is 4'):
    _record(tmp_path, observation, rounds=4)
  defended = dataclasses.replace(observation, defense={'name': 'top_k', 'fraction': 0.1})
  with pytest.raises(UserError, match="recorded with defense 'none', now it is 'top_k'"):
    _record(tmp_path, defended)
  with pytest.raises(UserError, match='recorded with data_sha256'):
    _record(tmp_path, observation, public=_PUBLIC.take([0, 1, 2]))
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match='is no run of recorded rounds'):
    _record(other, observation)
  assert [path.name for path in other.iterdir()] == ['notes.txt']


def test_public_images_that_have_changed_are_refused(tmp_path, observation):
  _record(tmp_path, observation)
  config = json.loads((tmp_path / 'config.json').read_text())
  _record(tmp_path / 'other', observation, public=_PUBLIC.take([0, 1, 2]))
  path = tmp_path / 'public.safetensors'
  path.write_bytes((tmp_path / 'other' / path.name).read_bytes())
  with pytest.raises(UserError, match='not those of the run any more'):
    load_data_of(tmp_path, config)
  path.write_bytes(b'')
  with pytest.raises(UserError, match=r'public\.safetensors: not readable'):
    load_data_of(tmp_path, config)
