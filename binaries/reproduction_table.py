"""The tables of the published experiment: what attacks found, of each client and of all."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from attacks.scoring import results
from attacks.scoring.gate import better_control
from attacks.scoring.identification import KS, original_ranks
from attacks.scoring.lenient import LenientScore, score_leniently
from attacks.scoring.metrics import METRIC_NAMES, Perceptual
from attacks.scoring.results import AttackResult, load_attack
from attacks.scoring.scores import ImageScore, score, write_scores
from binaries import command
from binaries.published_protocol import Plan
from binaries.tables import write_rows
from tff_shadow.data import PUBLISHED_SETS, FederatedData
from tff_shadow.models import load_keras_file
from tff_shadow.observations import Truth
from tff_shadow.shadow import SaliencyConfig, build_region_map

# Of an image, where the data set names no region: what Grad-CAM++ of the trained model ranks first.
_REGION = SaliencyConfig('gradcam_pp', target=1, top_fraction=0.3)
_METRICS = (
  'mse',
  'psnr',
  'lpips',
  'ssim',
  'rdlv',
  *(f'iip_{k}' for k in KS),
  *(name for name in METRIC_NAMES if name.startswith('region_')),
)
COLUMNS = (
  'dataset',
  'defense',
  'round',
  'attack',
  'scoring',
  'client',
  'images',
  'failed',
  *_METRICS,
  'control_psnr',
)
_ALL = 'all'
_ROWS = 'rows.json'


def is_scored(directory: pathlib.Path) -> bool:
  """Whether `score_attack` has scored the attack there."""
  return (directory / _ROWS).exists()


def score_attack(
  plan: Plan,
  data: FederatedData,
  directory: pathlib.Path,
  perceptual: Perceptual | None,
) -> list[dict[str, Any]]:
  """The rows of an attack in the table: strict and lenient, of each client and of all together.

  Writes the scores of each image (scores.csv), of each reconstruction (lenient_scores.csv) and the
  rows (rows.json), which a later call with LPIPS or without, as before, reads again.
  """
  path = directory / _ROWS
  key = {'lpips': getattr(perceptual, 'digest', None)}
  if path.exists():
    saved = json.loads(path.read_text())
    if saved['key'] == key:
      return saved['rows']
  run_dir = directory.parents[1]
  found = load_attack(run_dir, directory.name)
  if plan.dataset in PUBLISHED_SETS:
    found = _with_regions(found, run_dir, data)
  distractors = list(data.validation.float_images())
  strict = score(found, perceptual)
  write_scores(directory / 'scores.csv', strict)
  lenient = score_leniently(
    found, perceptual, set_names=(results.ATTACK, 'prior_only'), distractors=distractors
  )
  _write_lenient(directory / 'lenient_scores.csv', lenient)
  ranks = original_ranks(found, strict, distractors)[results.ATTACK]
  base = {
    'dataset': plan.dataset,
    'defense': run_dir.name,
    'round': found.config['round'],
    'attack': found.config['attack']['preset'],
  }
  rows = []
  for client in (_ALL, *(target.name for target in found.targets)):
    targets = [target for target in found.targets if client in (_ALL, target.name)]
    failed = sum(t.record['images'] for t in targets if t.record['status'] == 'failed')
    own = base | {'client': client, 'failed': failed}
    mine = [place for place, row in enumerate(strict) if client in (_ALL, row.target)]
    rows.append(
      own
      | {'scoring': 'strict'}
      | _strict_means([strict[place] for place in mine], [ranks[place] for place in mine])
    )
    rows.append(
      own
      | {'scoring': 'lenient'}
      | _lenient_means([row for row in lenient if client in (_ALL, row.target)])
    )
  command.write_json(path, {'key': key, 'rows': rows})
  return rows


def _with_regions(found: AttackResult, run_dir: pathlib.Path, data: FederatedData) -> AttackResult:
  """With the regions that the trained model names, for a data set that names none."""
  model = load_keras_file(
    str(run_dir / 'model.keras'),
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
  )
  region_map = build_region_map(_REGION, model)

  def regions(truth: Truth) -> np.ndarray:
    batches = [
      region_map(truth.images[start : start + 16], truth.labels[start : start + 16]).maps.numpy()
      for start in range(0, len(truth.images), 16)
    ]
    return np.concatenate(batches)

  return dataclasses.replace(
    found,
    targets=tuple(dataclasses.replace(target, regions=regions(target)) for target in found.targets),
  )


def _strict_means(rows: Sequence[ImageScore], ranks: Sequence[int | None]) -> dict[str, Any]:
  """Over the images that have a reconstruction."""
  attacked = [(row, rank) for row, rank in zip(rows, ranks, strict=True) if row.status == 'ok']
  only = [row for row, _ in attacked]
  control = better_control(only)
  values = {
    name: [getattr(row.quality[results.ATTACK], name) for row in only] for name in METRIC_NAMES
  }
  values['rdlv'] = [row.rdlv for row in only]
  for k in KS:
    values[f'iip_{k}'] = [float(rank is not None and rank <= k) for _, rank in attacked]
  values['control_psnr'] = [
    row.quality[control].psnr for row in only if control is not None and control in row.quality
  ]
  return {'images': len(only)} | {name: _mean(values[name]) for name in (*_METRICS, 'control_psnr')}


def _lenient_means(rows: Sequence[LenientScore]) -> dict[str, Any]:
  """Over the reconstructions."""
  only = [row for row in rows if row.set_name == results.ATTACK]
  values = {name: [getattr(row.quality, name) for row in only] for name in METRIC_NAMES}
  values['rdlv'] = [row.rdlv for row in only]
  for k in KS:
    values[f'iip_{k}'] = [float(row.rank is not None and row.rank <= k) for row in only]
  values['control_psnr'] = [row.quality.psnr for row in rows if row.set_name != results.ATTACK]
  return {'images': len(only)} | {name: _mean(values[name]) for name in (*_METRICS, 'control_psnr')}


def _mean(values: Sequence[float | None]) -> float | None:
  values = [value for value in values if value is not None]
  return float(np.mean(values)) if values else None


def _write_lenient(path: pathlib.Path, scores: Sequence[LenientScore]) -> None:
  columns = ('target', 'set', 'reconstruction', *METRIC_NAMES, 'rdlv', 'rank')
  rows = [
    dict.fromkeys(columns)
    | {'target': row.target, 'set': row.set_name, 'reconstruction': row.reconstruction}
    | dataclasses.asdict(row.quality)
    | {'rdlv': row.rdlv, 'rank': row.rank}
    for row in scores
  ]
  write_csv(path, rows, columns)


def write_csv(path: pathlib.Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
  """Writes a table; what does not exist is an empty cell."""
  cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
  write_rows(path, columns, cells)


def printed(rows: Sequence[dict[str, Any]]) -> str:
  """The rows over all clients, as a table to read."""
  names = ('defense', 'round', 'attack', 'scoring', 'images', *_METRICS, 'control_psnr')
  shown = [row for row in rows if row['client'] == _ALL]
  names = [name for name in names if any(row[name] is not None for row in shown)]
  lines = [names, *([_short(row[name]) for name in names] for row in shown)]
  widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  )


def _cell(value: Any) -> Any:
  return f'{value:.6g}' if isinstance(value, float) else value


def _short(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:.3f}' if isinstance(value, float) else str(value)
