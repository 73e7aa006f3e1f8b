"""Unfinished lanes on disk: one safetensors file, its numbers as JSON in the header."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from safetensors import safe_open

from attacks.order_search import Trial
from attacks.solver import SolverState
from tff_shadow.errors import UserError
from tff_shadow.observations import load_tensors, save_tensors

_FORMAT = 'tff-shadow-attack-checkpoint'
_STATE, _FINISHED = 'state', 'finished'
_VERSION = '3'


@dataclasses.dataclass(frozen=True)
class FinishedLane:
  """What came of one restart on one target.

  Attributes:
    loss: The least matching loss.
    images: [B, H, W, C], float32, where it was found.
    seconds: Its share of the time.
    diverged_at: The first iteration whose loss was not finite, or -1.
  """

  loss: float
  images: np.ndarray
  seconds: float
  diverged_at: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Where lanes stand.

  Attributes:
    lanes: Their names.
    tensors: Of the solver's state, in the order of `tf.nest.flatten`.
    seconds: Time spent on them so far.
    use_xla: What the attack resolved to; the same bits need the same choice.
    finished: Other lanes of the same targets, that ran before them.
    tried: Of the same targets, orders of their images.
  """

  lanes: tuple[str, ...]
  tensors: tuple[np.ndarray, ...]
  seconds: float
  use_xla: bool
  finished: dict[str, FinishedLane]
  tried: dict[str, list[Trial]]

  @classmethod
  def of(
    cls,
    lanes: Sequence[str],
    state: SolverState,
    seconds: float,
    use_xla: bool,
    finished: dict[str, FinishedLane],
    tried: dict[str, list[Trial]],
  ) -> 'Checkpoint':
    """The checkpoint of a state."""
    tensors = tuple(tensor.numpy() for tensor in tf.nest.flatten(state))
    return cls(tuple(lanes), tensors, seconds, use_xla, finished, tried)

  def restore(self, like: SolverState) -> SolverState:
    """The state, in the structure of another of the same lanes.

    Raises:
      UserError: If it has another structure: the settings have changed.
    """
    flat = tf.nest.flatten(like)
    if len(flat) != len(self.tensors) or any(
      int(np.prod(tensor.shape)) != array.size
      for tensor, array in zip(flat, self.tensors, strict=False)
    ):
      raise UserError('the checkpoint is of an attack with other settings; delete it to start over')
    # The file holds scalars as vectors of one.
    restored = [
      tf.constant(array.reshape(tensor.shape), tensor.dtype)
      for tensor, array in zip(flat, self.tensors, strict=True)
    ]
    return tf.nest.pack_sequence_as(like, restored)


def write_checkpoint(path: pathlib.Path, checkpoint: Checkpoint) -> None:
  """Writes the file as a whole or not at all."""
  tensors = {f'{_STATE}/{index:05d}': array for index, array in enumerate(checkpoint.tensors)}
  finished = []
  for index, (name, lane) in enumerate(checkpoint.finished.items()):
    tensors[f'{_FINISHED}/{index:05d}'] = lane.images
    finished.append([name, lane.loss, lane.seconds, lane.diverged_at])
  numbers = {
    'lanes': list(checkpoint.lanes),
    'seconds': checkpoint.seconds,
    'use_xla': checkpoint.use_xla,
    'finished': finished,
    'tried': checkpoint.tried,
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
      lanes=tuple(numbers['lanes']),
      tensors=tuple(tensors[name] for name in sorted(tensors) if name.startswith(_STATE)),
      seconds=numbers['seconds'],
      use_xla=numbers['use_xla'],
      finished={
        name: FinishedLane(loss, tensors[f'{_FINISHED}/{index:05d}'], seconds, diverged_at)
        for index, (name, loss, seconds, diverged_at) in enumerate(numbers['finished'])
      },
      tried={
        target: [Trial(tuple(order), loss, seconds) for order, loss, seconds in trials]
        for target, trials in numbers['tried'].items()
      },
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path}: damaged ({type(error).__name__}: {error}); delete it to start over'
    ) from error
