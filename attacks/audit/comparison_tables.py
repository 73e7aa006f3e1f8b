"""The rows of a comparison as tables for papers and pages."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attacks.audit.comparison import label_of
from attacks.audit.summary import STRONGEST
from attacks.report.findings import VERDICT_WORDS

_HEADS = (
  'Data set',
  'Defence',
  'Unaware attack',
  'Strongest',
  'Beyond a guess',
  'Beyond its class',
  'Change',
  'Whole image',
  'Known images',
  'Bound',
  'F1',
  'Images',
  'Verdict',
)
_AFTER_CHANGE = _HEADS.index('Change') + 1


def as_markdown(rows: Sequence[Mapping[str, Any]], reference: str | None = None) -> str:
  """A table in Markdown of the strongest attacks, who gives away least first.

  Region PSNR in dB: of the best attack that does not know the defence, of the strongest, of this
  minus a guess and minus the mean public image of each image's class, which tells no more of an
  update than the label, and its change against the same round without the defence, with 95 %
  intervals;
  PSNR and SSIM of the whole image; share of images that are picked out of known ones; bound; change
  of F1; images.

  Args:
    rows: Of `compare`, or of the CSV file that was written of them.
    reference: The defence that all were compared with, for a column of how much more they give
      away; none without it.
  """
  rows = [{name: _value(value) for name, value in row.items()} for row in rows]
  heads = list(_HEADS)
  if reference is not None:
    heads.insert(_AFTER_CHANGE, f'More than {reference}')
  lines = [heads, ['---'] * len(heads)]
  by_set = itertools.groupby(sorted(rows, key=_place), key=_place)
  for _, group in by_set:
    own = list(group)
    strongest = [
      row
      | {
        'beyond': _minus(row, 'control_region_psnr'),
        'over_class': _minus(row, 'class_region_psnr'),
      }
      for row in own
      if row['attack'] == STRONGEST
    ]
    # What no attack could be made on gives nothing to rank it by.
    for row in sorted(strongest, key=lambda row: (row['beyond'] == '', row['beyond'])):
      cells = list(_cells(row, own))
      if reference is not None:
        cells.insert(_AFTER_CHANGE, _spread(row, 'over_reference', 'reference_ci95'))
      lines.append(cells)
  return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  unaware = [
    own['region_psnr']
    for own in rows
    if own['knows_noise'] == 'no'
    and own['region_psnr'] != ''
    and all(own[name] == row[name] for name in ('defense', 'strength'))
  ]
  yield row['dataset']
  yield label_of(row['defense'], row['strength'])
  yield _number(max(unaware, default=''), 1)
  yield _number(row['region_psnr'], 1)
  yield _spread(row, 'beyond', 'ci95')
  yield _spread(row, 'over_class', 'class_ci95')
  yield _spread(row, 'region_psnr_change', 'change_ci95')
  yield f'{_number(row["psnr"], 1)}, {_number(row["ssim"], 2)}'
  yield '--' if row['recognized'] == '' else f'{row["recognized"]:.0%}'
  yield _number(row['bound_region_psnr'], 1)
  measured = '' not in (row['f1'], row['f1_undefended'])
  yield f'{_rounded(row["f1"] - row["f1_undefended"], 3):+.3f}' if measured else '--'
  yield f'{row["images"]:.0f}'
  yield VERDICT_WORDS[row['verdict']].lower()


def _minus(row: Mapping[str, Any], guess: str) -> float | str:
  return '' if '' in (row['region_psnr'], row[guess]) else row['region_psnr'] - row[guess]


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
  return row['dataset'], str(row['rounds'])


def _value(text: Any) -> Any:
  """A cell of a CSV file as `compare` gave it."""
  try:
    return float(text)
  except ValueError:
    return text


def _spread(row: Mapping[str, Any], mean: str, interval: str) -> str:
  """A mean with its interval."""
  if row[mean] == '' or row[f'{interval}_low'] == '':
    return _number(row[mean], 1)
  low, high = (_number(row[f'{interval}_{end}'], 1) for end in ('low', 'high'))
  return f'{_number(row[mean], 1)} ({low} to {high})'


def as_latex(rows: Sequence[Mapping[str, Any]]) -> str:
  """A booktabs table of the strongest attacks."""
  head = (
    'Data set & Defence & Region PSNR & Guess & Class & Change & F1 & F1 undefended & Bound'
    ' \\\\ \\midrule'
  )
  lines = ['\\begin{tabular}{llrrrrrrr}', '\\toprule', head]
  for row in rows:
    if row['attack'] == STRONGEST:
      cells = [
        _escaped(row['dataset']),
        _escaped(label_of(row['defense'], row['strength'])),
        _number(row['region_psnr'], 1),
        _number(row['control_region_psnr'], 1),
        _number(row['class_region_psnr'], 1),
        _spread(row, 'region_psnr_change', 'change_ci95'),
        _number(row['f1'], 3),
        _number(row['f1_undefended'], 3),
        _number(row['bound_region_psnr'], 1),
      ]
      lines.append(' & '.join(cells) + ' \\\\')
  return '\n'.join([*lines, '\\bottomrule', '\\end{tabular}']) + '\n'


def _number(value: float | str, digits: int) -> str:
  return '--' if value == '' else f'{_rounded(value, digits):.{digits}f}'


def _rounded(value: float, digits: int) -> float:
  """Not -0.0."""
  return round(value, digits) + 0.0


def _escaped(text: str) -> str:
  for character in '&%$#_{}':
    text = text.replace(character, f'\\{character}')
  return text
