import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.local_steps import LocalSteps
from attacks.order_search import OrderSearch, Trial


def _searched(search: OrderSearch, loss_of) -> OrderSearch:
  """Tries all that it proposes."""
  while orders := search.next_orders():
    search.tried += [Trial(order, loss_of(order), 1.0) for order in orders]
  return search


def _steps(num_images, batch, passes=1, cut=None):
  order = [*range(num_images)] * passes
  order = order[:cut]
  return LocalSteps(tuple(tuple(order[k : k + batch]) for k in range(0, len(order), batch)))


def test_what_differs_is_tried_and_what_does_not_is_not():
  one = lambda order: 1.0  # noqa: E731
  for steps, labels, wanted in (
    # Which label comes first, and whether the second pass is in the order of the first.
    (_steps(2, 1, passes=2), (0, 1), 4),
    # Images of one label are numbered as they come.
    (_steps(2, 1, passes=2), (1, 1), 2),
    # Places of the two of label 0 among five.
    (_steps(5, 1), (0, 0, 1, 1, 1), 10),
    # How many of label 0 are in the first batch.
    (_steps(4, 2), (0, 0, 1, 1), 3),
    # The third step has either of two images.
    (_steps(2, 1, passes=2, cut=3), (0, 0), 2),
  ):
    tried = _searched(OrderSearch(steps, labels, 64, (0, 0)), one).tried
    assert len(tried) == wanted
    assert len({trial.order for trial in tried}) == wanted
    assert tried[0].order == tuple(steps.order)


def test_no_more_orders_than_wanted_and_the_seed_decides_them():
  steps, labels = _steps(8, 2, passes=3), [0, 1] * 4

  def tried(seed, count=9):
    return _searched(OrderSearch(steps, labels, count, seed), float_of).tried

  def float_of(order):
    return float(np.dot(order, np.arange(len(order))))

  assert len(tried((0, 0))) == 9
  assert tried((0, 0)) == tried((0, 0)) != tried((0, 1))
  # What was interrupted goes on as it would have.
  half = OrderSearch(steps, labels, 9, (0, 0), tried((0, 0))[:5])
  assert _searched(half, float_of).tried == tried((0, 0))


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.data())
def test_every_order_is_one_that_a_client_can_take(num_images, batch, passes, cut, data):
  steps = _steps(num_images, batch, passes, max(num_images, passes * num_images - cut))
  labels = data.draw(st.lists(st.integers(0, 1), min_size=num_images, max_size=num_images))
  search = _searched(OrderSearch(steps, labels, 12, (1, 2)), lambda order: float(order[0]))
  for trial in search.tried:
    assert len(trial.order) == len(steps.order)
    for start in range(0, len(trial.order), num_images):
      part = trial.order[start : start + num_images]
      assert len(set(part)) == len(part)
    assert set(trial.order[:num_images]) == set(range(num_images))


def test_changes_of_the_best_find_what_draws_alone_do_not():
  # Eight images one by one, four of each label: 70 orders, of which the wrong places are counted.
  steps, labels = _steps(8, 1), np.repeat([0, 1], 4)
  wanted = np.array([0, 1, 1, 0, 1, 0, 0, 1])

  def wrong_places(order):
    return float(np.sum(labels[list(order)] != wanted))

  ends = {True: [], False: []}
  for seed, climbs in itertools.product(range(20), ends):
    search = OrderSearch(steps, labels, 40, (seed, 0))
    # Without a loss that tells, changes are draws among others.
    loss_of = wrong_places if climbs else lambda order: 0.0
    tried = _searched(search, loss_of).tried
    ends[climbs].append(min(wrong_places(trial.order) for trial in tried))
  assert np.mean(ends[True]) < 0.5 * np.mean(ends[False])


def test_a_loss_that_is_not_finite_is_not_the_best():
  search = OrderSearch(_steps(2, 1), (0, 1), 2, (0, 0))
  search.tried = [Trial((0, 1), float('inf'), 1.0), Trial((1, 0), 2.0, 1.0)]
  assert search.best.tolist() == [1, 0]
