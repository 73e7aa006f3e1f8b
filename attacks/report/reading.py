"""Reads a run directory: every attack with its scores, and the training curves."""

import csv
import dataclasses
import math
import pathlib
from typing import Any

from attacks.scoring import results, scores
from attacks.scoring.identification import Identification, identify
from tff_shadow.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScoredAttack:
  """An attack, the score of every image it was after, and whether they can be told apart."""

  result: results.AttackResult
  scores: list[scores.ImageScore]
  identification: Identification


@dataclasses.dataclass(frozen=True)
class Training:
  """The numeric columns of metrics.csv.

  Attributes:
    rounds: The round of each row.
    curves: From column name to one value per row; None where the cell is empty or not finite.
  """

  rounds: list[int]
  curves: dict[str, list[float | None]]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory. `config` and `training` are None where the run has no such file."""

  directory: pathlib.Path
  config: dict[str, Any] | None
  training: Training | None
  attacks: tuple[ScoredAttack, ...]

  @property
  def name(self) -> str:
    """The directory's own name."""
    return self.directory.resolve().name


def read_run(directory: str | pathlib.Path) -> Run:
  """Reads and scores every attack under RUN/attacks.

  Raises:
    UserError: If there is no attack, or a file is missing, damaged or of another version.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f'--run_dir={directory}: directory not found')
  names = sorted(path.name for path in (directory / 'attacks').glob('*/') if path.is_dir())
  if not names:
    raise UserError(f'--run_dir={directory}: no attack under {directory / "attacks"}; attack first')
  attacks = []
  for name in names:
    result = results.load_attack(directory, name)
    rows = scores.score(result)
    attacks.append(ScoredAttack(result, rows, identify(result, rows)))
  config_path, metrics_path = directory / 'config.json', directory / 'metrics.csv'
  return Run(
    directory,
    results.read_json(config_path) if config_path.exists() else None,
    read_training(metrics_path) if metrics_path.exists() else None,
    tuple(attacks),
  )


def read_training(path: pathlib.Path) -> Training | None:
  """Reads metrics.csv: a column `round`, other columns such as `validation/f1`.

  Columns that hold no number at all (text, nested lists) are left out. None if there is no row.

  Raises:
    UserError: If the file cannot be read or a round is not an integer.
  """
  try:
    with path.open(newline='', encoding='utf-8') as file:
      reader = csv.DictReader(file)
      rows = list(reader)
      columns = [name for name in reader.fieldnames or [] if name]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{path}: not readable as CSV ({error})') from None
  if 'round' not in columns:
    raise UserError(f'{path}: must have a column "round", found {columns}')
  rounds = []
  for line, row in enumerate(rows, start=2):
    try:
      rounds.append(int(row['round']))
    except (TypeError, ValueError):
      raise UserError(
        f'{path}, line {line}: "round" must be an integer, found {row["round"]!r}'
      ) from None
  curves = {name: [_number(row[name]) for row in rows] for name in columns if name != 'round'}
  numeric = {
    name: values for name, values in curves.items() if any(value is not None for value in values)
  }
  return Training(rounds, numeric) if rounds else None


def _number(cell: str | None) -> float | None:
  try:
    value = float(cell or '')
  except ValueError:
    return None
  return value if math.isfinite(value) else None
