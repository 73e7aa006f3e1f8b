"""CSV files of measured rows: caches that long measurements go on from, committed tables."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

from binaries import command


class RowCache:
  """A CSV file to which rows are added, whole or not at all."""

  def __init__(self, path: pathlib.Path, columns: Sequence[str]):
    """Reads what is there."""
    self._path, self._columns = path, columns
    self.rows: list[dict[str, str]] = []
    if path.exists():
      with path.open() as file:
        self.rows = list(csv.DictReader(file))

  def add(self, rows: Sequence[dict[str, Any]]) -> None:
    """Adds `rows`; what else they hold than the columns is left out."""
    self.rows += [{name: str(row[name]) for name in self._columns} for row in rows]
    _write(self._path, self._columns, self.rows, '')

  def done(self, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """The values of `columns` that have rows."""
    return {tuple(row[name] for name in columns) for row in self.rows}


def write_table(path: pathlib.Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
  """Writes a table below a line with the command that made it."""
  _write(path, columns, rows, f'# command: {command.command_line()}\n')


def _write(path, columns, rows, head) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  with temporary.open('w', newline='') as file:
    file.write(head)
    writer = csv.DictWriter(file, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  temporary.replace(path)
