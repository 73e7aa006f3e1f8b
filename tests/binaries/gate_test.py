import re

import pytest

from tests.attacks.synthetic_run import write_run
from tests.binaries.programs import run_all

_FAILING = {'blind': {'blind': True}, 'few': {'targets': 15}, 'spread': {'deviations': (0.4, 0.5)}}


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
  """How the gate ended, by what it was given."""
  root = tmp_path_factory.mktemp('gate')
  good = write_run(root / 'good', dataset='retina/32px')
  given = {'good': [good], 'nothing': [root]}
  for name, changes in _FAILING.items():
    given[name] = [write_run(root / name, **changes), good]
  runs = [[f'--run_dir={path}' for path in paths] for paths in given.values()]
  return dict(zip(given, run_all('gate', runs), strict=True)) | {'root': root}


def test_line_of_an_attack_that_works(ended):
  done = ended['good']
  assert done.returncode == 0
  (line,) = done.stdout.splitlines()
  number = r'-?\d+\.\d\d'
  assert re.fullmatch(
    rf'GATE retina attack={number} control={number} margin={number} ci95={number},{number} n=16',
    line,
  )


@pytest.mark.parametrize('name', _FAILING)
def test_attack_that_sees_nothing_or_too_few_images_fails(ended, name):
  done = ended[name]
  assert done.returncode == 1
  assert len(done.stdout.splitlines()) == 2


def test_run_without_an_attack(ended):
  done, root = ended['nothing'], ended['root']
  assert done.returncode == 1
  assert done.stderr == f'error: --attack: {root} has these attacks: none; name one\n'
