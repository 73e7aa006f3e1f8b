import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from attacks.labels import (
  LABEL_RULES,
  distinct_labels,
  impact_counts,
  infer_labels,
  known_labels,
  label_accuracy,
  label_counts,
  start_logits,
)
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.errors import UserError


def _inferred(observation, index=0, rule='bias'):
  simulator = ClientSimulator(observation)
  client = observation.clients[index]
  gradient = simulator.observed_gradient(client)
  return infer_labels([simulator], [gradient], client.num_images, smooth_images(8, seed=50), rule)


@pytest.mark.parametrize('rule', LABEL_RULES)
def test_single_images(rule):
  truth = [0, 3, 1, 2, 4, 3]
  images = smooth_images(len(truth))
  clients = [(images[i : i + 1], [label]) for i, label in enumerate(truth)]
  observation = play_round(small_model(num_classes=5), clients)
  inferred = [_inferred(observation, i, rule) for i in range(len(truth))]
  assert [int(labels.values[0]) for labels in inferred] == truth
  assert {labels.source for labels in inferred} == {'inferred'}


@pytest.mark.parametrize('rule', ['bias', 'llg'])
@pytest.mark.parametrize('truth', [[0, 1, 1, 4], [2, 2, 2, 2], [0, 1, 2, 3, 4, 4, 0, 1]])
def test_batches(truth, rule):
  observation = play_round(small_model(num_classes=5), [(smooth_images(len(truth)), truth)])
  np.testing.assert_array_equal(_inferred(observation, rule=rule).values, sorted(truth))


@pytest.mark.parametrize(
  ('rule', 'truth'),
  [
    *((rule, [3]) for rule in LABEL_RULES),
    ('bias', [0, 1, 1, 4]),
    ('llg', [0, 1, 1, 4]),
    ('gradinversion', [4, 2, 1]),
  ],
)
def test_what_noise_hides_in_one_round_several_show_together(rule, truth):
  images = smooth_images(len(truth))
  simulators, gradients = [], []
  for k, sign in enumerate((1, -1)):
    observation = play_round(small_model(num_classes=5, seed=k), [(images, truth)])
    simulators.append(ClientSimulator(observation))
    gradient = simulators[-1].observed_gradient(observation.clients[0])
    # Noise that says that all images are of class 2, and takes it back in the next round.
    misleading = -10.0 * np.array([0, 0, 1, 0, 0], np.float32)
    gradients.append([*gradient[:-2], *(own + sign * misleading for own in gradient[-2:])])
  typical = smooth_images(8, seed=50)
  alone = infer_labels(simulators[:1], gradients[:1], len(truth), typical, rule)
  together = infer_labels(simulators, gradients, len(truth), typical, rule)
  assert 2 in alone.values
  np.testing.assert_array_equal(together.values, sorted(truth))


@pytest.mark.parametrize('truth', [[3, 0], [4, 2, 1, 0], [0, 1, 2, 3, 4]])
def test_images_with_different_labels(truth):
  observation = play_round(small_model(num_classes=5), [(smooth_images(len(truth)), truth)])
  np.testing.assert_array_equal(_inferred(observation, rule='gradinversion').values, sorted(truth))


def test_a_kernel_without_bias_is_enough_for_llg():
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input((8, 8, 1))
  x = tf.keras.layers.Conv2D(12, 3, activation='relu')(inputs)
  x = tf.keras.layers.Dense(3, use_bias=False)(tf.keras.layers.Flatten()(x))
  model = tf.keras.Model(inputs, x)
  observation = play_round(model, [(smooth_images(4), [2, 0, 2, 2])])
  np.testing.assert_array_equal(_inferred(observation, rule='llg').values, [0, 2, 2, 2])
  with pytest.raises(UserError, match="'bias': the last layer has no bias"):
    _inferred(observation)


@pytest.mark.parametrize(
  ('rule', 'truth', 'message'),
  [
    ('idlg', [0, 1], "'idlg': tells the label of one image, not of 2"),
    ('gradinversion', [0, 1, 1], 'there are 3 images and 2 classes'),
    ('nearest', [0], "'nearest': unknown; use one of bias, idlg, llg, gradinversion"),
  ],
)
def test_what_a_rule_cannot_tell_is_refused(rule, truth, message):
  observation = play_round(small_model(), [(smooth_images(len(truth)), truth)])
  with pytest.raises(UserError, match=message):
    _inferred(observation, rule=rule)


def test_llg_refuses_negative_features():
  inputs = tf.keras.Input((8, 8, 1))
  x = tf.keras.layers.Rescaling(-1.0, offset=-1.0)(inputs)
  model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(x)))
  observation = play_round(model, [(smooth_images(2), [0, 1])])
  with pytest.raises(UserError, match='negative on average'):
    _inferred(observation, rule='llg')


def test_counts_sum_to_the_images_whatever_the_noise():
  rng = np.random.default_rng(0)
  for _ in range(50):
    noise = rng.standard_normal(4)
    for images in (1, 2, 7):
      for counts in (
        label_counts(rng.dirichlet(np.ones(4)), noise, images),
        impact_counts(noise, images, -0.3, 0.1 * rng.standard_normal(4)),
      ):
        assert counts.sum() == images
        assert (counts >= 0).all()


@given(st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any), st.floats(0.01, 10))
def test_llg_is_exact_where_impact_and_offset_are(counts, impact):
  counts = np.array(counts)
  images = counts.sum()
  # Offsets below one impact of the batch in all, as the mean prediction gives.
  offset = impact * images * np.linspace(0.2, 0.9, len(counts)) / len(counts)
  sums = offset - impact * counts
  # A column that sums below zero belongs to a class that is there.
  np.testing.assert_array_equal(impact_counts(sums, images, -impact, offset), counts)


def test_most_negative_entries_decide_not_the_sums():
  kernel = np.array([[0.1, -0.5, -0.2, 0.3], [0.1, 0.9, -0.2, 0.3]])
  assert distinct_labels(kernel, 2).tolist() == [1, 2]


def test_start_logits_are_sure_up_to_the_confidence():
  logits = start_logits(np.array([1, 0, 2]), confidence=0.8)
  assert logits.dtype == np.float32
  expected = [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.1, 0.8]]
  np.testing.assert_allclose(tf.nn.softmax(logits), expected, atol=1e-6)
  for confidence in (1 / 3, 1.0):
    with pytest.raises(ValueError, match='confidence must be above 1 / 3'):
      start_logits(np.array([1, 0, 2]), confidence)


def test_accuracy_is_of_multisets():
  assert label_accuracy([0, 1, 1], [1, 0, 1]) == 1
  assert label_accuracy(np.array([0, 0, 0, 1]), [1, 1, 1, 0]) == 0.5
  assert label_accuracy([2, 2], (0, 1)) == 0
  for inferred, true in (([0], [0, 1]), ([], [])):
    with pytest.raises(ValueError, match='inferred labels for'):
      label_accuracy(inferred, true)


def test_known_labels_are_checked():
  np.testing.assert_array_equal(known_labels([1, 0], 2, 2, 'here').values, [1, 0])
  with pytest.raises(UserError, match='here: 1 labels for 2 images'):
    known_labels([1], 2, 2, 'here')
  with pytest.raises(UserError, match=r'label 2 is not in 0\.\.1'):
    known_labels([2], 1, 2, 'here')
