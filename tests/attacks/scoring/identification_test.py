import numpy as np
import pytest
from scipy import stats

from attacks.scoring import results, scores
from attacks.scoring.identification import (
  correlation_distance,
  identify,
  identify_by_likelihood,
  likelihood_ranks,
  original_places,
  original_ranks,
)
from tests.attacks import synthetic_run


def _result(truths, attacks, controls=None, others=None):
  targets = []
  for index, truth in enumerate(truths):
    one = slice(index, index + 1)
    sets = {'attack': attacks[one]}
    if controls is not None:
      sets['prior_only'] = controls[one]
    if others is not None:
      sets['other_update'] = others[one]
    record = {'status': 'ok', 'labels': [], 'labels_source': 'known'}
    labels, region = np.zeros(1, np.int32), np.ones((1, *truth.shape[:2], 1))
    targets.append(results.Target(f'client_{index:02d}', record, sets, truth[None], labels, region))
  return results.AttackResult(None, 'a', {}, tuple(targets))


def _identify(*args, **kwargs):
  result = _result(*args)
  return identify(result, scores.score(result), **kwargs)


def _ranks(*args, **kwargs):
  result = _result(*args)
  return original_ranks(result, scores.score(result), **kwargs)


def _by_table(table):
  """A distance that reads its numbers off a table, whatever the images."""
  return lambda images, gallery: np.array(table, float)[: len(images), : len(gallery)]


def test_sees_through_noise_that_psnr_punishes():
  truths = synthetic_run.photographs(12, 32, 1)
  attacked = synthetic_run.noisy(truths, np.full(12, 0.5), seed=1)
  guess = np.random.default_rng(2).random(truths.shape).astype(np.float32)
  rows = scores.score(_result(truths, attacked, np.full_like(truths, 0.5)))
  assert np.mean([row.quality['attack'].psnr - row.quality['prior_only'].psnr for row in rows]) < 0
  found = _identify(truths, attacked, guess)
  assert found.correct >= 10
  assert (found.of, found.choices) == (12, 12)
  assert found.p_value < 1e-6


def test_unrelated_images_pick_by_chance():
  generator = np.random.default_rng(0)
  p_values = []
  for _ in range(20):
    truths, attacked = generator.random((10, 8, 8, 1)), generator.random((10, 8, 8, 1))
    p_values.append(_identify(truths, attacked).p_value)
  assert np.mean(np.array(p_values) < 0.05) <= 0.1


def test_p_value_is_against_the_control():
  truths = synthetic_run.photographs(4, 16, 3)
  swapped = truths[[1, 0, 2, 3]]
  found = _identify(truths, truths, swapped)
  assert (found.correct, found.control_correct) == (4, 2)
  expected = stats.binomtest(4, 4, 0.5, alternative='greater').pvalue
  assert found.p_value == pytest.approx(expected)


def test_the_control_that_picks_out_more_is_the_one():
  truths = synthetic_run.photographs(4, 16, 3)
  swapped, rolled = truths[[1, 0, 2, 3]], np.roll(truths, 1, axis=0)
  assert _identify(truths, truths, rolled, swapped).control_correct == 2
  assert _identify(truths, truths, swapped, rolled).control_correct == 2


def test_a_control_of_few_draws_proves_little():
  truths = synthetic_run.photographs(4, 16, 3)
  found = _identify(truths, truths, None, np.roll(truths, 1, axis=0))
  assert (found.correct, found.control_correct) == (4, 0)
  expected = stats.binomtest(4, 4, 1 / 4, alternative='greater').pvalue
  assert found.p_value == pytest.approx(expected)
  found = _identify(truths, truths, None, truths[[1, 0, 2, 3]])
  expected = stats.binomtest(4, 4, 3 / 5, alternative='greater').pvalue
  assert found.p_value == pytest.approx(expected)


def test_flat_reconstructions_identify_nothing():
  truths = synthetic_run.photographs(3, 16, 1)
  found = _identify(truths, np.full_like(truths, 0.3))
  assert (found.correct, found.of, found.p_value) == (0, 3, 1.0)


def test_a_duplicated_original_counts_whichever_copy_is_picked():
  truths = synthetic_run.photographs(3, 16, 1)[[0, 1, 1]]
  assert _identify(truths, truths).correct == 3


def test_correlation_distance():
  images = synthetic_run.photographs(3, 16, 3)
  found = correlation_distance(images[:2], np.stack([images[0], 1 - images[0], images[2]]))
  expected = 1 - np.corrcoef(images.reshape(3, -1))
  assert found.shape == (2, 3)
  np.testing.assert_allclose(found[0], [0, 2, expected[0, 2]], atol=1e-6)
  np.testing.assert_allclose(found[1], [expected[1, 0], 2 - expected[1, 0], expected[1, 2]])
  flat = np.full_like(images[:1], 0.3)
  assert np.isnan(correlation_distance(flat, images)).all()
  np.testing.assert_allclose(correlation_distance(images, flat), 1)


def test_precision_counts_originals_among_the_k_nearest():
  truths = synthetic_run.photographs(4, 8, 1)
  others = list(synthetic_run.photographs(4, 8, 1, seed=1))
  # Own originals are on the diagonal: ranks 1, 2, 4 and 6.
  table = np.full((4, 8), 9.0)
  np.fill_diagonal(table, 5.0)
  for row, nearer in enumerate((0, 1, 3, 5)):
    table[row, [column for column in range(8) if column != row][:nearer]] = 1.0
  found = _identify(truths, truths, distractors=others, distance=_by_table(table))
  assert [(p.k, p.correct) for p in found.precisions] == [(1, 1), (3, 2), (5, 3)]
  assert (found.correct, found.of, found.choices) == (1, 4, 8)
  ranks = _ranks(truths, truths, distractors=others, distance=_by_table(table))
  assert ranks == {
    'attack': [1, 2, 4, 6],
    'prior_only': [None] * 4,
    'other_update': [None] * 4,
  }


def test_a_tie_is_no_hit():
  truths = synthetic_run.photographs(2, 8, 1)
  table = [[0.3, 0.3], [0.3 + 1e-8, 0.3 + 2e-8]]
  assert _ranks(truths, truths, distance=_by_table(table))['attack'] == [2, 2]
  table = [[0.3, 0.31], [0.31, 0.3]]
  assert _ranks(truths, truths, distance=_by_table(table))['attack'] == [1, 1]


def test_flat_reconstructions_are_on_no_short_list():
  truths = synthetic_run.photographs(1, 16, 1)
  found = _identify(truths, np.full_like(truths, 0.3))
  assert (found.choices, [p.correct for p in found.precisions]) == (1, [0, 0, 0])


def test_distractors_make_it_harder():
  truths = synthetic_run.photographs(3, 16, 1)
  attacked = synthetic_run.noisy(truths, np.full(3, 0.05), seed=0)
  alone = _identify(truths, attacked)
  assert (alone.correct, alone.choices) == (3, 3)
  # These correlate perfectly with the second reconstruction.
  closer = [attacked[1] * scale for scale in (0.9, 0.8, 0.7)]
  found = _identify(truths, attacked, distractors=closer)
  assert found.choices == 6
  assert [p.correct for p in found.precisions] == [2, 2, 3]
  assert _ranks(truths, attacked, distractors=closer)['attack'] == [1, 4, 1]
  # More to choose from and still found is stronger evidence.
  unlike = list(synthetic_run.photographs(3, 16, 1, seed=1))
  found = _identify(truths, attacked, distractors=unlike)
  assert (found.correct, found.choices) == (3, 6)
  assert found.p_value < alone.p_value


def test_copies_and_other_sizes_do_not_enlarge_the_gallery():
  truths = synthetic_run.photographs(3, 16, 1)
  attacked = synthetic_run.noisy(truths, np.full(3, 0.05), seed=0)
  copies = [truths[0].copy(), truths[0].astype(np.float64)]
  other_size = [synthetic_run.photographs(1, 8, 1)[0]]
  found = _identify(truths, attacked, distractors=copies + other_size)
  assert (found.correct, found.choices) == (3, 3)


def test_targets_of_several_sizes():
  small, large = synthetic_run.photographs(2, 8, 1), synthetic_run.photographs(2, 16, 1)
  targets = (*_result(small, small).targets, *_result(large, large[[1, 0]]).targets)
  targets = tuple(
    results.Target(
      f'client_{index}',
      *[getattr(t, f) for f in ('record', 'reconstructions', 'images', 'labels', 'regions')],
    )
    for index, t in enumerate(targets)
  )
  attack = results.AttackResult(None, 'a', {}, targets)
  assert original_ranks(attack, scores.score(attack))['attack'] == [1, 1, 2, 2]


def test_the_control_is_counted_alike():
  truths = synthetic_run.photographs(6, 16, 3)
  found = _identify(truths, truths, truths[[1, 0, 2, 3, 4, 5]])
  assert [p.correct for p in found.precisions] == [6, 6, 6]
  assert found.precisions[0].control_correct == found.control_correct == 4
  assert found.control_of == 6
  assert found.precisions[2].control_correct >= 4


def _batches(truths, attacks):
  """Clients of several images each, [N, B, H, W, C]; a list of both where they differ in number."""
  targets = []
  for index, (truth, attacked) in enumerate(zip(truths, attacks, strict=True)):
    record = {'status': 'ok', 'labels': [], 'labels_source': 'known'}
    labels, region = np.zeros(len(truth), np.int32), np.ones((*truth.shape[:3], 1))
    targets.append(
      results.Target(f'client_{index:02d}', record, {'attack': attacked}, truth, labels, region)
    )
  return results.AttackResult(None, 'a', {}, tuple(targets))


def _identify_batches(truths, attacks):
  result = _batches(truths, attacks)
  return identify(result, scores.score(result))


def test_an_assignment_by_the_originals_is_no_identification():
  generator = np.random.default_rng(0)
  found = []
  for _ in range(20):
    truths, attacked = generator.random((2, 8, 4, 8, 8, 1))
    found.append(_identify_batches(truths, attacked))
  assert sum(own.chance_p_value < 0.05 for own in found) > 10
  assert sum(own.p_value < 0.05 for own in found) <= 2
  assert {own.least_p_value for own in found} == {1 / 2000}


def test_batches_are_identified_whatever_their_order():
  truths = synthetic_run.photographs(32, 8, 1)
  attacked = synthetic_run.noisy(truths, np.full(32, 0.2), seed=0)
  batches = truths.reshape(8, 4, 8, 8, 1)
  found = _identify_batches(batches, attacked.reshape(8, 4, 8, 8, 1)[:, ::-1])
  assert found.correct > 16
  assert found.p_value == pytest.approx(1 / 2000)


def test_clients_without_others_of_their_size_cannot_be_tested():
  truths = synthetic_run.photographs(9, 8, 1)
  sizes = [truths[:2], truths[2:5], truths[5:]]
  found = _identify_batches(sizes, sizes)
  assert (found.correct, found.p_value, found.least_p_value) == (9, 1.0, 1.0)
  assert found.chance_p_value < 1e-6


def test_images_to_pick_from_are_there_once():
  images = np.random.default_rng(0).random((4, 3, 3, 1)).astype(np.float32)
  # An original that is public, and two clients with the same image.
  kept, own = original_places([images[0], images[1], images[0]], [images[2], images[1], images[3]])
  assert kept == [0, 1, 3, 5]
  assert own == [0, 1, 0]


def test_ties_and_nothing_go_before_an_original():
  likelihoods = np.array([[3.0, 1.0, 2.0, 3.0], [0.0, 5.0, 4.0, 1.0], [np.nan] * 4])
  ranks = likelihood_ranks(likelihoods, [0, 1, 2], [0, 1, 2])
  np.testing.assert_array_equal(ranks, [[2, 4, 3], [4, 1, 2], [6, 6, 6]])


def test_updates_that_pick_their_image_are_no_chance():
  rng = np.random.default_rng(0)
  clients, choices = 16, 200
  ranks = rng.integers(2, choices, (clients, clients))
  np.fill_diagonal(ranks, np.where(np.arange(clients) < 10, 1, 4))
  found = identify_by_likelihood(ranks, range(clients), choices)
  assert (found.correct, found.of, found.choices, found.control_correct) == (10, 16, 200, 0)
  assert [precision.correct for precision in found.precisions] == [10, 10, 16]
  assert found.p_value == pytest.approx(1 / 2000)
  # Images that every update takes for the likeliest say nothing of who has them.
  ranks[:, :10] = 1
  found = identify_by_likelihood(ranks, range(clients), choices)
  assert (found.correct, found.control_correct) == (10, 10)
  assert found.p_value == 1.0
  assert found.chance_p_value < 1e-9


def test_updates_of_one_client_cannot_be_told_from_others():
  found = identify_by_likelihood(np.array([[1]]), [0], 200)
  assert (found.correct, found.control_of) == (1, 0)
  assert found.p_value == found.least_p_value == 1.0


def test_a_client_of_several_images_like_no_other_cannot_be_tested():
  # Six clients of one image, of which nothing is told, and three whose images are all picked out.
  sizes = [1] * 6 + [8, 16, 32]
  owners = np.repeat(np.arange(9), sizes)
  ranks = np.full((9, len(owners)), 2)
  ranks[owners, np.arange(len(owners))] = np.where(owners < 6, 2, 1)
  found = identify_by_likelihood(ranks, owners, 200)
  assert (found.correct, found.of) == (56, 62)
  assert found.chance_p_value < 1e-9
  assert found.p_value == found.least_p_value == 1.0


def test_other_images_of_a_client_are_no_mistakes():
  likelihoods = np.array([[3.0, 4.0, 2.0, 1.0], [9.0, 8.0, 1.0, 7.0]])
  # The first client has the first two images, the second the third.
  ranks = likelihood_ranks(likelihoods, [0, 1, 2], [0, 0, 1])
  np.testing.assert_array_equal(ranks, [[1, 1, 3], [1, 1, 4]])
  found = identify_by_likelihood(ranks, [0, 0, 1], 4)
  assert (found.correct, found.of, found.control_correct) == (2, 3, 2)
  # No other client has as many images.
  assert found.p_value == found.least_p_value == 1.0
