import dataclasses

import numpy as np
import pytest

from attacks.report import findings, reading
from attacks.scoring import gate
from attacks.scoring.identification import Identification
from attacks.scoring.metrics import Quality
from attacks.scoring.scores import ImageScore
from attacks.scoring.statistics import mean_interval
from tests.attacks import synthetic_run
from tests.attacks.scoring.lpips_reference import seeded_lpips

_UNIDENTIFIED = Identification(correct=1, of=16, choices=16, control_correct=1, p_value=0.64)
_IDENTIFIED = Identification(correct=9, of=16, choices=16, control_correct=1, p_value=1e-6)


def _row(psnr, region=None, ssim=0.1, status='ok', controls=('prior_only', 'mean_image')):
  def quality(psnr, region, ssim):
    return Quality(0.1, psnr, ssim, 0.1, psnr if region is None else region, ssim)

  sets = {control: quality(10.0, 10.0, 0.1) for control in controls}
  if status == 'ok':
    sets['attack'] = quality(psnr, region, ssim)
  return ImageScore('client_00', 0, status, '', 0, None, {}, sets)


def _of_clients(rows, images=1):
  """As many images each; see `ImageScore.target`."""
  return [
    dataclasses.replace(row, target=f'client_{k // images:02d}') for k, row in enumerate(rows)
  ]


def _without_region(row):
  empty = {'region_mse': None, 'region_psnr': None, 'region_ssim': None}
  quality = {name: dataclasses.replace(own, **empty) for name, own in row.quality.items()}
  return dataclasses.replace(row, quality=quality)


def _spread(mean, deviation, count=16):
  return [_row(10.0 + mean + deviation * (-1) ** index) for index in range(count)]


@pytest.mark.parametrize(
  ('rows', 'verdict', 'reason'),
  [
    ([_row(20.0)] * 16, 'leaked', ''),
    # Only the sensitive region is recovered.
    ([_row(10.0, region=20.0)] * 16, 'leaked', ''),
    ([_row(13.0)] * 16, 'partly_leaked', 'closer than a guess by PSNR, region PSNR'),
    ([_row(10.0, ssim=0.3)] * 16, 'partly_leaked', 'by SSIM, region SSIM'),
    # One patient's image among many is a leak of that patient.
    ([_row(30.0)] + [_row(10.0)] * 30, 'partly_leaked', '1 of 31 images'),
    ([_row(30.0)], 'partly_leaked', '1 of 1 images'),
    ([_row(10.0)] * 16, 'not_beyond_guess', ''),
    ([_row(5.0)] * 16, 'not_beyond_guess', ''),
    (_spread(0.5, 0.5), 'not_beyond_guess', ''),
    (_spread(0.5, 3.0), 'inconclusive', 'interval allows both'),
    ([_row(10.0)] * 15, 'inconclusive', 'too few images: 15'),
    ([_row(10.0)] * 20 + [_row(0, status='failed')], 'inconclusive', 'no usable result on 1 of 21'),
    ([_row(0, status='failed')] * 16, 'inconclusive', 'no usable result on 16 of 16'),
    ([_row(10.0, controls=('prior_only',))] * 16, 'inconclusive', 'control is missing'),
    ([_row(30.0, controls=())] * 16, 'inconclusive', 'control is missing'),
  ],
)
def test_verdicts(rows, verdict, reason):
  found, found_reason = findings.judge(_of_clients(rows), _UNIDENTIFIED)
  assert found == verdict
  assert reason in found_reason
  assert bool(reason) == bool(found_reason)


@pytest.mark.parametrize(
  ('images', 'verdict', 'reason'),
  [
    (2, 'not_beyond_guess', ''),
    (4, 'inconclusive', 'too few clients: 4, where at least 8'),
    (16, 'inconclusive', 'too few clients: 1,'),
  ],
)
def test_images_of_few_clients_clear_nothing(images, verdict, reason):
  found, found_reason = findings.judge(_of_clients([_row(10.0)] * 16, images), _UNIDENTIFIED)
  assert found == verdict
  assert reason in found_reason


def test_intervals_are_over_clients():
  # The gains of clients scatter from 0 to 1.7 dB, those of their images do not.
  gains = np.repeat(np.linspace(0, 1.7, 8), 8)
  rows = [_row(10.0 + gain) for gain in gains]
  assert findings.judge(_of_clients(rows), _UNIDENTIFIED)[0] == 'not_beyond_guess'
  found, reason = findings.judge(_of_clients(rows, images=8), _UNIDENTIFIED)
  assert found == 'inconclusive'
  assert 'interval allows both' in reason


def test_a_region_without_an_interval_is_a_doubt_and_no_region_is_none():
  rows = [_without_region(_row(10.0))] * 16
  assert findings.judge(_of_clients(rows), _UNIDENTIFIED)[0] == 'not_beyond_guess'
  found, reason = findings.judge(_of_clients([*rows, _row(14.0)]), _UNIDENTIFIED)
  assert (found, reason) == ('inconclusive', 'too few clients with a value of region PSNR: 1')


def test_recognisable_noise_is_not_called_protection():
  found, reason = findings.judge(_of_clients([_row(5.0)] * 16), _IDENTIFIED)
  assert found == 'partly_leaked'
  assert '9 of 16 reconstructions' in reason


def test_one_attack_clears_nothing():
  rows = _of_clients([_row(10.0)] * 16)
  config = {'dataset': 'made up', 'defense': 'none'}
  found = findings.find(rows, _UNIDENTIFIED, config)
  assert found.verdict == 'inconclusive'
  assert 'nothing beyond what could be guessed' in found.sentence
  assert 'tff-shadow-audit' in found.sentence
  found = findings.find(rows, _UNIDENTIFIED, config, ended_early=2)
  assert found.verdict == 'inconclusive'
  assert 'ended early on 2 of 16 clients' in found.sentence


def test_what_could_not_be_tested_is_a_doubt():
  untested = dataclasses.replace(
    _UNIDENTIFIED, correct=9, p_value=1.0, chance_p_value=1e-6, least_p_value=1.0
  )
  rows = _of_clients([_row(5.0)] * 16)
  found, reason = findings.judge(rows, untested)
  assert found == 'inconclusive'
  assert reason.startswith('9 of 16 originals are picked out, and too few clients')
  tested = dataclasses.replace(untested, least_p_value=1e-3)
  assert findings.judge(rows, tested)[0] == 'not_beyond_guess'


def test_summary_numbers(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', size=16, failed=('client_03',))
  run = reading.read_run(directory)
  summary = findings.summarise([run], 'Title')
  (entry,) = summary['attacks']
  rows = run.attacks[0].scores
  psnrs = [row.quality['attack'].psnr for row in rows if row.status == 'ok']
  expected = mean_interval(psnrs)
  assert entry['metrics']['attack']['psnr'] == {
    'mean': expected.mean,
    'ci95_low': expected.low,
    'ci95_high': expected.high,
    'n': 15,
  }
  margin = entry['margin']['psnr']
  assert margin['n'] == 16
  assert margin['mean'] == pytest.approx(np.mean(gate.margins(rows)))
  assert (entry['images'], entry['targets'], entry['failed']) == (16, 16, 1)
  assert entry['labels_inferred'] == {'correct': 14, 'of': 15}
  # The failed target's label was inferred all the same.
  assert entry['label_accuracy'] == {
    'matched': {'correct': 14, 'of': 15, 'share': 14 / 15},
    'multiset': {'correct': 15, 'of': 16, 'share': 15 / 16},
  }
  rdlv = mean_interval([row.rdlv for row in rows if row.rdlv is not None])
  assert entry['metrics']['attack']['rdlv'] == {
    'mean': rdlv.mean,
    'ci95_low': rdlv.low,
    'ci95_high': rdlv.high,
    'n': rdlv.n,
  }
  assert rdlv.n > 2
  assert 'rdlv' not in entry['metrics']['mean_image']
  assert entry['metrics']['attack']['lpips']['n'] == 0
  assert entry['lpips'] is entry['identified_by_lpips'] is entry['gallery'] is None
  assert entry['identified']['precisions'][0] == {
    'k': 1,
    'correct': entry['identified']['correct'],
    'control_correct': entry['identified']['control_correct'],
  }
  assert [p['k'] for p in entry['identified']['precisions']] == [1, 3, 5]
  assert entry['gate'] == {
    'line': gate.gate_line('retina', rows),
    'passed': gate.gate_passed(rows),
  }
  assert entry['training']['last']['validation/f1'] == {
    'round': 20,
    'value': pytest.approx(1 - 0.7 * 0.9**20, abs=1e-4),
  }
  assert entry['threat_model'] == synthetic_run.THREAT_MODEL
  assert entry['seconds'] == 16 * 12.5
  assert summary['verdict'] == 'leaked'


def test_known_labels_are_not_reported_as_inferred(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=2, size=8, labels_source='known')
  (entry,) = findings.summarise([reading.read_run(directory)], 'Title')['attacks']
  assert entry['labels_inferred'] is None
  assert entry['label_accuracy'] is None


def test_lpips_in_the_summary(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=3, size=16)
  measures = reading.Measures(seeded_lpips(tmp_path, 'vgg'), 'run')
  run = reading.read_run(directory, measures)
  (entry,) = findings.summarise([run], 'Title')['attacks']
  values = [row.quality['mean_image'].region_lpips for row in run.attacks[0].scores]
  assert entry['metrics']['mean_image']['region_lpips']['mean'] == pytest.approx(np.mean(values))
  assert entry['metrics']['attack']['lpips']['n'] == 3
  assert entry['lpips'] == {'net': 'vgg', 'weights_sha256': measures.lpips.digest}
  assert entry['identified_by_lpips']['of'] == entry['identified']['of'] == 3
  assert entry['gallery'] == 'run'


def test_headline_is_the_worst_verdict(tmp_path):
  leaking = reading.read_run(synthetic_run.write_run(tmp_path / 'a', size=16))
  blind = reading.read_run(
    synthetic_run.write_run(tmp_path / 'b', dataset='chest', size=16, channels=1, blind=True)
  )
  both = findings.summarise([blind, leaking], '')
  assert [entry['verdict'] for entry in both['attacks']] == ['inconclusive', 'leaked']
  assert both['headline'] == (
    'Training images could be rebuilt from what a client sent, in 1 of 2 attacks (retina).'
  )
  assert findings.summarise([blind], '')['headline'] == (
    'Whether training images leaked is not settled, chest.'
  )
