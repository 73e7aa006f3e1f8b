"""What audits of runs that start alike have in common, kept so that it is made once."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attacks.sources import attacks_digest
from tff_shadow.observations import Observation, Truth


class AuditCache:
  """Directories of finished attacks by what they follow from. Audits may use one side by side."""

  def __init__(self, directory: pathlib.Path | None):
    """Uses or makes `directory`; keeps nothing if it is None."""
    self._directory = directory

  def fetch(self, key: str, place: pathlib.Path) -> None:
    """Copies what is kept under `key` to `place`, unless nothing is or something is there."""
    if self._directory is None or place.exists():
      return
    kept = self._directory / key
    if kept.is_dir():
      _copied(kept, place)

  def store(self, key: str, place: pathlib.Path) -> None:
    """Keeps a copy of the directory `place` under `key`, unless there is one."""
    if self._directory is not None and place.is_dir() and not (self._directory / key).exists():
      _copied(place, self._directory / key)


def undefended_key(
  observation: Observation, truth: Mapping[str, Truth], clients: Sequence[str], settings: Any
) -> str:
  """Names attacks on a round without a defence, made by these sources.

  Args:
    observation: The round; of its clients only their numbers of images and steps count.
    truth: Of its clients.
    clients: Those that are attacked.
    settings: Of the attacks, plain values.
  """
  sha = hashlib.sha256()
  numbers = [
    (own.num_images, own.num_steps, own.batch_size, own.weight)
    for own in map(observation.client, clients)
  ]
  sha.update(
    json.dumps(
      [
        attacks_digest(),
        observation.model_config,
        vars(observation.client_training),
        observation.batch_norm_sharing,
        list(clients),
        numbers,
        settings,
      ],
      sort_keys=True,
      default=str,
    ).encode()
  )
  weights = observation.global_weights
  arrays = [*weights.trainable, *weights.non_trainable, observation.public_mean_image]
  for name in clients:
    arrays += [truth[name].images, truth[name].labels, truth[name].regions]
  for array in arrays:
    array = np.ascontiguousarray(array)
    sha.update(f'{array.dtype.str}{array.shape}'.encode())
    sha.update(array.tobytes())
  return f'undefended-{sha.hexdigest()[:32]}'


def _copied(source: pathlib.Path, target: pathlib.Path) -> None:
  """The whole directory or nothing, also if another process does the same."""
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.with_name(f'.{target.name}-{uuid.uuid4().hex}')
  try:
    shutil.copytree(source, temporary)
    # Fails where another was faster, which has copied the same.
    with contextlib.suppress(OSError):
      os.rename(temporary, target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
