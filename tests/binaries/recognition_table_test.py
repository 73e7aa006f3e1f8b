import csv

import pytest

from tests.binaries.programs import assert_one_error_line, run_all

_COLUMNS = 'dataset,images,rounds,shape,strength,seed,sought,choices,correct,among_5,by_another'
# What was computed before.
_CACHE = f"""{_COLUMNS}
chest_phantom,1,1,none,0,0,16,216,16,16,0
chest_phantom,1,1,decoy,scale:3.0,0,16,216,8,12,0
chest_phantom,1,1,none,0,1,16,216,16,16,0
chest_phantom,1,1,decoy,scale:3.0,1,16,216,4,6,1
"""


def test_seeds_are_added_up(tmp_path):
  (tmp_path / 'recognition.csv').write_text(_CACHE)
  output = tmp_path / 'table.csv'
  arguments = [
    '--datasets=chest_phantom',
    '--defenses=decoy/scale:3.0',
    '--seeds=2',
    f'--cache_dir={tmp_path}',
    f'--output={output}',
  ]
  (ended,) = run_all('recognition_table', [arguments])
  assert ended.returncode == 0
  head, *lines = output.read_text().splitlines()
  assert head.startswith('# command: ')
  none, decoy = csv.DictReader(lines)
  assert (decoy['sought'], decoy['choices'], decoy['correct']) == ('32', '216', '12')
  assert (decoy['among_5'], decoy['by_another'], decoy['seeds']) == ('18', '1', '2')
  assert decoy['share'] == '0.375'
  # Wilson, as in any textbook.
  assert float(decoy['ci95_low']) == pytest.approx(0.2291, abs=1e-3)
  assert float(decoy['ci95_high']) == pytest.approx(0.5475, abs=1e-3)
  assert (none['shape'], none['share'], none['ci95_high']) == ('none', '1.000', '1.000')


def test_bad_flags():
  wrong = {
    '--datasets=mnist': '--datasets=mnist: use some of',
    '--defenses=prayer/1.0': '--defenses=prayer: use some of isotropic, diagonal, correlated',
    '--defenses=dp_sgd/limit:3': '--defenses=dp_sgd/limit:3: use dp_sgd/clip_norm',
    '--images=0': '--images=0',
    '--rounds=0': '--rounds=0',
  }
  for ended, why in zip(
    run_all('recognition_table', [[flag] for flag in wrong]), wrong.values(), strict=True
  ):
    assert_one_error_line(ended, why)
