"""Tables of hand-made rows, as `compare` gives them and as its CSV file holds them."""

import re

import pytest

from attacks.audit.comparison import COLUMNS
from attacks.audit.comparison_tables import as_latex, as_markdown, as_overview

_GUESS = 15.0


def _rows(dataset, defense, psnr, low, high, **changes):
  """What all defences and one that knows its own reach."""
  strongest = dict.fromkeys(COLUMNS, '') | {
    'dataset': dataset,
    'defense': defense,
    'strength': 'fraction 0.1' if defense == 'top_k' else '',
    'rounds': '1',
    'attack': 'strongest',
    'psnr': psnr + 0.5,
    'ssim': 0.456,
    'region_psnr': psnr,
    'control_region_psnr': _GUESS,
    'class_region_psnr': 15.5,
    'ci95_low': low,
    'ci95_high': high,
    'class_ci95_low': low - 0.5,
    'class_ci95_high': high - 0.5,
    'verdict': 'partly_leaked',
    'images': 18,
    **changes,
  }
  unaware = strongest | {'attack': 'best', 'knows_noise': 'no', 'region_psnr': psnr - 3}
  worse = unaware | {'attack': 'best_batch', 'region_psnr': psnr - 4}
  knowing = strongest | {'attack': 'adaptive', 'knows_noise': 'yes', 'region_psnr': psnr - 1}
  return [strongest, worse, unaware, knowing]


_ROWS = [
  *_rows('b', 'none', 30.0, 14.0, 16.0),
  *_rows(
    'b',
    'top_k',
    25.04,
    9.0,
    11.0,
    region_psnr_change=-5.0,
    change_ci95_low=-6.0,
    change_ci95_high=-4.0,
    over_reference=2.0,
    reference_ci95_low=-0.04,
    reference_ci95_high=3.0,
    bound_region_psnr=26.0,
    f1=0.8,
    f1_undefended=0.825,
    recognized=0.5,
  ),
  *_rows('a', 'none', 29.0, 13.0, 15.0),
]


@pytest.mark.parametrize('as_csv', [False, True])
def test_who_gives_away_least_comes_first(as_csv):
  rows = [{name: str(value) for name, value in row.items()} for row in _ROWS] if as_csv else _ROWS
  heads, rule, *lines = as_markdown(rows, 'decoy scale 3').splitlines()
  assert '| Change | More than decoy scale 3 |' in heads
  assert len(re.findall(r'\|', rule)) == len(re.findall(r'\|', heads)) == 15
  assert lines[0].startswith(
    '| a | none | 26.0 | 29.0 | 14.0 (13.0 to 15.0) | 13.5 (12.5 to 14.5) | -- | -- | 29.5, 0.46 |'
  )
  assert lines[1] == (
    '| b | top_k fraction 0.1 | 22.0 | 25.0 | 10.0 (9.0 to 11.0) | 9.5 (8.5 to 10.5)'
    ' | -5.0 (-6.0 to -4.0) | 2.0 (0.0 to 3.0) | 25.5, 0.46 | 50% | 26.0 | -0.025 | 18 |'
    ' partly leaked |'
  )
  assert lines[2].startswith('| b | none | 27.0 | 30.0 |')


def test_a_defence_without_results_comes_last_and_is_there():
  failed = dict.fromkeys(_ROWS[0], '') | {
    name: _ROWS[0][name] for name in ('dataset', 'rounds', 'attack', 'verdict', 'images')
  }
  *_, first, last = as_markdown(
    [{**failed, 'defense': 'failed'}, *_rows('b', 'none', 30.0, 14.0, 16.0)]
  ).splitlines()
  assert first.startswith('| b | none |')
  assert last.startswith('| b | failed | -- | -- | -- |')


def test_without_a_reference_there_is_no_column_for_it():
  heads, rule, *lines = as_markdown(_ROWS).splitlines()
  assert 'More than' not in heads
  assert {line.count('|') for line in (heads, rule, *lines)} == {14}


@pytest.mark.parametrize('as_csv', [False, True])
def test_an_overview_has_a_line_for_each_defence(as_csv):
  rows = [{name: str(value) for name, value in row.items()} for row in _ROWS] if as_csv else _ROWS
  assert as_overview(rows).splitlines() == [
    '| Defence | a | b | Known images | F1 | Images |',
    '| --- | --- | --- | --- | --- | --- |',
    '| top_k fraction 0.1 | -- | 10.0 (9.0 to 11.0) | --, 50% | --, -0.025 | --, 18 |',
    '| none | 14.0 (13.0 to 15.0) | 15.0 (14.0 to 16.0) | -- | -- | 18 |',
  ]


def test_an_overview_tells_apart_what_has_one_name():
  later = [row | {'rounds': '1-4'} for row in _rows('a/64px', 'none', 29.0, 13.0, 15.0)]
  lines = as_overview([*_rows('a/32px', 'none', 28.0, 12.0, 14.0), *later]).splitlines()
  assert lines[0].startswith('| Defence | a/32px | a/64px |')
  assert lines[2].startswith('| none, rounds 1 | 13.0 (12.0 to 14.0) | -- |')
  assert lines[3].startswith('| none, rounds 1-4 | -- | 14.0 (13.0 to 15.0) |')


def test_latex_has_a_line_for_each_defence():
  latex = as_latex(_ROWS)
  assert latex.count('\\\\') == 1 + 3
  assert 'top\\_k' in latex
  columns = len(latex.splitlines()[0].partition('{tabular}{')[2].rstrip('}'))
  assert {line.count(' & ') for line in latex.splitlines() if '&' in line} == {columns - 1}
