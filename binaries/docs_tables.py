"""Puts tables of results/ into README.md and docs/results.md, so that they have what the files say.

python -m binaries.docs_tables

Between <!-- table: FILE, against REFERENCE --> and <!-- end of table --> stands the table that
`tff-shadow-compare` makes of the rows in FILE, which it wrote; after <!-- overview: FILE --> that
with a line for each defence.
"""

import pathlib
import re
import textwrap

import tensorflow_federated as tff
from absl import flags

from attacks.audit.comparison_tables import as_markdown, as_overview
from binaries import command
from binaries.tables import read_rows
from tff_shadow.errors import UserError

_PAGES = flags.DEFINE_list(
  'pages', ['README.md', 'docs/results.md'], 'The pages, which name the files.'
)
_TABLE = re.compile(
  r'(?P<begin>(?P<indent> *)<!-- '
  r'(?:overview: (?P<overview>\S+)|table: (?P<table>\S+), against (?P<reference>[^\n]+?))'
  r' -->\n).*?(?P<end> *<!-- end of table -->)',
  re.S,
)


def main() -> None:
  """Writes the pages with the tables that they name."""
  for name in _PAGES.value:
    path = pathlib.Path(name)
    if not path.is_file():
      raise UserError(f'--pages={path}: no such file')
    path.write_text(with_tables(path.read_text()))


def with_tables(page: str) -> str:
  """A page with its tables made anew from the files that it names, beside the working directory."""

  def table(found: re.Match[str]) -> str:
    path = found['overview'] or found['table']
    rows = read_rows(pathlib.Path(path))
    if not rows:
      raise UserError(f'{path}: no rows, though the page names it')
    made = as_overview(rows) if found['overview'] else as_markdown(rows, found['reference'])
    # A line of its own on both sides, without which it is no table.
    made = textwrap.indent(f'\n{made}\n', found['indent'])
    return f'{found["begin"]}{made}{found["end"]}'

  return _TABLE.sub(table, page)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
