import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.learning.noise_settings import shadow_input_spec
from tff_shadow.shadow import SaliencyConfig, add_region_maps, build_region_map
from tff_shadow.shadow.noise_keys import (
  NOISE_KEY,
  add_noise_keys,
  draw_secret,
  experiment_secret,
  image_keys,
)

_SECRET = experiment_secret(1, 'client_00')


def _rows(keys):
  return {tuple(row) for row in np.asarray(keys).tolist()}


def _dataset_keys(num_examples, secret=_SECRET, round_num=None):
  examples = tf.data.Dataset.range(num_examples).map(
    lambda i: collections.OrderedDict(x=tf.fill([2, 2, 1], tf.cast(i, tf.float32)), y=i)
  )
  return list(add_noise_keys(examples, secret, round_num=round_num).as_numpy_iterator())


class TestSecrets:
  def test_drawn_ones_differ(self):
    assert len(draw_secret()) == 32
    assert draw_secret() != draw_secret()

  def test_experiment_ones_are_reproducible_per_client_and_seed(self):
    assert experiment_secret(1, 'client_00') == _SECRET
    others = {experiment_secret(s, c) for s in (1, 2) for c in ('client_00', 'client_01')}
    assert len(others) == 4


class TestImageKeys:
  def test_type(self):
    keys = image_keys(_SECRET, np.arange(5), None)
    assert keys.dtype == np.int32
    assert keys.shape == (5, 2)
    assert image_keys(_SECRET, np.arange(0), None).shape == (0, 2)

  def test_differ_by_image_secret_and_round(self):
    images = np.arange(50)
    keys = [
      image_keys(secret, images, round_num)
      for secret in (_SECRET, experiment_secret(1, 'client_01'), draw_secret())
      for round_num in (None, 0, 1, 2)
    ]
    assert len(set().union(*map(_rows, keys))) == 50 * 12

  def test_frozen_ones_depend_on_nothing_but_the_image(self):
    keys = image_keys(_SECRET, np.arange(10), None)
    np.testing.assert_array_equal(keys, image_keys(_SECRET, np.arange(10), None))
    np.testing.assert_array_equal(keys[[7, 2]], image_keys(_SECRET, np.array([7, 2]), None))

  def test_both_halves_use_their_whole_range(self):
    keys = image_keys(_SECRET, np.arange(4000), None).astype(np.float64) / 2**31
    assert np.abs(keys.mean(axis=0)).max() < 0.04
    np.testing.assert_allclose(keys.std(axis=0), 1 / np.sqrt(3), rtol=0.05)
    assert abs(np.corrcoef(keys.T)[0, 1]) < 0.07


class TestAddNoiseKeys:
  def test_adds_a_key_and_keeps_the_rest(self):
    elements = _dataset_keys(6)
    assert list(elements[0]) == ['x', 'y', NOISE_KEY]
    assert [element['y'] for element in elements] == list(range(6))
    assert elements[0][NOISE_KEY].dtype == np.int32
    assert elements[0][NOISE_KEY].shape == (2,)

  @pytest.mark.parametrize('first', ['keys', 'regions'])
  def test_what_a_process_takes_comes_out_with_regions_in_either_order(self, first):
    examples = tf.data.Dataset.from_tensor_slices(
      collections.OrderedDict(x=tf.zeros((4, 8, 8, 1)), y=tf.zeros(4, tf.int32))
    )
    region_map = build_region_map(SaliencyConfig('uniform'))
    if first == 'keys':
      examples = add_region_maps(add_noise_keys(examples, _SECRET), region_map)
    else:
      examples = add_noise_keys(add_region_maps(examples, region_map), _SECRET)
    batches = examples.batch(2)
    wanted = tff.types.tensorflow_to_type(shadow_input_spec((8, 8, 1), with_regions=True))
    found = tff.types.tensorflow_to_type(batches.element_spec)
    assert list(batches.element_spec) == ['x', 'y', NOISE_KEY, 'region']
    wanted.check_assignable_from(found)

  def test_differ_by_example_secret_and_round(self):
    settings = [(_SECRET, None), (_SECRET, 3), (_SECRET, 4), (experiment_secret(2, 'a'), None)]
    keys = [[e[NOISE_KEY] for e in _dataset_keys(20, *setting)] for setting in settings]
    assert len(set().union(*map(_rows, keys))) == 20 * 4

  def test_frozen_ones_stay_with_their_example_through_shuffling(self):
    first = {int(e['y']): tuple(e[NOISE_KEY]) for e in _dataset_keys(10)}
    examples = tf.data.Dataset.range(10).map(lambda i: collections.OrderedDict(y=i))
    shuffled = add_noise_keys(examples, _SECRET).shuffle(10, seed=1)
    assert {int(e['y']): tuple(e[NOISE_KEY]) for e in shuffled.as_numpy_iterator()} == first

  def test_both_halves_differ_between_examples(self):
    # Halves that stay the same would leave an attacker few keys to try.
    keys = np.array([e[NOISE_KEY] for e in _dataset_keys(300)])
    assert len(set(keys[:, 0])) == 300
    assert len(set(keys[:, 1])) == 300
    assert np.abs((keys / 2**31).mean(axis=0)).max() < 0.15
