"""Results of an attack and the files that hold them."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tff_shadow.errors import UserError
from tff_shadow.observations import Observation, load_tensors, save_tensors

_FORMAT = 'tff-shadow-attack'
_VERSION = 1
RESULT = 'result.json'
RECONSTRUCTIONS = 'reconstructions.safetensors'


def described(observation: Observation) -> dict[str, Any]:
  """What an attack's config.json says of the run that it attacked, as plain JSON values."""
  return {
    'dataset': observation.dataset,
    'model': observation.model_name,
    'defense': observation.defense.get('name', 'none'),
    'batch_norm_sharing': observation.batch_norm_sharing,
    'image_shape': list(observation.image_shape),
    'num_classes': len(observation.class_names),
  }


@dataclasses.dataclass(frozen=True)
class TargetResult:
  """What came out of attacking one client.

  Attributes:
    target: Its client id.
    images: How many images were sought.
    labels: Those used, one per image; empty if it failed before there were any.
    labels_source: Where they came from; None likewise.
    status: 'failed' if there is no result; never scored as one.
    reason: Why it failed, or, of one that is 'ok', why it is less than it should be: all restarts
      stopped being finite before their end, and what they had found by then is the result.
    loss: Matching loss of the chosen restart.
    restart_losses: Of the best candidate of each restart; None for one that never had a
      finite loss.
    chosen_restart: The restart of least loss.
    iterations: Optimiser steps, over all restarts and orders that were tried.
    seconds: Time spent, controls not counted.
    reconstructions: By name ('attack', 'prior_only', 'mean_image', and 'other_update' of an attack
      that is told the clients' regions): float32 [B, H, W, C] in [0, 1].
    order: The images that the local steps (of the first round) are taken to have had, one after
      another, by their places among `labels`; None where each step has all, labels are optimised
      too, or one gradient stands for all steps.
  """

  target: str
  images: int
  labels: tuple[int, ...]
  labels_source: Literal['known', 'inferred'] | None
  status: Literal['ok', 'failed']
  reason: str | None
  loss: float | None
  restart_losses: tuple[float | None, ...]
  chosen_restart: int | None
  iterations: int
  seconds: float
  reconstructions: dict[str, np.ndarray]
  order: tuple[int, ...] | None = None

  def as_dict(self) -> dict[str, Any]:
    """Everything but the images, as plain JSON values."""
    fields = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != 'reconstructions'
    }
    fields['labels'] = list(self.labels)
    fields['restart_losses'] = list(self.restart_losses)
    fields['order'] = None if self.order is None else list(self.order)
    return fields


def write_results(directory: pathlib.Path, results: Sequence[TargetResult]) -> None:
  """Writes both files; the JSON last, so that what it lists is there."""
  tensors = {
    f'{result.target}/{name}': images
    for result in results
    for name, images in result.reconstructions.items()
  }
  save_tensors(directory / RECONSTRUCTIONS, tensors)
  document = {
    'format': _FORMAT,
    'version': _VERSION,
    'targets': [result.as_dict() for result in results],
  }
  temporary = directory / (RESULT + '.tmp')
  temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + '\n')
  temporary.replace(directory / RESULT)


def read_results(directory: pathlib.Path) -> list[TargetResult]:
  """Reads what `write_results` wrote; an empty list if there is nothing yet.

  Raises:
    UserError: If the files are damaged or of another version.
  """
  path = directory / RESULT
  if not path.exists():
    return []
  tensors = load_tensors(directory / RECONSTRUCTIONS)
  try:
    document = json.loads(path.read_text())
    if (document['format'], document['version']) != (_FORMAT, _VERSION):
      raise ValueError('another format or version')
    return [_from_document(target, tensors) for target in document['targets']]
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path}: damaged ({type(error).__name__}: {error})') from error


def _from_document(target: dict[str, Any], tensors: dict[str, np.ndarray]) -> TargetResult:
  prefix = f'{target["target"]}/'
  reconstructions = {
    name.removeprefix(prefix): images for name, images in tensors.items() if name.startswith(prefix)
  }
  if target['status'] == 'ok' and 'attack' not in reconstructions:
    raise KeyError(f'{prefix}attack')
  fields = {**target, 'labels': tuple(target['labels'])}
  fields['restart_losses'] = tuple(target['restart_losses'])
  order = target.get('order')
  fields['order'] = None if order is None else tuple(order)
  return TargetResult(**fields, reconstructions=reconstructions)
