import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.local_steps import check_images_recur, local_steps, may_be_cut
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.data import local_training_order
from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE, ClientObservation, ClientTraining, WeightArrays


def _client(num_images, num_steps):
  return ClientObservation('client_00', num_images, num_steps, 1.0, WeightArrays(()))


def _training(batch_size, epochs, max_steps=None):
  return ClientTraining('sgd', 0.1, 0.0, batch_size, epochs, max_steps)


@given(
  st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 6))
)
def test_batches_are_those_of_a_client(num_examples, batch_size, epochs, max_steps):
  rng = np.random.default_rng(0)
  order = local_training_order(num_examples, batch_size, epochs, max_steps, rng)
  distinct = len(set(order.tolist()))
  num_steps = -(-len(order) // batch_size)
  steps = local_steps(_client(distinct, num_steps), _training(batch_size, epochs, max_steps))
  sizes = [len(order[k : k + batch_size]) for k in range(0, len(order), batch_size)]
  assert [len(batch) for batch in steps.batches] == sizes
  assert {image for batch in steps.batches for image in batch} == set(range(distinct))
  # The images are numbered as they came.
  assert steps.order[:distinct].tolist() == list(range(distinct))
  assert [size for count, size in steps.segments() for _ in range(count)] == sizes
  own = steps.drawn(np.random.default_rng(1), keeps_first=True)
  assert [len(batch) for batch in own.batches] == sizes
  assert steps.in_order(own.order) == own
  assert own.order[:distinct].tolist() == list(range(distinct))
  for start in range(0, len(order), distinct):
    assert len(set(own.order[start : start + distinct])) == len(order[start : start + distinct])


def test_a_single_step_is_told():
  assert local_steps(_client(4, 1), _training(4, 1)).is_single
  assert not local_steps(_client(4, 2), _training(4, 2)).is_single


def test_a_client_may_have_a_batch_size_of_its_own():
  client = dataclasses.replace(_client(4, 2), batch_size=2)
  steps = local_steps(client, _training(8, 1))
  assert steps.batches == ((0, 1), (2, 3))
  assert local_steps(client, _training(8, 3, 2)).batches == ((0, 1), (2, 3))


def test_an_order_matters_only_where_a_step_has_a_part_of_the_images():
  for images, num_steps, batch_size, epochs, is_ordered in (
    (4, 1, 4, 1, False),
    (4, 3, 4, 3, False),
    (1, 2, 1, 2, False),
    (4, 2, 2, 1, True),
    (3, 2, 2, 1, True),
  ):
    steps = local_steps(_client(images, num_steps), _training(batch_size, epochs))
    assert steps.is_ordered == is_ordered


def test_orders_of_a_client():
  steps = local_steps(_client(5, 4), _training(3, 2))
  first, again, other = (
    steps.drawn(np.random.default_rng(seed), keeps_first=False) for seed in (3, 3, 4)
  )
  assert first == again != other
  assert sorted(first.order[:5]) == sorted(first.order[5:]) == list(range(5))
  # Each pass has an order of its own.
  assert first.order[:5].tolist() != first.order[5:].tolist()
  whole = local_steps(_client(4, 3), _training(4, 3))
  assert whole.drawn(np.random.default_rng(3), keeps_first=False) is whole


def test_clients_that_may_have_more_images_than_they_used():
  assert may_be_cut(_client(2, 1), _training(2, 1, 1))
  assert may_be_cut(_client(6, 3), _training(2, 4, 3))
  # Less than a batch, or some twice: there are no more.
  assert not may_be_cut(_client(1, 1), _training(2, 1, 1))
  assert not may_be_cut(_client(5, 3), _training(2, 4, 3))
  assert not may_be_cut(_client(2, 1), _training(2, 1))
  assert may_be_cut(dataclasses.replace(_client(1, 1), batch_size=1), _training(2, 1, 1))


def test_steps_that_do_not_fit_the_settings():
  steps = local_steps(_client(3, 5), _training(2, 1))
  assert [len(batch) for batch in steps.batches] == [2] * 5


def test_rounds_on_other_images_are_refused():
  observation = play_round(small_model(), [(smooth_images(1), [1]), (smooth_images(2), [0, 1])])
  training = dataclasses.replace(observation.client_training, max_local_steps=1)
  cut = dataclasses.replace(observation, client_training=training)
  # A client with less than a batch has used all that it has.
  check_images_recur([observation, cut], ['client_00'])
  check_images_recur([observation, observation], ['client_00', 'client_01'])
  for targets in (['client_00', 'client_01'], [AGGREGATE]):
    with pytest.raises(UserError, match='--max_local_steps=1 in the training client_01 need not'):
      check_images_recur([observation, cut], targets)
