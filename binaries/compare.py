"""Is this defence better than that one? Puts audits of several runs side by side.

tff-shadow-compare --run_dir=runs/none --run_dir=runs/noise --output_dir=runs/compared

Runs of one defence that differ in their seed make one row. Writes comparison.csv, .tex, .md and
.html.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.audit import comparison, comparison_page, comparison_tables
from attacks.report.page import write_whole
from binaries import attacked_rounds, command
from binaries.small_federation import IMAGE_SIZE, is_usual
from binaries.tables import read_rows, write_table
from tff_shadow.errors import UserError

_RUN_DIRS = flags.DEFINE_multi_string(
  'run_dir', [], 'Run directory with an audit under audits/; may be given repeatedly.'
)
_SUMMARIES = flags.DEFINE_multi_string(
  'summary', [], 'summary.json of an audit, kept apart from its run; may be given repeatedly.'
)
_NAMES = flags.DEFINE_list(
  'name', ['audit'], 'Names of the audits in the run directories, each of other rounds.'
)
_OUTPUT_DIR = flags.DEFINE_string('output_dir', None, 'Where the four files go.')
_REFERENCE = flags.DEFINE_string(
  'reference', None, 'Defence that the others are compared with, as "correlated ratio 0.3".'
)
_UTILITY_TABLE = flags.DEFINE_string(
  'utility_table',
  None,
  'Table of `python -m binaries.frontier`: its F1 stands for that of the runs, which may then stop'
  ' after the attacked rounds; empty for defences that it does not have. Of the learning rate that'
  ' all were trained with, and of the models with BatchNorm where there are such, else of those'
  ' with group normalisation.',
)
_TITLE = flags.DEFINE_string('title', 'Defences compared', "The page's title.")
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a comparison that is already there.')

_FILES = ('comparison.csv', 'comparison.tex', 'comparison.md', 'comparison.html')


def main() -> None:
  """Compares the audits that the flags name."""
  if not _RUN_DIRS.value + _SUMMARIES.value:
    raise UserError(
      '--run_dir is missing: name the run directories of several audited runs, or --summary'
    )
  if not _OUTPUT_DIR.value:
    raise UserError('--output_dir is missing: the comparison needs a place')
  for name in _NAMES.value or ['']:
    command.check_directory_name('name', name)
  output = pathlib.Path(_OUTPUT_DIR.value)
  if output.exists() and not output.is_dir():
    raise UserError(f'--output_dir={output}: is a file')
  for name in _FILES:
    if (output / name).exists() and not _OVERWRITE.value:
      raise UserError(f'{output / name} exists; pass --overwrite to replace it')
  paths = [
    pathlib.Path(directory) / 'audits' / name / 'summary.json'
    for directory in _RUN_DIRS.value
    for name in _NAMES.value
  ]
  audits = [comparison.read_audit(path) for path in [*paths, *map(pathlib.Path, _SUMMARIES.value)]]
  rows = comparison.compare(audits, _REFERENCE.value, _utility(audits))
  budgets = sorted({_budget(audit) for audit in audits})
  page = comparison_page.render(
    rows,
    title=_TITLE.value,
    reference=_REFERENCE.value,
    budgets=f'Here: {"; ".join(budgets)}.',
    command=command.command_line(),
  )
  table = [{name: _cell(value) for name, value in row.items()} for row in rows]
  write_table(output / _FILES[0], comparison.COLUMNS, table)
  markdown = '\n'.join(
    [comparison_tables.as_overview(rows), comparison_tables.as_markdown(rows, _REFERENCE.value)]
  )
  texts = (comparison_tables.as_latex(rows), markdown, page)
  write_whole(output, dict(zip(_FILES[1:], texts, strict=True)))
  print(f'{len(audits)} audits, {len(rows)} rows; wrote {", ".join(_FILES)} to {output}')


def _utility(
  audits: Sequence[comparison.Audit],
) -> dict[tuple[str, str], tuple[float, float]] | None:
  """F1 with and without a defence by data set and label, the means over the table's seeds."""
  if _UTILITY_TABLE.value is None:
    return None
  path = pathlib.Path(_UTILITY_TABLE.value)
  if not path.is_file():
    raise UserError(f'--utility_table={path}: no such file')
  found: dict = {}
  try:
    for row in filter(is_usual, read_rows(path)):
      frozen = row['freshness'] == 'frozen'
      defense = attacked_rounds.public_settings(row['shape'], row['strength'], frozen)
      key = row['dataset'], comparison.label_of(*comparison.defense_names(defense))
      pair = float(row['f1']), float(row['f1_undefended'])
      found.setdefault(key, {}).setdefault(row['norm'], []).append(pair)
  except (KeyError, ValueError) as error:
    raise UserError(
      f'--utility_table={path}: no table of the frontier ({type(error).__name__}: {error})'
    ) from error
  utility, missing = {}, {}
  for audit in audits:
    dataset = audit.summary['dataset']
    norms = found.get((_table_name(dataset), audit.label))
    if norms is None:
      missing[f'{audit.label} on {dataset}'] = None
      continue
    # Most of the table is of models with BatchNorm, which dp_sgd cannot train.
    pairs = norms.get('batch') or norms['group']
    utility[dataset, audit.label] = tuple(map(float, np.mean(pairs, axis=0)))
  if missing:
    print(f'warning: no F1 in {path} of {"; ".join(missing)}', file=sys.stderr)
  return utility


def _table_name(dataset: str) -> str:
  """Of 'fundus_patches/32px/2.0.0' what the table calls it; other data sets keep their names."""
  name, *variant = dataset.split('/')
  return name if variant[:1] == [f'{IMAGE_SIZE}px'] else dataset


def _budget(audit: comparison.Audit) -> str:
  """All that an audit's attacks had, in words."""
  budget = audit.summary['budget']
  return (
    f'{budget["name"]}, {budget["iterations"]} iterations,'
    f' {budget["calibration_clients"]} clients played, {budget["denoiser_steps"]} steps of the'
    f' denoiser, {budget["inversion_clients"]} clients learned from'
  )


def _cell(value):
  return f'{value:.4f}' if isinstance(value, float) else value


def run() -> None:
  """The entry point of tff-shadow-compare."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
