import pytest

from binaries import recognition_table


def test_seeds_are_added_up():
  counts = {'sought': '16', 'choices': '216', 'among_5': '12', 'by_another': '0'}
  row = {'dataset': 'discs', 'images': '1', 'shape': 'decoy', 'strength': 'scale:3.0', **counts}
  rows = [
    {**row, 'seed': '0', 'correct': '8'},
    {**row, 'seed': '1', 'correct': '4', 'by_another': '1'},
    {**row, 'seed': '0', 'shape': 'none', 'strength': '0', 'correct': '16'},
  ]
  decoy, none = recognition_table._join(rows)
  assert (decoy['sought'], decoy['choices'], decoy['correct']) == (32, 216, 12)
  assert (decoy['by_another'], decoy['seeds']) == (1, 2)
  assert decoy['share'] == '0.375'
  # Wilson, as in any textbook.
  assert float(decoy['ci95_low']) == pytest.approx(0.2291, abs=1e-3)
  assert float(decoy['ci95_high']) == pytest.approx(0.5475, abs=1e-3)
  assert (none['share'], none['ci95_high']) == ('1.000', '1.000')
