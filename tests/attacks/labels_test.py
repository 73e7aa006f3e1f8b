import numpy as np
import pytest

from attacks.labels import infer_labels, known_labels, label_counts
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.errors import UserError


def _inferred(observation, index=0):
  simulator = ClientSimulator(observation)
  client = observation.clients[index]
  gradient = simulator.observed_gradient(client)
  return infer_labels(simulator, gradient, client.num_images, smooth_images(8, seed=50))


def test_single_images():
  truth = [0, 3, 1, 2, 4, 3]
  images = smooth_images(len(truth))
  clients = [(images[i : i + 1], [label]) for i, label in enumerate(truth)]
  observation = play_round(small_model(num_classes=5), clients)
  inferred = [_inferred(observation, i) for i in range(len(truth))]
  assert [int(labels.values[0]) for labels in inferred] == truth
  assert {labels.source for labels in inferred} == {'inferred'}


@pytest.mark.parametrize('truth', [[0, 1, 1, 4], [2, 2, 2, 2], [0, 1, 2, 3, 4, 4, 0, 1]])
def test_batches(truth):
  observation = play_round(small_model(num_classes=5), [(smooth_images(len(truth)), truth)])
  np.testing.assert_array_equal(_inferred(observation).values, sorted(truth))


def test_counts_sum_to_the_images_whatever_the_noise():
  rng = np.random.default_rng(0)
  for _ in range(50):
    prediction = rng.dirichlet(np.ones(4))
    counts = label_counts(prediction, rng.standard_normal(4), 7)
    assert counts.sum() == 7
    assert (counts >= 0).all()


def test_known_labels_are_checked():
  np.testing.assert_array_equal(known_labels([1, 0], 2, 2, 'here').values, [1, 0])
  with pytest.raises(UserError, match='here: 1 labels for 2 images'):
    known_labels([1], 2, 2, 'here')
  with pytest.raises(UserError, match=r'label 2 is not in 0\.\.1'):
    known_labels([2], 1, 2, 'here')
