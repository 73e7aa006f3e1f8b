import csv
import json
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from safetensors import numpy as safetensors_numpy

from attacks.scoring import metrics, results, scores
from attacks.scoring.identification import original_ranks
from tests.attacks import synthetic_run
from tests.attacks.scoring.lpips_reference import seeded_lpips
from tff_shadow.errors import UserError


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  return synthetic_run.write_run(tmp_path_factory.mktemp('run') / 'run', targets=4, size=16)


@pytest.fixture
def run_dir(written, tmp_path):
  return shutil.copytree(written, tmp_path / 'run')


@pytest.fixture(scope='module')
def perceptual(tmp_path_factory):
  return seeded_lpips(tmp_path_factory.mktemp('weights'), 'vgg')


def _target(images, truths, *, status='ok', labels=None, controls=None, regions=None):
  record = {
    'target': 'client_00',
    'images': len(truths),
    'labels': labels or [],
    'labels_source': 'known' if labels is None else 'inferred',
    'status': status,
  }
  sets = dict(controls or {})
  if images is not None:
    sets['attack'] = images
  regions = np.ones((*truths.shape[:3], 1)) if regions is None else regions
  return results.Target(
    'client_00', record, sets, truths, np.arange(len(truths), dtype=np.int32), regions
  )


def _score(*targets):
  return scores.score(results.AttackResult(None, 'a', {}, targets))


def test_reads_a_run(run_dir):
  rows = scores.score_attack(run_dir, 'pixels')
  truth = safetensors_numpy.load_file(run_dir / 'truth/round_00001.safetensors')
  made = safetensors_numpy.load_file(run_dir / 'attacks/pixels/reconstructions.safetensors')
  assert [row.target for row in rows] == [f'client_{index:02d}' for index in range(4)]
  for row in rows:
    for set_name in (results.ATTACK, *results.CONTROLS):
      assert row.quality[set_name] == metrics.measure(
        made[f'{row.target}/{set_name}'][0],
        truth[f'{row.target}/images'][0],
        truth[f'{row.target}/regions'][0],
      )
  # The fixture's first client has a wrongly inferred label.
  assert [row.label_inferred_correct for row in rows] == [False, True, True, True]


def test_one_assignment_serves_all_metrics():
  truths = synthetic_run.photographs(3, 16, 1)
  images = synthetic_run.noisy(truths, np.array([0.05, 0.1, 0.2]), seed=0)[[2, 0, 1]]
  rows = _score(_target(images, truths, labels=[2, 0, 0]))
  assert [row.matches['attack'] for row in rows] == [1, 2, 0]
  assert [row.label_inferred_correct for row in rows] == [True, False, True]


@hypothesis.given(order=strategies.permutations(range(4)), seed=strategies.integers(0, 100))
@hypothesis.settings(max_examples=20, deadline=None)
def test_scores_do_not_depend_on_the_order_of_the_reconstructions(order, seed):
  generator = np.random.default_rng(seed)
  truths, images = generator.random((4, 8, 8, 1)), generator.random((4, 8, 8, 1))
  plain = _score(_target(images, truths))
  permuted = _score(_target(images[list(order)], truths))
  assert [row.quality for row in plain] == [row.quality for row in permuted]


@hypothesis.given(
  truth_order=strategies.permutations(range(3)),
  order=strategies.permutations(range(3)),
  seed=strategies.integers(0, 100),
)
@hypothesis.settings(max_examples=12, deadline=None)
def test_no_metric_depends_on_any_order(perceptual, truth_order, order, seed):
  truth_order, order = list(truth_order), list(order)
  generator = np.random.default_rng(seed)
  truths, images = generator.random((3, 16, 16, 3)), generator.random((3, 16, 16, 3))
  controls = {'prior_only': 1 - images, 'mean_image': np.repeat(truths[:1], 3, axis=0) * 0.9}
  regions, classes = generator.random((3, 16, 16, 1)), generator.integers(0, 2, 3)
  labels = generator.integers(0, 2, 3).tolist()

  def per_image(truth_order, order):
    target = results.Target(
      'client_00',
      {'status': 'ok', 'labels': [labels[i] for i in order], 'labels_source': 'inferred'},
      {
        'attack': images[order],
        'prior_only': controls['prior_only'][order],
        'mean_image': controls['mean_image'],
      },
      truths[truth_order],
      classes[truth_order],
      regions[truth_order],
    )
    attack = results.AttackResult(None, 'a', {}, (target,))
    rows = scores.score(attack, perceptual)
    by_truth = dict(zip(truth_order, rows, strict=True))
    ranks = [
      dict(zip(truth_order, original_ranks(attack, rows, (), *distance)['attack'], strict=True))
      for distance in ((), (perceptual.pairwise,))
    ]
    return [
      (row.status, row.label, row.label_inferred_correct, row.quality, row.rdlv)
      + tuple(rank[truth] for rank in ranks)
      for truth, row in sorted(by_truth.items())
    ]

  plain = per_image([0, 1, 2], [0, 1, 2])
  assert per_image(truth_order, order) == plain
  assert all(quality.lpips > 0 for row in plain for quality in row[3].values())


def test_rdlv_is_relative_to_the_mean_image():
  truths = synthetic_run.photographs(1, 16, 1)
  images = synthetic_run.noisy(truths, np.array([0.05]), seed=0)
  prior = synthetic_run.noisy(truths, np.array([0.2]), seed=1)
  (row,) = _score(_target(images, truths, controls={'mean_image': prior}))
  attack, mean = (row.quality[name].ssim for name in ('attack', 'mean_image'))
  assert row.rdlv == pytest.approx((attack - mean) / mean)
  assert row.rdlv > 0
  (row,) = _score(_target(prior, truths, controls={'mean_image': prior}))
  assert row.rdlv == 0
  (row,) = _score(_target(images, truths, controls={'prior_only': prior}))
  assert row.rdlv is None
  (row,) = _score(_target(None, truths, status='failed', controls={'mean_image': prior}))
  assert row.rdlv is None
  (row,) = _score(_target(images, truths, controls={'mean_image': 1 - truths}))
  assert row.rdlv is None


def test_lpips_is_measured_for_every_set_where_it_is_given(run_dir, perceptual):
  rows = scores.score_attack(run_dir, 'pixels', perceptual)
  truth = safetensors_numpy.load_file(run_dir / 'truth/round_00001.safetensors')
  made = safetensors_numpy.load_file(run_dir / 'attacks/pixels/reconstructions.safetensors')
  for row in rows:
    for set_name in (results.ATTACK, *results.CONTROLS):
      expected, spatial = perceptual(
        made[f'{row.target}/{set_name}'][0], truth[f'{row.target}/images'][0]
      )
      region = truth[f'{row.target}/regions'][0, :, :, 0]
      assert row.quality[set_name].lpips == expected
      assert row.quality[set_name].region_lpips == pytest.approx(
        np.average(spatial, weights=region)
      )
    assert row.quality['attack'].lpips < row.quality['mean_image'].lpips


def test_images_too_small_for_lpips(tmp_path, perceptual):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=1, size=8)
  with pytest.raises(UserError, match='at least 16x16 pixels, found 8x8'):
    scores.score_attack(directory, 'pixels', perceptual)


def test_non_finite_reconstruction_is_failed_not_scored():
  truths = synthetic_run.photographs(2, 16, 1)
  images = truths.copy()
  images[0, 3, 3] = np.nan
  rows = _score(_target(images, truths, controls={'mean_image': np.full_like(truths, 0.5)}))
  assert [row.status for row in rows] == ['failed', 'ok']
  assert 'not finite' in rows[0].reason
  assert 'attack' not in rows[0].quality
  assert 'mean_image' in rows[0].quality
  assert rows[1].quality['attack'].psnr == 100.0


def test_failed_target_keeps_its_rows():
  truths = synthetic_run.photographs(2, 16, 1)
  rows = _score(_target(None, truths, status='failed'))
  assert [(row.status, row.quality) for row in rows] == [('failed', {})] * 2


def test_fewer_reconstructions_than_images():
  truths = synthetic_run.photographs(3, 16, 1)
  controls = {'prior_only': np.full((1, 16, 16, 1), 0.5)}
  rows = _score(_target(truths[1:2], truths, controls=controls))
  assert [row.status for row in rows] == ['unmatched', 'ok', 'unmatched']
  # A guess may be made for any image, so the control is scored on all.
  assert all('prior_only' in row.quality for row in rows)


def test_more_reconstructions_than_images():
  truths = synthetic_run.photographs(2, 16, 1)
  rows = _score(_target(np.concatenate([1 - truths, truths]), truths))
  assert [row.matches['attack'] for row in rows] == [2, 3]


def test_empty_region_is_reported():
  truths = synthetic_run.photographs(1, 16, 1)
  (row,) = _score(_target(truths, truths, regions=np.zeros((1, 16, 16, 1))))
  assert row.region_is_empty
  assert row.quality['attack'].region_ssim is None


def test_writes_csv(run_dir, tmp_path):
  rows = scores.score_attack(run_dir, 'pixels')
  path = tmp_path / 'scores.csv'
  scores.write_scores(path, rows)
  with path.open(newline='') as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 4
  assert list(lines[0]) == scores.csv_columns()
  for line, row in zip(lines, rows, strict=True):
    assert line['target'] == row.target
    assert line['label_inferred_correct'] == str(row.label_inferred_correct)
    assert float(line['attack_psnr']) == pytest.approx(row.quality['attack'].psnr, rel=1e-5)
    assert float(line['mean_image_region_ssim']) == pytest.approx(
      row.quality['mean_image'].region_ssim, rel=1e-4
    )
    assert line['attack_lpips'] == line['prior_only_region_lpips'] == ''
    assert line['attack_rdlv'] == ('' if row.rdlv is None else f'{row.rdlv:.6g}')
  # The leakage of a guess is no leakage.
  assert [name for name in lines[0] if name.endswith('rdlv')] == ['attack_rdlv']
  assert list(tmp_path.glob('*.tmp')) == []


def test_writes_lpips(run_dir, tmp_path, perceptual):
  rows = scores.score_attack(run_dir, 'pixels', perceptual)
  scores.write_scores(tmp_path / 'scores.csv', rows)
  with (tmp_path / 'scores.csv').open(newline='') as file:
    lines = list(csv.DictReader(file))
  for line, row in zip(lines, rows, strict=True):
    for set_name in (results.ATTACK, *results.CONTROLS):
      for metric in ('lpips', 'region_lpips'):
        expected = getattr(row.quality[set_name], metric)
        assert float(line[f'{set_name}_{metric}']) == pytest.approx(expected, rel=1e-5)


def _edit_json(path, **changes):
  value = json.loads(path.read_text())
  value.update(changes)
  path.write_text(json.dumps(value))


def _edit_tensors(path, changes, metadata=None):
  tensors = safetensors_numpy.load_file(path)
  for key, value in changes.items():
    if value is None:
      del tensors[key]
    else:
      tensors[key] = value
  safetensors_numpy.save_file(tensors, path, metadata)


_TRUTH = 'truth/round_00001.safetensors'
_MADE = 'attacks/pixels/reconstructions.safetensors'
_RESULT = 'attacks/pixels/result.json'
_CONFIG = 'attacks/pixels/config.json'
_TRUTH_METADATA = {'format': 'tff-shadow-truth', 'version': '1', 'round': '1'}
_IMAGE = np.zeros((1, 16, 16, 3), np.float32)


@pytest.mark.parametrize(
  ('break_it', 'file', 'message'),
  [
    (lambda path: path.unlink(), _TRUTH, 'file not found'),
    (lambda path: path.unlink(), _MADE, 'file not found'),
    (lambda path: path.unlink(), _RESULT, 'file not found'),
    (lambda path: path.unlink(), _CONFIG, 'file not found'),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), _TRUTH, 'not readable as safetensors'),
    (lambda path: path.write_bytes(b''), _MADE, 'not readable as safetensors'),
    (lambda path: path.write_text('{"a":'), _RESULT, 'not readable as JSON'),
    (lambda path: path.write_bytes(b'\xff\xfe'), _CONFIG, 'not readable as JSON'),
    (lambda path: path.write_text('[]'), _CONFIG, 'must hold a JSON object'),
    (lambda path: _edit_json(path, version=2), _RESULT, 'version must be 1, found 2'),
    (lambda path: _edit_json(path, format='x'), _RESULT, 'format must be "tff-shadow-attack"'),
    (lambda path: _edit_json(path, targets=[]), _RESULT, 'at least one entry'),
    (lambda path: _edit_json(path, targets=['a']), _RESULT, 'must be an object'),
    (lambda path: _edit_json(path, targets=[{'target': 'a'}]), _RESULT, '"images" is missing'),
    (lambda path: _edit_json(path, round='one'), _CONFIG, 'must be of type int'),
    (
      lambda path: _edit_tensors(path, {}, {**_TRUTH_METADATA, 'version': '9'}),
      _TRUTH,
      "version must be 1, found '9'",
    ),
    (lambda path: _edit_tensors(path, {}, None), _TRUTH, 'format must be "tff-shadow-truth"'),
    (
      lambda path: _edit_tensors(path, {'client_01/labels': None}, _TRUTH_METADATA),
      _TRUTH,
      'client_01/labels is missing',
    ),
    (
      lambda path: _edit_tensors(path, {'client_01/regions': _IMAGE}, _TRUTH_METADATA),
      _TRUTH,
      'do not fit',
    ),
    (
      lambda path: _edit_tensors(path, {'client_01/images': _IMAGE * np.nan}, _TRUTH_METADATA),
      _TRUTH,
      'not finite',
    ),
    (lambda path: _edit_tensors(path, {'client_02/attack': None}), _MADE, 'client_02/attack'),
    (
      lambda path: _edit_tensors(path, {'client_02/attack': _IMAGE[:, :8]}),
      _MADE,
      'client_02/attack must hold floats of shape [N, 16, 16, 3]',
    ),
    (
      lambda path: _edit_tensors(path, {'client_02/prior_only': _IMAGE + 255}),
      _MADE,
      'client_02/prior_only must hold values in [0, 1]',
    ),
  ],
)
def test_one_line_names_the_file(run_dir, break_it, file, message):
  break_it(run_dir / file)
  with pytest.raises(UserError) as caught:
    scores.score_attack(run_dir, 'pixels')
  assert str(run_dir / file) in str(caught.value)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_target_listed_twice_is_an_error(run_dir):
  record = json.loads((run_dir / _RESULT).read_text())['targets'][0]
  _edit_json(run_dir / _RESULT, targets=[record, record])
  with pytest.raises(UserError, match='listed once'):
    scores.score_attack(run_dir, 'pixels')


def test_an_attack_that_failed_before_it_had_labels_is_read(run_dir):
  records = json.loads((run_dir / _RESULT).read_text())['targets']
  records[1].update(status='failed', reason='all zeros', labels=[], labels_source=None)
  _edit_json(run_dir / _RESULT, targets=records)
  rows = scores.score_attack(run_dir, 'pixels')
  assert [row.status for row in rows] == ['ok', 'failed', 'ok', 'ok']
  assert rows[1].label_inferred_correct is None
  records[1]['status'] = 'ok'
  _edit_json(run_dir / _RESULT, targets=records)
  with pytest.raises(UserError, match='"labels_source" must be of type str'):
    scores.score_attack(run_dir, 'pixels')


def test_what_a_failed_target_left_is_ignored(run_dir):
  records = json.loads((run_dir / _RESULT).read_text())['targets']
  records[1].update(status='failed', reason='ran out of time')
  _edit_json(run_dir / _RESULT, targets=records)
  rows = scores.score_attack(run_dir, 'pixels')
  assert [row.status for row in rows] == ['ok', 'failed', 'ok', 'ok']
  assert rows[1].reason == 'ran out of time'
  assert 'attack' not in rows[1].quality
