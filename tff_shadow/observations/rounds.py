"""Where a run directory keeps its rounds."""

import pathlib

from tff_shadow.observations.files import round_directory_name, write_observation
from tff_shadow.observations.schema import Observation
from tff_shadow.observations.truth import Truth, write_truth


def write_round(run_dir: pathlib.Path, observation: Observation, truth: dict[str, Truth]) -> None:
  """Writes a round into observations/ and, apart from it, its truth into truth/ of a run."""
  name = round_directory_name(observation.round_num)
  write_truth(run_dir / 'truth' / f'{name}.safetensors', observation.round_num, truth)
  write_observation(run_dir / 'observations' / name, observation)
