"""The program: what it writes, and its error lines."""

import json

import pytest

from tests.attacks.audit.made_up import attack_with, audited, close
from tests.binaries.programs import assert_one_error_line, run_all


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run')
  _, summary = audited(
    [attack_with(close())],
    dataset='discs',
    defense={'name': 'none'},
    digests={'data_sha256': 'd', 'model_sha256': 'm'},
    training={'seed': 0},
    epsilon=None,
  )
  (directory / 'audits' / 'audit').mkdir(parents=True)
  (directory / 'audits' / 'audit' / 'summary.json').write_text(json.dumps(summary))
  return directory


def test_a_comparison_is_written_once_and_mistakes_get_one_line(run_dir, tmp_path):
  output = tmp_path / 'compared'
  at, to = f'--run_dir={run_dir}', f'--output_dir={output}'
  written, *mistakes = run_all(
    'compare',
    [
      [at, to],
      [at, to],
      [to],
      [at],
      [at, at, f'--output_dir={tmp_path / "twice"}'],
      [f'--run_dir={tmp_path}', f'--output_dir={tmp_path / "other"}'],
      [at, f'--output_dir={tmp_path / "other"}', '--reference=x'],
      [at, f'--output_dir={run_dir / "audits" / "audit" / "summary.json"}'],
    ],
  )
  assert written.returncode == 0, written.stderr
  names = {'comparison.csv', 'comparison.tex', 'comparison.html'}
  assert {path.name for path in output.iterdir()} == names
  parts = (
    '--overwrite',
    '--run_dir',
    '--output_dir',
    'same',
    'summary.json',
    '--reference',
    'file',
  )
  for ended, part in zip(mistakes, parts, strict=True):
    assert_one_error_line(ended, part)
