import dataclasses

import numpy as np
import pytest

from attacks.audit import cache as cache_module
from attacks.audit.cache import AuditCache, undefended_key
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.observations import Truth, WeightArrays


def _made(place, text='result'):
  (place / 'best').mkdir(parents=True)
  (place / 'best' / 'result.json').write_text(text)
  return place


def test_what_one_audit_stored_another_finds(tmp_path):
  cache = AuditCache(tmp_path / 'cache')
  cache.store('key', _made(tmp_path / 'a'))
  cache.fetch('key', tmp_path / 'b' / 'round')
  assert (tmp_path / 'b' / 'round' / 'best' / 'result.json').read_text() == 'result'
  cache.fetch('other', tmp_path / 'c')
  assert not (tmp_path / 'c').exists()
  assert [path.name for path in (tmp_path / 'cache').iterdir()] == ['key']


def test_nothing_is_replaced(tmp_path):
  cache = AuditCache(tmp_path / 'cache')
  cache.store('key', _made(tmp_path / 'a', 'first'))
  own = _made(tmp_path / 'b', 'second')
  cache.store('key', own)
  cache.fetch('key', own)
  assert (own / 'best' / 'result.json').read_text() == 'second'
  cache.fetch('key', tmp_path / 'c')
  assert (tmp_path / 'c' / 'best' / 'result.json').read_text() == 'first'


def test_without_a_directory_nothing_is_kept(tmp_path):
  cache = AuditCache(None)
  cache.store('key', _made(tmp_path / 'a'))
  cache.fetch('key', tmp_path / 'b')
  assert [path.name for path in tmp_path.iterdir()] == ['a']


@pytest.fixture(scope='module')
def observed():
  images = smooth_images(2)
  observation = play_round(small_model(), [(images[:1], [1]), (images[1:], [0])])
  regions = np.ones((1, 8, 8, 1), np.float32)
  truth = {
    f'client_0{k}': Truth(images[k : k + 1], np.array([1 - k], np.int32), regions) for k in range(2)
  }
  return observation, truth


def test_the_key_follows_all_that_the_attacks_follow(observed):
  observation, truth = observed
  clients = list(truth)
  key = undefended_key(observation, truth, clients, {'iterations': 3})
  # Updates follow from the rest; a defence is not in force.
  client = observation.clients[0]
  noised = WeightArrays(tuple(array + 1 for array in client.update.trainable))
  same = dataclasses.replace(
    observation,
    clients=(dataclasses.replace(client, update=noised), observation.clients[1]),
    defense={'name': 'top_k'},
  )
  assert undefended_key(same, truth, clients, {'iterations': 3}) == key
  weights = observation.global_weights
  moved = WeightArrays((weights.trainable[0] + 1e-3, *weights.trainable[1:]))
  other_image = {
    **truth,
    'client_00': dataclasses.replace(truth['client_00'], images=1 - truth['client_00'].images),
  }
  training = dataclasses.replace(observation.client_training, learning_rate=0.7)
  others = [
    (dataclasses.replace(observation, global_weights=moved), truth, clients, {'iterations': 3}),
    (dataclasses.replace(observation, client_training=training), truth, clients, {'iterations': 3}),
    (observation, other_image, clients, {'iterations': 3}),
    (observation, truth, clients[:1], {'iterations': 3}),
    (observation, truth, clients, {'iterations': 4}),
  ]
  keys = [undefended_key(*arguments) for arguments in others]
  assert len({key, *keys}) == 1 + len(keys)


def test_the_key_follows_the_sources_of_the_attacks(observed, monkeypatch):
  observation, truth = observed
  key = undefended_key(observation, truth, list(truth), {})
  monkeypatch.setattr(cache_module, 'attacks_digest', lambda: 'others')
  assert undefended_key(observation, truth, list(truth), {}) != key
