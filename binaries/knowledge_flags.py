"""The flags of an attacker who knows the defence, apart from the attack, which needs TFF."""

import dataclasses

from absl import flags

from binaries import command
from tff_shadow.errors import UserError
from tff_shadow.shadow.augmentation import AUGMENTATIONS

_KNOWS = flags.DEFINE_enum(
  'knows',
  'nothing',
  ['nothing', 'defense', 'regions'],
  'Of the defence. defense: all its settings, but not its keys; it is played on public images (the'
  ' validation split of the run), and matching, smoothness, denoising and what is learned from'
  ' updates are chosen there. regions: besides, the region maps of the clients, which are read from'
  ' the truth file.',
)
_CALIBRATION_CLIENTS = flags.DEFINE_integer(
  'calibration_clients', 8, 'Clients of public images that it plays.', lower_bound=1
)
_DENOISER_STEPS = flags.DEFINE_integer(
  'denoiser_steps', 600, "Of its denoiser's training; 0 for no denoiser.", lower_bound=0
)
_INVERSION_CLIENTS = flags.DEFINE_integer(
  'inversion_clients',
  2000,
  'Clients that it simulates to learn the way back from updates; 0 for none.',
  lower_bound=0,
)
_AUGMENT = flags.DEFINE_list(
  'augment',
  ['shifts', 'brightness'],
  'What leaves an image of this kind one, for what it learns: ' + ', '.join(AUGMENTATIONS) + '.',
)


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """What the attacker has of the defence.

  Attributes:
    regions: Whether it is told the region maps of the clients.
    calibration_clients: Clients of public images that it plays.
    denoiser_steps: Of its denoiser's training; 0 for none.
    inversion_clients: That it simulates to learn the way back from updates; 0 for none.
    augmentations: For what it learns.
  """

  regions: bool
  calibration_clients: int
  denoiser_steps: int
  inversion_clients: int
  augmentations: tuple[str, ...]


def augmentations() -> tuple[str, ...]:
  """What leaves an image of the modality one.

  Raises:
    UserError: For one that there is not.
  """
  command.check_choices('augment', _AUGMENT.value, AUGMENTATIONS)
  return tuple(_AUGMENT.value)


def knowledge(*, fits_prior: bool = False) -> Knowledge | None:
  """What the flags say; None for an attacker who knows nothing of the defence.

  Args:
    fits_prior: Whether the attack has a prior that is fitted to variations of public images.

  Raises:
    UserError: For a flag without a use, or a wrong value.
  """
  if _KNOWS.value != 'nothing':
    return Knowledge(
      _KNOWS.value == 'regions',
      _CALIBRATION_CLIENTS.value,
      _DENOISER_STEPS.value,
      _INVERSION_CLIENTS.value,
      augmentations(),
    )
  for flag in (_CALIBRATION_CLIENTS, _DENOISER_STEPS, _INVERSION_CLIENTS):
    if flag.present:
      raise UserError(f'--{flag.name}: needs --knows=defense or --knows=regions')
  if _AUGMENT.present and not fits_prior:
    raise UserError(f'--{_AUGMENT.name}: needs --knows=defense, --knows=regions or --public_prior')
  return None
