import dataclasses

import numpy as np
import pytest

from attacks.scoring import lenient
from attacks.scoring.metrics import METRIC_NAMES, measure
from attacks.scoring.results import AttackResult, Target, load_attack
from attacks.scoring.scores import score
from tests.attacks import synthetic_run


def _attack(reconstructions, images, *others, regions=None):
  regions = np.ones_like(images[..., :1]) if regions is None else regions
  record = {'target': 'a', 'images': len(images), 'labels': [], 'status': 'ok'}
  targets = [
    Target('a', record, reconstructions, images, np.zeros(len(images), int), regions),
    *(
      Target(f'b{k}', record, {}, other, np.zeros(len(other), int), np.ones_like(other[..., :1]))
      for k, other in enumerate(others)
    ),
  ]
  return AttackResult(None, 'hand-made', {}, tuple(targets))


def _full_range(images):
  return np.stack([lenient.stretch(image) for image in images])


def test_stretching_undoes_contrast_and_brightness():
  image = _full_range(synthetic_run.photographs(1, 16, 3))[0]
  faded = 0.3 + 0.2 * image
  np.testing.assert_allclose(lenient.stretch(faded), image, atol=1e-12)
  flat = np.full((8, 8, 1), 0.4)
  np.testing.assert_array_equal(lenient.stretch(flat), flat)
  row = lenient.score_leniently(_attack({'attack': faded[None]}, image[None]))[0]
  assert row.quality.psnr > 99
  assert measure(faded, image, np.ones((16, 16, 1))).psnr < 15


def test_every_metric_picks_a_match_of_its_own():
  rng = np.random.default_rng(0)
  pattern = rng.random((16, 16, 1))
  image = np.clip(pattern, 0, 1)
  # The first truth is nearest by squared error, the second by structure, the third on the region.
  near = np.clip(image + rng.normal(0, 0.1, image.shape), 0, 1)
  alike = np.clip(0.45 * image, 0, 1)
  same_on_top = np.where(np.arange(16)[:, None, None] < 4, image, 1 - image)
  truths = np.stack([near, alike, same_on_top])
  regions = np.zeros((3, 16, 16, 1))
  regions[:, :4] = 1
  single = [measure(image, t, r) for t, r in zip(truths, regions, strict=True)]
  by = {name: [getattr(quality, name) for quality in single] for name in METRIC_NAMES[:6]}
  assert int(np.argmax(by['psnr'])) != int(np.argmax(by['region_psnr']))
  best = lenient.best_quality(image, truths, regions)
  for name, values in by.items():
    chosen = min(values) if name.endswith('mse') else max(values)
    assert getattr(best, name) == pytest.approx(chosen)
  assert best.region_psnr == pytest.approx(100)
  assert best.lpips is None


def test_images_without_a_region_are_left_out_of_its_metrics():
  truths = synthetic_run.photographs(2, 16, 1)
  regions = np.zeros((2, 16, 16, 1))
  assert lenient.best_quality(truths[0], truths, regions).region_psnr is None
  regions[1] = 1
  expected = measure(truths[0], truths[1], regions[1])
  assert lenient.best_quality(truths[0], truths, regions).region_psnr == expected.region_psnr
  with pytest.raises(ValueError, match='at least one'):
    lenient.best_quality(truths[0], truths[:0], regions[:0])


@pytest.mark.parametrize('deviation', [0.02, 0.3])
def test_never_below_the_strict_score_where_stretching_changes_nothing(deviation):
  truths = _full_range(synthetic_run.photographs(6, 16, 1))
  found = _full_range(synthetic_run.noisy(truths, np.full(6, deviation), seed=1))
  attack = _attack({'attack': found, 'mean_image': np.repeat(truths[:1], 6, 0)}, truths)
  strict = {row.matches['attack']: row for row in score(attack)}
  rows = [row for row in lenient.score_leniently(attack) if row.set_name == 'attack']
  assert len(rows) == len(strict) == 6
  for row in rows:
    own = strict[row.reconstruction]
    for name in ('psnr', 'ssim', 'region_psnr', 'region_ssim'):
      assert getattr(row.quality, name) >= getattr(own.quality['attack'], name)
    assert row.quality.mse <= own.quality['attack'].mse
    assert row.rdlv is None or own.rdlv is None or row.rdlv >= own.rdlv


def test_one_image_may_be_claimed_by_all():
  truths = _full_range(synthetic_run.photographs(3, 16, 1))
  attack = _attack({'attack': np.repeat(truths[:1], 3, 0)}, truths)
  assert [row.quality.psnr for row in lenient.score_leniently(attack)] == [100.0] * 3
  assert sum(row.quality['attack'].psnr == 100.0 for row in score(attack)) == 1


def test_order_of_images_and_reconstructions_does_not_matter():
  truths = synthetic_run.photographs(5, 16, 3)
  found = synthetic_run.noisy(truths, np.linspace(0.05, 0.3, 5), seed=2)
  regions = synthetic_run.ellipse_regions(5, 16)
  others = synthetic_run.photographs(4, 16, 3, seed=7)
  plain = lenient.score_leniently(_attack({'attack': found}, truths, others, regions=regions))
  order = np.array([3, 0, 4, 1, 2])
  shuffled = lenient.score_leniently(
    _attack({'attack': found[order]}, truths[::-1], others[::-1], regions=regions)
  )
  for place, row in enumerate(shuffled):
    assert dataclasses.replace(row, reconstruction=int(order[place])) == plain[order[place]]


def test_any_image_of_the_client_identifies_it():
  truths = synthetic_run.photographs(2, 16, 1)
  others = synthetic_run.photographs(6, 16, 1, seed=5)
  attack = _attack({'attack': truths[::-1], 'prior_only': others[:2]}, truths, others)
  rows = lenient.score_leniently(attack)
  assert [row.rank for row in rows if row.set_name == 'attack'] == [1, 1]
  assert all(row.rank > 1 for row in rows if row.set_name == 'prior_only')
  assert lenient.lenient_precision(rows, 'attack', 1) == 1.0
  assert lenient.lenient_precision(rows, 'prior_only', 1) == 0.0
  assert lenient.lenient_precision(rows, 'mean_image', 1) is None
  flat = _attack({'attack': np.full((1, 16, 16, 1), 0.5)}, truths, others)
  assert lenient.score_leniently(flat)[0].rank is None


def test_reads_a_run_and_skips_what_is_not_finite(tmp_path):
  attack = load_attack(
    synthetic_run.write_run(tmp_path, targets=3, failed=('client_01',)), 'pixels'
  )
  rows = lenient.score_leniently(attack, set_names=('attack',))
  assert [row.target for row in rows] == ['client_00', 'client_02']
  broken = attack.targets[0].reconstructions['attack'] * np.nan
  attack = _attack({'attack': broken}, attack.targets[0].images)
  assert lenient.score_leniently(attack) == []
