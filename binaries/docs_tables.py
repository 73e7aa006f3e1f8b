"""Puts tables of results/ into docs/results.md, so that the page has what the files have.

python -m binaries.docs_tables

A table stands between <!-- table: FILE, against REFERENCE --> and <!-- end of table -->: that of
`tff-shadow-compare` of the rows in FILE, which it wrote.
"""

import pathlib
import re

import tensorflow_federated as tff
from absl import flags

from attacks.audit.comparison_tables import as_markdown
from binaries import command
from binaries.tables import read_rows
from tff_shadow.errors import UserError

_PAGE = flags.DEFINE_string('page', 'docs/results.md', 'The page, which names the files.')
_TABLE = re.compile(
  r'(<!-- table: (?P<file>\S+), against (?P<reference>.+?) -->\n).*?(<!-- end of table -->)', re.S
)


def main() -> None:
  """Writes the page with the tables that it names."""
  path = pathlib.Path(_PAGE.value)
  if not path.is_file():
    raise UserError(f'--page={path}: no such file')
  path.write_text(with_tables(path.read_text()))


def with_tables(page: str) -> str:
  """A page with its tables made anew from the files that it names, beside the working directory."""

  def table(found: re.Match[str]) -> str:
    rows = read_rows(pathlib.Path(found['file']))
    if not rows:
      raise UserError(f'{found["file"]}: no rows, though the page names it')
    # A line of its own on both sides, without which it is no table.
    return f'{found[1]}\n{as_markdown(rows, found["reference"])}\n{found[4]}'

  return _TABLE.sub(table, page)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
