"""The program: what it writes, and its error lines."""

import csv
import json
import shutil

import pytest

from tests.attacks.audit.made_up import attack_with, audited, close
from tests.binaries.programs import assert_one_error_line, run_all


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run')
  _, summary = audited(
    [attack_with(close())],
    dataset='discs/32px/1.0.0',
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
  kept = tmp_path / 'kept.json'
  shutil.copy(run_dir / 'audits' / 'audit' / 'summary.json', kept)
  table = tmp_path / 'table.csv'
  table.write_text(
    '# command: frontier\ndataset,shape,freshness,strength,norm,learning_rate,f1,f1_undefended\n'
    'discs,none,frozen,0,batch,0.1,0.7,0.7\ndiscs,none,frozen,0,batch,0.1,0.9,0.9\n'
    'discs,none,frozen,0,group,0.1,0.1,0.1\ndiscs,none,frozen,0,batch,0.02,0.2,0.2\n'
    'discs,correlated,fresh,images:0.1,batch,0.1,0.6,0.7\n'
    'discs,top_k,fresh,fraction:0.1,group,0.1,0.5,0.7\n'
  )
  elsewhere = tmp_path / 'elsewhere.csv'
  elsewhere.write_text(table.read_text().replace('discs', 'rings'))
  wrong = tmp_path / 'wrong.csv'
  wrong.write_text(table.read_text().replace('0.5', 'half'))
  written, with_utility, without_utility, *mistakes = run_all(
    'compare',
    [
      [at, to],
      [f'--summary={kept}', f'--output_dir={tmp_path / "utility"}', f'--utility_table={table}'],
      [at, f'--output_dir={tmp_path / "rings"}', f'--utility_table={elsewhere}'],
      [at, f'--output_dir={tmp_path / "none"}', f'--utility_table={tmp_path / "none.csv"}'],
      [at, f'--output_dir={tmp_path / "none"}', f'--utility_table={wrong}'],
      [at, to],
      [to],
      [at],
      [at, f'--summary={kept}', f'--output_dir={tmp_path / "twice"}'],
      [f'--run_dir={tmp_path}', f'--output_dir={tmp_path / "other"}'],
      [at, f'--output_dir={tmp_path / "other"}', '--reference=x'],
      [at, f'--output_dir={run_dir / "audits" / "audit" / "summary.json"}'],
    ],
  )
  assert written.returncode == 0, written.stderr
  names = {'comparison.csv', 'comparison.tex', 'comparison.md', 'comparison.html'}
  assert {path.name for path in output.iterdir()} == names
  assert with_utility.returncode == 0, with_utility.stderr
  with (tmp_path / 'utility' / 'comparison.csv').open() as file:
    rows = list(csv.DictReader(line for line in file if not line.startswith('#')))
  assert [(row['f1'], row['f1_undefended']) for row in rows] == [('0.8000', '0.8000')] * len(rows)
  assert 'no F1' not in with_utility.stderr
  assert without_utility.returncode == 0, without_utility.stderr
  assert f'no F1 in {elsewhere} of none on discs/32px/1.0.0' in without_utility.stderr
  assert not (tmp_path / 'none').exists()
  parts = (
    '--utility_table',
    '--utility_table',
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
