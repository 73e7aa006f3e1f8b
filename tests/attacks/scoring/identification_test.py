import numpy as np
import pytest
from scipy import stats

from attacks.scoring import results, scores
from attacks.scoring.identification import identify
from tests.attacks import synthetic_run


def _result(truths, attacks, controls=None):
  targets = []
  for index, truth in enumerate(truths):
    one = slice(index, index + 1)
    sets = {'attack': attacks[one]}
    if controls is not None:
      sets['prior_only'] = controls[one]
    record = {'status': 'ok', 'labels': [], 'labels_source': 'known'}
    labels, region = np.zeros(1, np.int32), np.ones((1, *truth.shape[:2], 1))
    targets.append(results.Target(f'client_{index:02d}', record, sets, truth[None], labels, region))
  return results.AttackResult(None, 'a', {}, tuple(targets))


def _identify(*args):
  result = _result(*args)
  return identify(result, scores.score(result))


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


def test_flat_reconstructions_identify_nothing():
  truths = synthetic_run.photographs(3, 16, 1)
  found = _identify(truths, np.full_like(truths, 0.3))
  assert (found.correct, found.of, found.p_value) == (0, 3, 1.0)


def test_a_duplicated_original_counts_whichever_copy_is_picked():
  truths = synthetic_run.photographs(3, 16, 1)[[0, 1, 1]]
  assert _identify(truths, truths).correct == 3
