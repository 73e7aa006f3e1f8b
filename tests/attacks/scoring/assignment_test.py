import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from attacks.scoring import assignment


def _images(count, seed):
  return np.random.default_rng(seed).random((count, 7, 7, 1))


def test_mse_matrix():
  matrix = assignment.mse_matrix(np.full((2, 7, 7, 1), 0.5), np.zeros((3, 7, 7, 1)))
  np.testing.assert_allclose(matrix, np.full((2, 3), 0.25))


def test_is_one_to_one_and_not_greedy():
  # Truth 0 is nearest to both; greedy by truth order would leave truth 1 with an error of 0.81.
  truths = np.stack([np.full((7, 7, 1), value) for value in (0.4, 0.0)])
  images = np.stack([np.full((7, 7, 1), value) for value in (0.3, 0.9)])
  assert assignment.assign(images, truths) == {0: 1, 1: 0}


@hypothesis.given(
  count=strategies.integers(1, 6), order=strategies.randoms(), seed=strategies.integers(0, 1000)
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_permuting_the_reconstructions_changes_nothing_but_the_indices(count, order, seed):
  images, truths = _images(count, seed), _images(count, seed + 1)
  permutation = list(range(count))
  order.shuffle(permutation)
  plain = assignment.assign(images, truths)
  permuted = assignment.assign(images[permutation], truths)
  assert {truth: permutation[index] for truth, index in permuted.items()} == plain


@hypothesis.given(
  images=strategies.integers(1, 4),
  truths=strategies.integers(1, 4),
  seed=strategies.integers(0, 1000),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_total_is_the_smallest_of_all_assignments(images, truths, seed):
  costs = assignment.mse_matrix(_images(images, seed), _images(truths, seed + 1))
  found = assignment.assign(_images(images, seed), _images(truths, seed + 1))
  assert len(found) == min(images, truths)
  assert len(set(found.values())) == len(found)
  wide = costs if images <= truths else costs.T
  best = min(
    sum(wide[row, column] for row, column in enumerate(columns))
    for columns in itertools.permutations(range(wide.shape[1]), wide.shape[0])
  )
  assert sum(costs[row, truth] for truth, row in found.items()) == pytest.approx(best)


def test_rejects_other_shapes_and_non_finite_values():
  with pytest.raises(ValueError, match='image shape'):
    assignment.assign(np.zeros((1, 7, 7, 3)), np.zeros((1, 7, 7, 1)))
  with pytest.raises(ValueError, match='finite'):
    assignment.assign(np.full((1, 7, 7, 1), np.inf), np.zeros((1, 7, 7, 1)))


def test_in_order_undoes_a_permutation():
  reference = _images(5, 0)
  shuffled = reference[[3, 0, 4, 1, 2]] + 0.01
  np.testing.assert_allclose(assignment.in_order(shuffled, reference), reference + 0.01)
