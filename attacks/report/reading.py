"""Reads a run directory: every attack with its scores, and the training curves."""

import csv
import dataclasses
import logging
import math
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks.results import RESULT
from attacks.scoring import results, scores
from attacks.scoring.gallery import check_gallery, read_gallery
from attacks.scoring.identification import Identification, identify
from tff_shadow.errors import UserError

if TYPE_CHECKING:  # A report without LPIPS need not wait for TensorFlow.
  from attacks.scoring.lpips import Lpips

# The gallery that every run has: its own truth files.
RUN_GALLERY = 'run'


@dataclasses.dataclass(frozen=True)
class Measures:
  """What is measured beyond what needs nothing but the run.

  Attributes:
    lpips: The perceptual metric; None for none.
    gallery: Whose images originals are picked out of, besides all attacked ones: `RUN_GALLERY` for
      the truth files of each run, or another directory of truth files; None for no others.
  """

  lpips: 'Lpips | None' = None
  gallery: str | None = None


@dataclasses.dataclass(frozen=True)
class ScoredAttack:
  """An attack, the score of every image it was after, and whether they can be told apart.

  Attributes:
    result: The attack.
    scores: One for every image.
    identification: By correlation.
    identification_by_lpips: By LPIPS; None without it.
  """

  result: results.AttackResult
  scores: list[scores.ImageScore]
  identification: Identification
  identification_by_lpips: Identification | None = None


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
  measures: Measures = dataclasses.field(default_factory=Measures)

  @property
  def name(self) -> str:
    """The directory's own name."""
    return self.directory.resolve().name


def read_run(directory: str | pathlib.Path, measures: Measures | None = None) -> Run:
  """Reads and scores every attack under RUN/attacks that has results; a warning names the others.

  Raises:
    UserError: If no attack has results, a file is missing, damaged or of another version, or the
      images do not suit `measures`.
  """
  measures = measures or Measures()
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f'--run_dir={directory}: directory not found')
  names = _finished(directory)
  distractors = _gallery(directory, measures.gallery)
  attacks = [_score(results.load_attack(directory, name), distractors, measures) for name in names]
  config_path, metrics_path = directory / 'config.json', directory / 'metrics.csv'
  return Run(
    directory,
    results.read_json(config_path) if config_path.exists() else None,
    read_training(metrics_path) if metrics_path.exists() else None,
    tuple(attacks),
    measures,
  )


def _finished(directory: pathlib.Path) -> list[str]:
  attacks = directory / 'attacks'
  names = sorted(path.name for path in attacks.glob('*/') if path.is_dir())
  if not names:
    raise UserError(f'--run_dir={directory}: no attack under {attacks}; attack first')
  finished = [name for name in names if (attacks / name / RESULT).exists()]
  if not finished:
    raise UserError(
      f'--run_dir={directory}: no attack has a {RESULT} yet, of {", ".join(names)}; go on with'
      ' tff-shadow-attack --resume'
    )
  if len(finished) < len(names):
    unfinished = ', '.join(name for name in names if name not in finished)
    logging.warning('%s: left out attacks without a %s yet: %s', directory, RESULT, unfinished)
  return finished


def _gallery(directory: pathlib.Path, gallery: str | None) -> list[np.ndarray]:
  if gallery is None:
    return []
  return read_gallery(directory / 'truth' if gallery == RUN_GALLERY else gallery)


def _score(
  result: results.AttackResult, distractors: list[np.ndarray], measures: Measures
) -> ScoredAttack:
  if measures.gallery is not None:
    check_gallery(result, distractors, measures.gallery)
  rows = scores.score(result, measures.lpips)
  by_lpips = None
  if measures.lpips is not None:
    by_lpips = identify(result, rows, distractors, measures.lpips.pairwise)
  return ScoredAttack(result, rows, identify(result, rows, distractors), by_lpips)


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
