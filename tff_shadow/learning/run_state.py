"""The saved state of a run: which rounds are done, and the newest state that can be read."""

import asyncio
import logging
import pathlib
from typing import Any

import tensorflow_federated as tff

from tff_shadow.errors import UserError

_KEEP = 3


def has_state(directory: pathlib.Path) -> bool:
  """Whether the state of any round was saved in `directory`, which is not made for that.

  What a killed run left half written is no state; one that is damaged is.
  """
  return newest_round(directory) > 0


def newest_round(directory: pathlib.Path) -> int:
  """The last round with a state, readable or not; 0 if there is none. `has_state` says the rest."""
  return max(RunState(directory)._rounds(), default=0) if directory.is_dir() else 0


class RunState:
  """States of the rounds of one run, in `directory`; written whole or not at all."""

  def __init__(self, directory: pathlib.Path):
    """Uses or creates `directory`."""
    self._directory = directory
    self._manager = tff.program.FileProgramStateManager(
      directory, prefix='round_', keep_total=_KEEP, keep_first=False
    )

  def any(self) -> bool:
    """Whether there is the state of any round, readable or not."""
    return bool(self._rounds())

  def save(self, state: Any, round_num: int) -> None:
    """Saves the state after `round_num` unless that is saved already."""
    if round_num not in self._rounds():
      asyncio.run(self._manager.save(state, round_num))

  def load_latest(self, structure: Any) -> tuple[Any, int]:
    """Returns the newest readable state and its round.

    A damaged state is named in a warning, deleted so that its round can be saved again, and the one
    before it is taken.

    Args:
      structure: A state of the same process, for its types.

    Raises:
      UserError: If there is no state, or none can be read.
    """
    rounds = self._rounds()
    for round_num in reversed(rounds):
      try:
        state = asyncio.run(self._manager.load(round_num, structure))
        _check_like(structure, state)
      except Exception as error:  # TensorFlow raises whatever the damaged part raises.
        first_line = (str(error).splitlines() or [''])[0]
        logging.warning(
          'state of round %d is damaged (%s: %s); falling back to the one before it',
          round_num,
          type(error).__name__,
          first_line,
        )
        continue
      for damaged in (r for r in rounds if r > round_num):
        asyncio.run(self._manager._remove(damaged))
      return state, round_num
    if rounds:
      raise UserError(
        f'{self._directory}: none of the {len(rounds)} saved states can be read; start a new run'
      )
    raise UserError(f'{self._directory}: no saved state to resume from; start a new run')

  def _rounds(self) -> list[int]:
    return asyncio.run(self._manager.get_versions()) or []


def _check_like(structure: Any, state: Any) -> None:
  """Raises ValueError unless `state` has the structure and shapes of `structure`."""
  expected = tff.structure.flatten(tff.structure.from_container(structure, recursive=True))
  found = tff.structure.flatten(tff.structure.from_container(state, recursive=True))
  if [getattr(leaf, 'shape', ()) for leaf in expected] != [
    getattr(leaf, 'shape', ()) for leaf in found
  ]:
    raise ValueError('the weights have other shapes than the model')
