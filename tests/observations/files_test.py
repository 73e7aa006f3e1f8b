import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tff_shadow.errors import UserError
from tff_shadow.models import build_model, model_to_config
from tff_shadow.observations import (
  ClientObservation,
  ClientTraining,
  Observation,
  Truth,
  WeightArrays,
  load_tensors,
  read_observation,
  read_truth,
  round_directory_name,
  save_tensors,
  write_observation,
  write_truth,
)


def make_observation(seed=0, num_clients=2):
  rng = np.random.default_rng(seed)
  model = build_model('conv_small', image_shape=(8, 8, 1), num_classes=2, norm='batch', seed=0)

  def weights():
    return WeightArrays(
      tuple(rng.normal(size=v.shape).astype(np.float32) for v in model.trainable_variables),
      tuple(rng.normal(size=v.shape).astype(np.float32) for v in model.non_trainable_variables),
    )

  return Observation(
    round_num=3,
    dataset='tiny',
    image_shape=(8, 8, 1),
    class_names=('a', 'b'),
    model_name='conv_small',
    model_config=model_to_config(model),
    batch_norm_sharing='aggregate',
    client_training=ClientTraining('sgd', 0.1, 0.0, 4, 1, None),
    defense={'name': 'none'},
    global_weights=weights(),
    clients=tuple(
      ClientObservation(f'client_{k}', 4, 1, 4.0, weights(), bool(k % 2))
      for k in range(num_clients)
    ),
    aggregate=weights(),
    public_mean_image=rng.random((8, 8, 1)).astype(np.float32),
  )


def _flat(observation):
  weights = [observation.global_weights, observation.aggregate]
  weights += [client.update for client in observation.clients]
  arrays = [a for w in weights for a in (*w.trainable, *w.non_trainable)]
  return [*arrays, observation.public_mean_image]


def _without_arrays(observation):
  empty = WeightArrays((), ())
  return dataclasses.replace(
    observation,
    global_weights=empty,
    aggregate=empty,
    public_mean_image=None,
    clients=tuple(dataclasses.replace(c, update=empty) for c in observation.clients),
  )


def test_batch_size_of_a_client(tmp_path):
  observation = make_observation()
  write_observation(tmp_path, observation)
  # A file without own batch sizes is what it was before there were any.
  assert 'batch_size' not in json.loads((tmp_path / 'observation.json').read_text())['clients'][0]
  assert [client.batch_size for client in read_observation(tmp_path).clients] == [None, None]
  first, second = observation.clients
  own = dataclasses.replace(first, batch_size=2)
  write_observation(tmp_path, dataclasses.replace(observation, clients=(own, second)))
  again = read_observation(tmp_path)
  assert [client.batch_size for client in again.clients] == [2, None]
  sizes = [client.images_per_step(again.client_training) for client in again.clients]
  assert sizes == [2, 4]


@pytest.mark.parametrize('num_clients', [1, 12])
def test_round_trip(tmp_path, num_clients):
  observation = make_observation(num_clients=num_clients)
  write_observation(tmp_path, observation)
  again = read_observation(tmp_path)
  assert _without_arrays(again) == _without_arrays(observation)
  for actual, wanted in zip(_flat(again), _flat(observation), strict=True):
    np.testing.assert_array_equal(actual, wanted)
  assert again.client('client_0').num_images == 4
  with pytest.raises(KeyError):
    again.client('nobody')


def test_holds_no_image_and_no_label(tmp_path):
  write_observation(tmp_path, make_observation())
  document = (tmp_path / 'observation.json').read_text()
  assert 'label' not in document
  assert 'truth' not in document


def test_missing(tmp_path):
  with pytest.raises(UserError, match='no observation here'):
    read_observation(tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'version': 99}, 'observation version 99, this program reads 1'),
    ({'format': 'other'}, 'not an observation'),
    ({'clients': [{'client_id': 'x'}]}, 'damaged'),
    ({'image_shape': [9, 9, 1]}, 'damaged'),
    ({'batch_norm_sharing': 'perhaps'}, 'damaged'),
    ({'tensors_sha256': '0'}, 'does not belong'),
  ],
)
def test_other_or_damaged_documents(tmp_path, change, message):
  write_observation(tmp_path, make_observation())
  path = tmp_path / 'observation.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError, match=message):
    read_observation(tmp_path)


@settings(max_examples=20, deadline=None)
@given(cut=st.floats(0.0, 0.999), name=st.sampled_from(['observation.json', 'tensors.safetensors']))
def test_any_truncation_is_a_user_error(tmp_path_factory, cut, name):
  directory = tmp_path_factory.mktemp('observation')
  write_observation(directory, make_observation())
  path = directory / name
  path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
  with pytest.raises(UserError):
    read_observation(directory)


def test_strided_arrays_are_written_as_they_read(tmp_path):
  images = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 3, 4, 4).transpose(0, 2, 3, 1)
  truth = Truth(images, np.array([0, 1], np.int32), np.ones((2, 4, 4, 1), np.float32))
  path = tmp_path / 'truth.safetensors'
  write_truth(path, 1, {'client_00': truth, 'a/b': truth})
  again = read_truth(path)
  assert sorted(again) == ['a/b', 'client_00']
  np.testing.assert_array_equal(again['a/b'].images, images)


def test_scalars_stay_scalars(tmp_path):
  save_tensors(tmp_path / 'a.safetensors', {'count': np.float32(3.0), 'one': np.ones(1)})
  again = load_tensors(tmp_path / 'a.safetensors')
  assert (again['count'].shape, again['one'].shape) == ((), (1,))


def test_truth_of_another_kind(tmp_path):
  write_observation(tmp_path, make_observation())
  with pytest.raises(UserError, match='not a truth file'):
    read_truth(tmp_path / 'tensors.safetensors')


def test_round_directories_sort_by_round():
  names = [round_directory_name(n) for n in (1, 2, 10, 100)]
  assert names == sorted(names)
