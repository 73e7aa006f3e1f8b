"""An unfinished target on disk: one safetensors file, its numbers as JSON in the header."""

import dataclasses
import json
import pathlib

import numpy as np
import tensorflow as tf
from safetensors import safe_open

from attacks.solver import SolverState
from tff_shadow.errors import UserError
from tff_shadow.observations import load_tensors, save_tensors

_FORMAT = 'tff-shadow-attack-checkpoint'
_VERSION = '1'
_KEY = 'restart_images'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Where an attack on one target stands.

  Attributes:
    target: Its client id.
    state: Of the restart at work.
    restart_losses: Best matching loss of each finished restart.
    restart_images: The images these were found at, [B, H, W, C] each.
    seconds: Time spent on the target so far.
    use_xla: What the attack resolved to; the same bits need the same choice.
  """

  target: str
  state: SolverState
  restart_losses: tuple[float, ...]
  restart_images: tuple[np.ndarray, ...]
  seconds: float
  use_xla: bool


def write_checkpoint(path: pathlib.Path, checkpoint: Checkpoint) -> None:
  """Writes the file as a whole or not at all."""
  tensors = {f'state/{name}': value.numpy() for name, value in checkpoint.state._asdict().items()}
  for index, images in enumerate(checkpoint.restart_images):
    tensors[f'{_KEY}/{index:04d}'] = images
  numbers = {
    'target': checkpoint.target,
    'restart_losses': list(checkpoint.restart_losses),
    'seconds': checkpoint.seconds,
    'use_xla': checkpoint.use_xla,
  }
  save_tensors(
    path, tensors, {'format': _FORMAT, 'version': _VERSION, 'checkpoint': json.dumps(numbers)}
  )


def read_checkpoint(path: pathlib.Path) -> Checkpoint | None:
  """Reads what `write_checkpoint` wrote; None if there is no file.

  Raises:
    UserError: If it is damaged or of another version.
  """
  if not path.exists():
    return None
  tensors = load_tensors(path)
  with safe_open(path, framework='numpy') as file:
    metadata = file.metadata() or {}
  if metadata.get('format') != _FORMAT or metadata.get('version') != _VERSION:
    raise UserError(f'{path}: not a checkpoint of version {_VERSION}; delete it to start over')
  try:
    numbers = json.loads(metadata['checkpoint'])
    return Checkpoint(
      target=numbers['target'],
      state=SolverState(*(tf.constant(tensors[f'state/{name}']) for name in SolverState._fields)),
      restart_losses=tuple(numbers['restart_losses']),
      restart_images=tuple(
        tensors[name] for name in sorted(tensors) if name.startswith(_KEY + '/')
      ),
      seconds=numbers['seconds'],
      use_xla=numbers['use_xla'],
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path}: damaged ({type(error).__name__}: {error}); delete it to start over'
    ) from error
