"""Where a run directory keeps its rounds."""

import pathlib

from tff_shadow.observations.files import read_observation, write_observation
from tff_shadow.observations.schema import Observation
from tff_shadow.observations.truth import Truth, read_truth, write_truth


def round_directory_name(round_num: int) -> str:
  """What a round is called in names of files, so that they sort."""
  return f'round_{round_num:05d}'


def observation_path(run_dir: pathlib.Path, round_num: int) -> pathlib.Path:
  """The directory of what the server saw in a round."""
  return run_dir / 'observations' / round_directory_name(round_num)


def truth_path(run_dir: pathlib.Path, round_num: int) -> pathlib.Path:
  """The file of what scoring compares with."""
  return run_dir / 'truth' / f'{round_directory_name(round_num)}.safetensors'


def observed_rounds(run_dir: pathlib.Path) -> list[int]:
  """The rounds of which there is an observation, in order."""
  return sorted(
    int(path.name.rpartition('_')[2]) for path in (run_dir / 'observations').glob('round_*')
  )


def write_round(run_dir: pathlib.Path, observation: Observation, truth: dict[str, Truth]) -> None:
  """Writes a round into observations/ and, apart from it, its truth into truth/ of a run."""
  write_truth(truth_path(run_dir, observation.round_num), observation.round_num, truth)
  write_observation(observation_path(run_dir, observation.round_num), observation)


def read_round(run_dir: pathlib.Path, round_num: int) -> tuple[Observation, dict[str, Truth]]:
  """What `write_round` wrote.

  Raises:
    UserError: If a file is missing or damaged.
  """
  return (
    read_observation(observation_path(run_dir, round_num)),
    read_truth(truth_path(run_dir, round_num)),
  )
