import numpy as np

from attacks.scoring import results, scores
from attacks.scoring.label_accuracy import LabelAccuracy, matched_labels, multiset_labels
from tests.attacks import synthetic_run


def _attack(*clients):
  """Each client: true labels, inferred labels, their source, whether it was rebuilt."""
  targets = []
  for number, (true, inferred, source, rebuilt) in enumerate(clients):
    images = synthetic_run.photographs(len(true), 8, 1, seed=number)
    status = 'ok' if rebuilt else 'failed'
    record = {'status': status, 'labels': inferred, 'labels_source': source}
    sets = {'attack': images} if rebuilt else {}
    regions = np.ones((len(true), 8, 8, 1))
    targets.append(
      results.Target(f'client_{number}', record, sets, images, np.array(true), regions)
    )
  return results.AttackResult(None, 'a', {}, tuple(targets))


def _both(*clients):
  attack = _attack(*clients)
  return matched_labels(scores.score(attack)), multiset_labels(attack)


def test_order_matters_to_matched_labels_only():
  matched, multiset = _both(([0, 1, 2], [2, 1, 0], 'inferred', True))
  assert matched == LabelAccuracy(1, 3)
  assert multiset == LabelAccuracy(3, 3)
  assert multiset.share == 1.0


def test_multisets_count_how_often():
  _, multiset = _both(([0, 0, 1], [0, 1, 1], 'inferred', True))
  assert multiset == LabelAccuracy(2, 3)


def test_adds_up_clients_and_not_across_them():
  # What one client has too much of does not make up for what another lacks.
  matched, multiset = _both(([0, 0], [1, 0], 'inferred', True), ([1], [0], 'inferred', True))
  assert matched == LabelAccuracy(1, 3)
  assert multiset == LabelAccuracy(1, 3)


def test_labels_without_pictures_still_count():
  matched, multiset = _both(([0], [0], 'inferred', True), ([1, 1], [1, 0], 'inferred', False))
  assert matched == LabelAccuracy(1, 1)
  assert multiset == LabelAccuracy(2, 3)


def test_known_labels_and_none_do_not_count():
  matched, multiset = _both(([0], [0], 'known', True), ([1], [], None, False))
  assert matched == multiset == LabelAccuracy(0, 0)
  assert matched.share is None
