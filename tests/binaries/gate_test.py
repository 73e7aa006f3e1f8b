import pathlib
import re
import subprocess
import sys

import pytest

from tests.attacks.synthetic_run import write_run


def _gate(*run_dirs):
  # In a process of its own: the programs define flags of the same names.
  return subprocess.run(
    [sys.executable, '-m', 'binaries.gate', *(f'--run_dir={path}' for path in run_dirs)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )


def test_line_of_an_attack_that_works(tmp_path):
  done = _gate(write_run(tmp_path / 'run', dataset='retina/32px'))
  assert done.returncode == 0
  (line,) = done.stdout.splitlines()
  number = r'-?\d+\.\d\d'
  assert re.fullmatch(
    rf'GATE retina attack={number} control={number} margin={number} ci95={number},{number} n=16',
    line,
  )


@pytest.mark.parametrize('changes', [{'blind': True}, {'targets': 15}, {'deviations': (0.4, 0.5)}])
def test_attack_that_sees_nothing_or_too_few_images_fails(tmp_path, changes):
  good = write_run(tmp_path / 'good')
  bad = write_run(tmp_path / 'bad', **changes)
  done = _gate(bad, good)
  assert done.returncode == 1
  assert len(done.stdout.splitlines()) == 2


def test_run_without_an_attack(tmp_path):
  done = _gate(tmp_path)
  assert done.returncode == 1
  assert done.stderr == f'error: --attack: {tmp_path} has these attacks: none; name one\n'
