import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tff_shadow.data.partition import Partition, partition_indices
from tff_shadow.errors import UserError

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=120).map(np.array)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('iid:9', Partition('iid', 9)),
    ('dirichlet:9:0.5', Partition('dirichlet', 9, 0.5)),
    (
      'sizes:8/32/128/512/8/32/128/512/1',
      Partition('sizes', 9, sizes=(8, 32, 128, 512, 8, 32, 128, 512, 1)),
    ),
    ('manifest', Partition('manifest')),
  ],
)
def test_parse_and_back(text, expected):
  assert Partition.parse(text) == expected
  assert Partition.parse(str(expected)) == expected


@pytest.mark.parametrize(
  'text',
  [
    *('', 'iid', 'iid:', 'iid:0', 'iid:-3', 'iid:2.5', 'iid:3:4', 'iid: 3', 'uniform:9'),
    *('dirichlet:9', 'dirichlet:9:', 'dirichlet:9:0', 'dirichlet:9:-1', 'dirichlet:9:nan'),
    *('dirichlet:9:inf', 'sizes', 'sizes:', 'sizes:0', 'sizes:8//4', 'sizes:8,4', 'manifest:3'),
  ],
)
def test_nonsense_is_a_user_error(text):
  with pytest.raises(UserError, match='partition'):
    Partition.parse(text)


@given(st.text(max_size=20))
def test_parse_fails_only_with_user_error(text):
  try:
    partition = Partition.parse(text)
  except UserError:
    return
  assert Partition.parse(str(partition)) == partition


@pytest.mark.parametrize(
  'fields',
  [
    {'kind': 'iid', 'num_clients': 2, 'alpha': 1.0},
    {'kind': 'iid', 'num_clients': 2, 'sizes': (1, 1)},
    {'kind': 'sizes', 'num_clients': 3, 'sizes': (1, 1)},
    {'kind': 'dirichlet', 'num_clients': 2},
    {'kind': 'manifest', 'num_clients': 2},
  ],
)
def test_fields_of_another_kind_are_refused(fields):
  with pytest.raises(UserError, match='partition'):
    Partition(**fields)


@given(LABELS, st.integers(1, 20), st.sampled_from([None, 1e-3, 0.5, 100.0]), st.integers(0, 9))
def test_iid_and_dirichlet_are_disjoint_complete_and_never_empty(labels, clients, alpha, seed):
  partition = Partition('iid' if alpha is None else 'dirichlet', clients, alpha)
  if clients > len(labels):
    with pytest.raises(UserError, match=f'{clients} .* {len(labels)}'):
      partition_indices(partition, labels, np.random.default_rng(seed))
    return
  parts = partition_indices(partition, labels, np.random.default_rng(seed))
  assert len(parts) == clients
  assert min(len(part) for part in parts.values()) >= 1
  np.testing.assert_array_equal(np.sort(np.concatenate([*parts.values()])), np.arange(len(labels)))
  if alpha is None:
    sizes = [len(part) for part in parts.values()]
    assert max(sizes) - min(sizes) <= 1


@given(LABELS, st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 9))
def test_sizes_are_exact_disjoint_and_stratified(labels, sizes, seed):
  partition = Partition('sizes', sizes=tuple(sizes))
  if sum(sizes) > len(labels):
    with pytest.raises(UserError, match=f'{sum(sizes)} .* {len(labels)}'):
      partition_indices(partition, labels, np.random.default_rng(seed))
    return
  parts = [*partition_indices(partition, labels, np.random.default_rng(seed)).values()]
  assert [len(part) for part in parts] == sizes
  everything = np.concatenate(parts)
  assert len(np.unique(everything)) == len(everything)
  for label in np.unique(labels):
    expected = sizes[0] * np.mean(labels == label)
    assert abs(np.sum(labels[parts[0]] == label) - expected) < 1


def test_published_sizes_on_a_balanced_set_are_balanced():
  labels = np.arange(1361) % 2
  partition = Partition.parse('sizes:8/32/128/512/8/32/128/512/1')
  parts = partition_indices(partition, labels, np.random.default_rng(0))
  assert list(parts)[::8] == ['client_00', 'client_08']
  for part in parts.values():
    assert abs(labels[part].sum() - len(part) / 2) <= 1


def test_alpha_sets_the_skew():
  labels = np.arange(2000) % 2

  def skew(alpha):
    parts = partition_indices(
      Partition('dirichlet', 10, alpha), labels, np.random.default_rng(3)
    ).values()
    return np.mean([abs(labels[part].mean() - 0.5) for part in parts])

  assert skew(0.1) > 0.25
  assert skew(1000.0) < 0.05


def test_the_seed_decides():
  labels = np.arange(50) % 2
  for text in ('iid:4', 'dirichlet:4:0.5', 'sizes:5/6/7'):
    first, again, other = (
      np.concatenate(
        [*partition_indices(Partition.parse(text), labels, np.random.default_rng(seed)).values()]
      ).tolist()
      for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_manifest_follows_the_column():
  parts = partition_indices(
    Partition('manifest'), np.zeros(4, int), np.random.default_rng(0), ['b', 'a', 'b', 'b']
  )
  assert {key: value.tolist() for key, value in parts.items()} == {'b': [0, 2, 3], 'a': [1]}
  assert list(parts) == ['b', 'a']
  with pytest.raises(UserError, match="'client'"):
    partition_indices(Partition('manifest'), np.zeros(4, int), np.random.default_rng(0))
