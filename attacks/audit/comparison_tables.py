"""The rows of a comparison as tables for papers and pages."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
  rows = _values(rows)
  heads = list(_HEADS)
  if reference is not None:
    heads.insert(_AFTER_CHANGE, f'More than {reference}')
  lines = [heads, ['---'] * len(heads)]
  by_set = itertools.groupby(sorted(rows, key=_place), key=_place)
  for _, group in by_set:
    own = list(group)
    # What no attack could be made on gives nothing to rank it by.
    for row in sorted(_strongest(own), key=lambda row: (row['beyond'] == '', row['beyond'])):
      cells = list(_cells(row, own))
      if reference is not None:
        cells.insert(_AFTER_CHANGE, _spread(row, 'over_reference', 'reference_ci95'))
      lines.append(cells)
  return _markdown(lines)


def as_overview(rows: Sequence[Mapping[str, Any]]) -> str:
  """A table in Markdown with a line for each defence, who gives away least on all sets first.

  On each data set region PSNR in dB of the strongest attack minus a guess, with its 95 % interval,
  the share of images that are picked out of known ones, the change of F1, and how many images were
  attacked; one text where all sets have the same.

  Args:
    rows: See `as_markdown`; of several audited rounds each has lines of its own.
  """
  rows = list(_strongest(_values(rows)))
  datasets = sorted({row['dataset'] for row in rows})
  several = len({row['rounds'] for row in rows}) > 1
  lines: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
  for row in rows:
    key = label_of(row['defense'], row['strength']), row['rounds']
    lines.setdefault(key, {})[row['dataset']] = row
  names = [dataset.partition('/')[0] for dataset in datasets]
  heads = [
    'Defence',
    *(datasets if len(set(names)) < len(names) else names),
    'Known images',
    'F1',
    'Images',
  ]
  table = []
  for (label, rounds), found in lines.items():
    own = [found.get(dataset) for dataset in datasets]
    beyond = [row['beyond'] for row in own if row and row['beyond'] != '']
    cells = [f'{label}, rounds {rounds}' if several else label]
    cells += [_spread(row, 'beyond', 'ci95') if row else '--' for row in own]
    cells += [
      _together(f(row) if row else '--' for row in own) for f in (_known, _f1_change, _images)
    ]
    table.append((sum(beyond) / len(beyond) if beyond else float('inf'), cells))
  ordered = [cells for _, cells in sorted(table, key=lambda line: line[0])]
  return _markdown([heads, ['---'] * len(heads), *ordered])


def _together(texts: Iterable[str]) -> str:
  """What all have, or the text of each."""
  texts = list(texts)
  return texts[0] if len(set(texts)) == 1 else ', '.join(texts)


def _known(row: Mapping[str, Any]) -> str:
  return '--' if row['recognized'] == '' else f'{row["recognized"]:.0%}'


def _images(row: Mapping[str, Any]) -> str:
  return f'{row["images"]:.0f}'


def _strongest(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
  for row in rows:
    if row['attack'] == STRONGEST:
      yield row | {
        'beyond': _minus(row, 'control_region_psnr'),
        'over_class': _minus(row, 'class_region_psnr'),
      }


def _markdown(lines: Iterable[Sequence[str]]) -> str:
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
  yield _known(row)
  yield _number(row['bound_region_psnr'], 1)
  yield _f1_change(row)
  yield _images(row)
  yield VERDICT_WORDS[row['verdict']].lower()


def _f1_change(row: Mapping[str, Any]) -> str:
  if '' in (row['f1'], row['f1_undefended']):
    return '--'
  return f'{_rounded(row["f1"] - row["f1_undefended"], 3):+.3f}'


def _minus(row: Mapping[str, Any], guess: str) -> float | str:
  return '' if '' in (row['region_psnr'], row[guess]) else row['region_psnr'] - row[guess]


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
  return row['dataset'], row['rounds']


def _values(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """As `compare` gave them, also of those of a CSV file."""
  texts = ('rounds',)  # '1' names a round.
  return [
    {name: str(value) if name in texts else _value(value) for name, value in row.items()}
    for row in rows
  ]


def _value(text: Any) -> Any:
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
  for row in _strongest(rows):
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
