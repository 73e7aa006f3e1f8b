"""The flags of an attacker who knows the defence, and its attack on a run."""

import pathlib
from collections.abc import Callable, Sequence

from absl import flags

from attacks.adaptive.attacker import AdaptiveAttack, AdaptiveAttacker
from attacks.adaptive.denoiser import DenoiserSettings
from attacks.adaptive.players import AttackersShadow
from attacks.adaptive.simulated_defense import region_map_of
from attacks.config import AttackConfig
from binaries import command, run_directory
from binaries.progress import watch
from binaries.recorded_data import load_recorded
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator
from tff_shadow.observations import AGGREGATE, Observation, read_truth, round_directory_name
from tff_shadow.published import standardization
from tff_shadow.shadow.augmentation import AUGMENTATIONS

_KNOWS = flags.DEFINE_enum(
  'knows',
  'nothing',
  ['nothing', 'defense', 'regions'],
  'Of the defence. defense: all its settings, but not its keys; it is played on public images (the'
  ' validation split of the run), and matching, smoothness and denoising are chosen there. regions:'
  ' besides, the region maps of the clients, which are read from the truth file.',
)
_CALIBRATION_CLIENTS = flags.DEFINE_integer(
  'calibration_clients', 8, 'Clients of public images that it plays.', lower_bound=1
)
_DENOISER_STEPS = flags.DEFINE_integer(
  'denoiser_steps', 600, "Of its denoiser's training; 0 for no denoiser.", lower_bound=0
)
_AUGMENT = flags.DEFINE_list(
  'augment',
  ['shifts', 'brightness'],
  'What leaves an image of this kind one, for the denoiser: ' + ', '.join(AUGMENTATIONS) + '.',
)


def is_wanted() -> bool:
  """Whether the attacker knows anything of the defence; UserError for flags without a use."""
  if _KNOWS.value != 'nothing':
    return True
  for flag in (_CALIBRATION_CLIENTS, _DENOISER_STEPS, _AUGMENT):
    if flag.present:
      raise UserError(f'--{flag.name}: needs --knows=defense or --knows=regions')
  return False


def adaptive_attack(
  run_dir: pathlib.Path,
  observations: Sequence[Observation],
  targets: Sequence[str],
  config: AttackConfig,
  generator: str | None,
) -> Callable[[], AdaptiveAttack]:
  """The attack that the flags say; all that it needs is read before it is called.

  Args:
    run_dir: Of tff-shadow-train.
    observations: Its rounds, attacked jointly.
    targets: Client ids.
    config: All settings that are not tried.
    generator: A file, the shadow with which the published defence is played.

  Raises:
    UserError: If the data of the run are not there any more, or the attack cannot be made.
  """
  command.check_choices('augment', _AUGMENT.value, AUGMENTATIONS)
  if AGGREGATE in targets:
    raise UserError(f'--knows={_KNOWS.value}: attacks single clients, not --targets={AGGREGATE}')
  recorded = run_directory.read_config(run_dir)
  data = load_recorded(recorded['flags'], seed=recorded['flags']['seed'])
  if data.digest() != recorded['data_sha256']:
    raise UserError(f'--run_dir={run_dir}: the data are not those of the run any more')
  denoiser = shadow = None
  if _DENOISER_STEPS.value:
    denoiser = DenoiserSettings(
      steps=_DENOISER_STEPS.value, augmentations=tuple(_AUGMENT.value), seed=config.seed
    )
  if generator:
    shadow = AttackersShadow(
      load_generator(generator, tuple(data.image_shape)),
      *standardization(data.validation.float_images()),
      rounds=recorded['flags']['rounds'],
    )
  attacker = AdaptiveAttacker(
    data.validation,
    config,
    num_clients=_CALIBRATION_CLIENTS.value,
    denoiser=denoiser,
    shadow=shadow,
    watch=watch,
  )
  told = _told_maps(run_dir, observations[0], targets) if _KNOWS.value == 'regions' else None
  return lambda: attacker.attack(observations, targets, told)[-1]


def _told_maps(run_dir, observation, targets):
  path = run_dir / 'truth' / f'{round_directory_name(observation.round_num)}.safetensors'
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
