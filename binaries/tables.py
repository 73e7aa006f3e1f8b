"""CSV files of measured rows: caches that long measurements go on from, committed tables."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

from binaries import command
from tff_shadow.errors import UserError


class RowCache:
  """A CSV file to which rows are added, whole or not at all."""

  def __init__(self, path: pathlib.Path, columns: Sequence[str]):
    """Reads what is there.

    Raises:
      UserError: If it lacks a column.
    """
    self._path, self._columns = path, columns
    self.rows = read_rows(path)
    missing = [name for row in self.rows[:1] for name in columns if name not in row]
    if missing:
      raise UserError(
        f'{path}: has no column {missing[0]!r}, for it is of an earlier version; move it away'
      )

  def add(self, rows: Sequence[dict[str, Any]]) -> None:
    """Adds `rows`; what else they hold than the columns is left out."""
    self.rows += [{name: str(row[name]) for name in self._columns} for row in rows]
    write_rows(self._path, self._columns, self.rows)

  def done(self, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """The values of `columns` that have rows."""
    return {tuple(row[name] for name in columns) for row in self.rows}


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
  """The rows of a cache or a table; none if there is no such file."""
  if not path.exists():
    return []
  with path.open() as file:
    return list(csv.DictReader(line for line in file if not line.startswith('#')))


def write_table(
  path: pathlib.Path,
  columns: Sequence[str],
  rows: Sequence[dict[str, Any]],
  key: Sequence[str] = (),
) -> None:
  """Writes a table below a line with the command that made it.

  Args:
    path: Where to.
    columns: Of the table.
    rows: In order.
    key: Columns that name a row. Rows that are in the table and not among `rows` then stay, before
      these: what was measured elsewhere is not lost with its cache. By default they go.
  """
  if key:
    new = {tuple(str(row[name]) for name in key) for row in rows}
    old = [row for row in read_rows(path) if tuple(row[name] for name in key) not in new]
    rows = [*old, *rows]
  write_rows(path, columns, rows, head=f'# command: {command.command_line()}\n')


def write_rows(
  path: pathlib.Path, columns: Sequence[str], rows: Sequence[dict[str, Any]], *, head: str = ''
) -> None:
  """Writes `head` and a CSV file below it, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', newline='') as file:
    file.write(head)
    writer = csv.DictWriter(file, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  temporary.replace(path)
