"""The attack of someone who knows the defence, on a run directory."""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow_federated as tff

from attacks.adaptive.attacker import AdaptiveAttack, AdaptiveAttacker, Effort
from attacks.adaptive.players import AttackersShadow
from attacks.adaptive.simulated_defense import region_map_of
from attacks.config import AttackConfig
from binaries import run_directory
from binaries.knowledge_flags import Knowledge
from binaries.progress import watch
from binaries.recorded_data import load_data_of
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator
from tff_shadow.observations import AGGREGATE, Observation, read_truth, truth_path


def adaptive_attack(
  run_dir: pathlib.Path,
  observations: Sequence[Observation],
  targets: Sequence[str],
  config: AttackConfig,
  knowledge: Knowledge,
  generator: str | None,
) -> Callable[[], AdaptiveAttack]:
  """The attack; all that it needs is read before it is called.

  Args:
    run_dir: Of tff-shadow-train or `record_round`.
    observations: Its rounds, attacked jointly.
    targets: Client ids.
    config: All settings that are not tried.
    knowledge: What the attacker has of the defence.
    generator: A file, the shadow with which the published defence is played.

  Raises:
    UserError: If the data of the run are not there any more, or the attack cannot be made.
  """
  tff.test.set_no_default_context()  # The players' code runs without a federation around it.
  if AGGREGATE in targets:
    raise UserError(f'--knows: attacks single clients, not --targets={AGGREGATE}')
  recorded = run_directory.read_config(run_dir)
  data = load_data_of(run_dir, recorded)
  shadow = None
  if generator:
    shadow = AttackersShadow.fitted(
      load_generator(generator, data.image_shape),
      data.public.float_images(),
      recorded['flags']['rounds'],
    )
  attacker = AdaptiveAttacker(
    data.public,
    config,
    Effort(
      knowledge.calibration_clients,
      knowledge.denoiser_steps,
      knowledge.inversion_clients,
      knowledge.augmentations,
    ),
    shadow=shadow,
    watch=watch,
  )
  told = _told_maps(run_dir, observations[0], targets) if knowledge.regions else None
  return lambda: attacker.attack(observations, targets, told)[-1]


def _told_maps(
  run_dir: pathlib.Path, observation: Observation, targets: Sequence[str]
) -> Mapping[str, np.ndarray]:
  path = truth_path(run_dir, observation.round_num)
  truth = read_truth(path)
  for name in targets:
    if name not in truth:
      raise UserError(f'{path}: has no client {name!r}')
    if observation.client(name).num_images > 1:
      raise UserError(
        f'--knows=regions: {name} has several images, of which nobody knows in which order they'
        ' come out; use --knows=defense'
      )
  region_map = region_map_of(observation)
  return {name: region_map(truth[name]) for name in targets}
