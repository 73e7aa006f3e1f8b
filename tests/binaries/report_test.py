import csv
import json
import subprocess
import sys

import pytest
from safetensors import numpy as safetensors_numpy

from tests.attacks import synthetic_run
from tests.attacks.scoring.lpips_reference import seeded_weights
from tests.binaries.programs import ROOT, assert_one_error_line, run_all


@pytest.fixture
def run_dir(tmp_path):
  return synthetic_run.write_run(tmp_path / 'run', targets=3, size=8)


def test_writes_report_and_scores_and_keeps_them(run_dir):
  own = f'--run_dir={run_dir}'
  kept = run_dir / 'report.html'
  done, refused = run_all('report', [[own, '--max_images=2', '--title=My title'], [own]])
  assert done.returncode == 0, done.stderr
  summary = json.loads((run_dir / 'summary.json').read_text())
  assert summary['headline'] in done.stdout
  assert summary['title'] == 'My title'
  assert 'My title' in kept.read_text()
  with (run_dir / 'attacks/pixels/scores.csv').open(newline='') as file:
    assert [row['target'] for row in csv.DictReader(file)] == [f'client_0{i}' for i in range(3)]
  # Of the first run still, and not of the one that was refused.
  assert_one_error_line(refused, 'report.html', '--overwrite')
  before = kept.read_bytes()
  (done,) = run_all('report', [[own, '--overwrite']])
  assert done.returncode == 0, done.stderr
  assert kept.read_bytes() != before


def test_several_runs_on_one_page(run_dir, tmp_path):
  other = synthetic_run.write_run(tmp_path / 'other', dataset='chest', targets=2, size=8)
  flags = [f'--run_dir={run_dir}', f'--run_dir={other}']
  lacking, done = run_all('report', [flags, [*flags, f'--output_dir={tmp_path / "report"}']])
  assert_one_error_line(lacking, '--output_dir is missing')
  assert done.returncode == 0, done.stderr
  summary = json.loads((tmp_path / 'report/summary.json').read_text())
  assert [entry['dataset'] for entry in summary['attacks']] == ['retina', 'chest']
  assert not (run_dir / 'report.html').exists()


def test_lpips_and_gallery(tmp_path):
  run_dir = synthetic_run.write_run(tmp_path / 'run', targets=2, size=16)
  weights = tmp_path / 'vgg.safetensors'
  safetensors_numpy.save_file(seeded_weights('vgg'), weights)
  flags = [f'--run_dir={run_dir}', f'--lpips_weights={weights}']
  wrong, done = run_all('report', [flags, [*flags, '--lpips_net=vgg', '--gallery=run']])
  assert_one_error_line(wrong, 'vgg.safetensors: tensor features.0.weight', '--lpips_net=alex')
  assert done.returncode == 0, done.stderr
  (entry,) = json.loads((run_dir / 'summary.json').read_text())['attacks']
  assert entry['metrics']['attack']['lpips']['n'] == 2
  assert (entry['lpips']['net'], entry['gallery']) == ('vgg', 'run')
  with (run_dir / 'attacks/pixels/scores.csv').open(newline='') as file:
    assert all(float(row['attack_lpips']) > 0 for row in csv.DictReader(file))


def test_mistakes_take_one_line(run_dir, tmp_path):
  own = f'--run_dir={run_dir}'
  torn = synthetic_run.write_run(tmp_path / 'torn', targets=2, size=8)
  (torn / 'truth/round_00001.safetensors').unlink()
  wrong = [
    ((f'--run_dir={torn}',), 'round_00001.safetensors: file not found'),
    ((), '--run_dir is missing'),
    ((f'--run_dir={tmp_path / "absent"}',), 'directory not found'),
    ((own, f'{own}/'), 'twice'),
    ((own, '--max_images=0'), 'max_images'),
    ((own, 'extra'), "'extra'"),
    ((own, '--lpips_net=alex'), '--lpips_weights'),
  ]
  for ended, (_, message) in zip(run_all('report', [f for f, _ in wrong]), wrong, strict=True):
    assert_one_error_line(ended, message)
  assert not (torn / 'report.html').exists()
  assert not (run_dir / 'report.html').exists()


def test_help_lists_the_flags():
  done = subprocess.run(
    [sys.executable, '-c', 'from binaries import report; report.run()', '--help'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert 'Builds report.html' in done.stdout
  assert '--run_dir' in done.stdout
