"""Reads what an attack wrote and the truth it is scored against, and checks both."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from attacks.scoring.metrics import SSIM_WINDOW
from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE, truth_path

ATTACK = 'attack'
# Of every attack.
CONTROLS = ('prior_only', 'mean_image')
# Of one that is told something of the client besides its update: what it makes of that and of the
# update of another client.
OTHER_UPDATE = 'other_update'
GUESSES = (*CONTROLS, OTHER_UPDATE)
# What the class alone shows: the mean of other images of it. No guess, for it takes the label.
CLASS_MEAN = 'class_mean'
# The public image that relative data leakage is measured against.
PRIOR = 'mean_image'
# Rounding may leave [0, 1] by this much; more means that the file is not what it claims.
_RANGE_SLACK = 1e-3
_CONFIG_KEYS = {
  'attack': dict,
  'observation': str,
  'round': int,
  'threat_model': list,
  'dataset': str,
  'model': str,
  'defense': str,
}
_TARGET_KEYS = {'target': str, 'images': int, 'labels': list, 'status': str}


@dataclasses.dataclass(frozen=True)
class Target:
  """One attacked client: what the attack says of it, its reconstructions and the truth.

  Attributes:
    name: The client id.
    record: The target's entry in result.json.
    reconstructions: From set name ('attack', one of `GUESSES` or `CLASS_MEAN`) to [N, H, W, C] in
      [0, 1]; may hold non-finite images; a set that the attack did not write is absent.
    images: The true images [M, H, W, C] in [0, 1].
    labels: int [M].
    regions: [M, H, W, 1] in [0, 1].
  """

  name: str
  record: dict[str, Any]
  reconstructions: dict[str, np.ndarray]
  images: np.ndarray
  labels: np.ndarray
  regions: np.ndarray


@dataclasses.dataclass(frozen=True)
class AttackResult:
  """One attack of one run: its config.json and its targets in the order of result.json."""

  run_dir: pathlib.Path
  name: str
  config: dict[str, Any]
  targets: tuple[Target, ...]


def load_attack(run_dir: str | pathlib.Path, attack_name: str) -> AttackResult:
  """Reads RUN/attacks/NAME and the truth of its round.

  Raises:
    UserError: For a file that is missing, damaged, of another version or at odds with another.
  """
  run_dir = pathlib.Path(run_dir)
  directory = run_dir / 'attacks' / attack_name
  config = read_json(directory / 'config.json')
  _check_keys(directory / 'config.json', config, _CONFIG_KEYS)
  result = read_json(directory / 'result.json')
  _check_format(directory / 'result.json', result, 'tff-shadow-attack')
  records = result.get('targets')
  if not isinstance(records, list) or not records:
    raise UserError(
      f'{directory / "result.json"}: "targets" must be a list with at least one entry'
    )
  names = [record.get('target') for record in records if isinstance(record, dict)]
  if len(set(map(str, names))) < len(names):
    raise UserError(f'{directory / "result.json"}: each target must be listed once, found {names}')
  reconstructions, _ = _read_tensors(directory / 'reconstructions.safetensors')
  true_path = truth_path(run_dir, config['round'])
  truth, metadata = _read_tensors(true_path)
  _check_format(true_path, metadata, 'tff-shadow-truth')
  if AGGREGATE in names:
    truth |= _together(truth)
  targets = tuple(
    _target(directory, record, reconstructions, true_path, truth) for record in records
  )
  return AttackResult(run_dir, attack_name, config, targets)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: If the file is missing or does not hold a JSON object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path}: file not found') from None
  except (OSError, UnicodeDecodeError, ValueError) as error:
    raise UserError(f'{path}: not readable as JSON ({error})') from None
  if not isinstance(value, dict):
    raise UserError(f'{path}: must hold a JSON object')
  return value


def _read_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  if not path.is_file():
    raise UserError(f'{path}: file not found')
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f'{path}: not readable as safetensors ({error})') from None


def _check_keys(path: pathlib.Path, value: dict[str, Any], keys: dict[str, type]) -> None:
  for key, kind in keys.items():
    if key not in value:
      raise UserError(f'{path}: key "{key}" is missing')
    if not isinstance(value[key], kind):
      raise UserError(f'{path}: key "{key}" must be of type {kind.__name__}, found {value[key]!r}')


def _check_format(path: pathlib.Path, value: dict[str, Any], expected: str) -> None:
  if value.get('format') != expected:
    raise UserError(f'{path}: format must be "{expected}", found {value.get("format")!r}')
  # safetensors metadata holds only strings.
  if str(value.get('version')) != '1':
    raise UserError(f'{path}: version must be 1, found {value.get("version")!r}')


def _target(
  directory: pathlib.Path,
  record: dict[str, Any],
  reconstructions: dict[str, np.ndarray],
  true_path: pathlib.Path,
  truth: dict[str, np.ndarray],
) -> Target:
  result_path = directory / 'result.json'
  if not isinstance(record, dict):
    raise UserError(f'{result_path}: each of "targets" must be an object, found {record!r}')
  _check_keys(result_path, record, _TARGET_KEYS)
  name = record['target']
  if record['status'] not in ('ok', 'failed'):
    raise UserError(
      f'{result_path}: status of {name} must be "ok" or "failed", found {record["status"]!r}'
    )
  # An attack that failed before it had labels has no source of them.
  if record['status'] == 'ok' or record.get('labels_source') is not None:
    _check_keys(result_path, record, {'labels_source': str})
  images, labels, regions = _target_truth(true_path, truth, name)
  sets = {}
  for set_name in (ATTACK, *GUESSES):
    key = f'{name}/{set_name}'
    if key in reconstructions:
      sets[set_name] = reconstructions[key]
      _check_images(directory / 'reconstructions.safetensors', key, sets[set_name], images.shape)
  if record['status'] == 'failed':
    # What a failed attack left behind is no reconstruction.
    sets.pop(ATTACK, None)
  elif ATTACK not in sets:
    raise UserError(
      f'{directory / "reconstructions.safetensors"}: {name}/attack is missing although '
      'result.json says that the target is ok'
    )
  return Target(name, record, sets, images, labels, regions)


def _together(truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The truth of an attack on the mean: the images of all clients."""
  parts: dict[str, list[np.ndarray]] = {}
  for key in sorted(truth):
    parts.setdefault(key.rpartition('/')[2], []).append(truth[key])
  return {f'{AGGREGATE}/{part}': np.concatenate(arrays) for part, arrays in parts.items()}


def _target_truth(
  path: pathlib.Path, truth: dict[str, np.ndarray], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  missing = [key for key in ('images', 'labels', 'regions') if f'{name}/{key}' not in truth]
  if missing:
    raise UserError(f'{path}: {name}/{missing[0]} is missing; the client must have taken part')
  images, labels, regions = (truth[f'{name}/{key}'] for key in ('images', 'labels', 'regions'))
  _check_images(path, f'{name}/images', images, images.shape)
  if not len(images) or min(images.shape[1:3]) < SSIM_WINDOW:
    raise UserError(
      f'{path}: {name}/images must hold at least one image of at least '
      f'{SSIM_WINDOW}x{SSIM_WINDOW} pixels, found shape {list(images.shape)}'
    )
  if labels.shape != images.shape[:1] or regions.shape != (*images.shape[:3], 1):
    raise UserError(f'{path}: {name}/labels or {name}/regions do not fit the images in shape')
  for key, values in (('images', images), ('regions', regions)):
    if not np.isfinite(values).all():
      raise UserError(f'{path}: {name}/{key} holds values that are not finite')
  if regions.min() < 0 or regions.max() > 1:
    raise UserError(f'{path}: {name}/regions must hold values in [0, 1]')
  return images, labels, regions


def _check_images(path: pathlib.Path, key: str, images: np.ndarray, like: tuple[int, ...]) -> None:
  if images.ndim != 4 or images.shape[1:] != like[1:] or images.dtype.kind != 'f':
    raise UserError(
      f'{path}: {key} must hold floats of shape [N, {", ".join(map(str, like[1:]))}], '
      f'found {images.dtype} {list(images.shape)}'
    )
  finite = images[np.isfinite(images)]
  if finite.size and (finite.min() < -_RANGE_SLACK or finite.max() > 1 + _RANGE_SLACK):
    raise UserError(
      f'{path}: {key} must hold values in [0, 1], found {finite.min():.3g} to {finite.max():.3g}'
    )
