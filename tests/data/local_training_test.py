import collections

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tests.data.federated_test import make_examples
from tff_shadow.data.local_training import client_dataset, local_training_order


@given(
  st.integers(1, 30),
  st.integers(1, 8),
  st.integers(1, 4),
  st.one_of(st.none(), st.integers(1, 12)),
)
def test_order_is_one_permutation_per_epoch_cut_to_the_steps(count, batch, epochs, steps):
  order = local_training_order(count, batch, epochs, steps, np.random.default_rng(0))
  full = count * epochs
  assert len(order) == (full if steps is None else min(full, steps * batch))
  for start in range(0, len(order) - count + 1, count):
    np.testing.assert_array_equal(np.sort(order[start : start + count]), np.arange(count))
  rest = order[len(order) // count * count :]
  assert len(np.unique(rest)) == len(rest)


def test_epochs_differ_and_the_generator_decides():
  first = local_training_order(20, 4, 2, None, np.random.default_rng(1))
  assert first[:20].tolist() != first[20:].tolist()
  again = local_training_order(20, 4, 2, None, np.random.default_rng(1))
  np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize('name', ['num_examples', 'batch_size', 'epochs', 'max_steps'])
def test_order_names_the_bad_argument(name):
  arguments = {'num_examples': 3, 'batch_size': 1, 'epochs': 1, 'max_steps': 1} | {name: 0}
  with pytest.raises(ValueError, match=name):
    local_training_order(**arguments, rng=np.random.default_rng(0))


@pytest.mark.parametrize('with_regions', [False, True])
def test_dataset_follows_the_order(with_regions):
  examples = make_examples(5, channels=3)
  order = [4, 0, 0, 2, 3]
  dataset = client_dataset(examples, order, 2, with_regions=with_regions)
  spec = collections.OrderedDict(
    x=tf.TensorSpec([None, 8, 8, 3], tf.float32), y=tf.TensorSpec([None], tf.int32)
  )
  if with_regions:
    spec['region'] = tf.TensorSpec([None, 8, 8, 1], tf.float32)
  assert dataset.element_spec == spec
  batches = [*dataset.as_numpy_iterator()]
  assert [len(batch['y']) for batch in batches] == [2, 2, 1]
  expected = examples.take(order)
  np.testing.assert_array_equal(
    np.concatenate([batch['x'] for batch in batches]), expected.float_images()
  )
  np.testing.assert_array_equal(np.concatenate([b['y'] for b in batches]), expected.labels)
  if with_regions:
    np.testing.assert_array_equal(
      np.concatenate([b['region'] for b in batches]), expected.float_regions()
    )


def test_dataset_refuses_indices_outside():
  with pytest.raises(ValueError, match=r'0\.\.4'):
    client_dataset(make_examples(5), [5], 1)
