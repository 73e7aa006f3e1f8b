"""The flags that say how an attack works: a preset, and what differs from it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from attacks.config import COMBINATIONS, SIMULATIONS, AttackConfig
from attacks.generators import DeepImagePrior
from attacks.initialization import STARTS
from attacks.labels import LABEL_RULES
from attacks.matching import MATCHINGS, NoMatching
from attacks.optimizers import OPTIMIZERS, SCHEDULES
from attacks.parametrizations import PARAMETRIZATIONS
from attacks.presets import PRESETS
from attacks.priors import VARIATION_COLORS, VARIATION_KINDS, GaussianImages
from attacks.rectifiers import RECTIFIERS
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator

_DEEP = 'deep_image_prior'

_PRESET = flags.DEFINE_enum(
  'preset', 'best', sorted(PRESETS), 'A published attack, or best; other flags change parts of it.'
)
_GENERATOR = flags.DEFINE_string(
  'generator', None, 'A .keras file, latent to image: searches its latents and weights.'
)
_DEPTH = flags.DEFINE_list(
  'depth', None, 'Two shares of the depth, such as 0,0.5: only layers between them are matched.'
)
_PUBLIC_PRIOR = flags.DEFINE_float(
  'public_prior',
  None,
  'Weight of a Gaussian prior fitted to public images, the validation split of the run, times the'
  ' number of values of an image; 0 does without. By default that of --preset.',
  lower_bound=0,
)

# Flag: (field of AttackConfig, field of that, definition, what it says).
_FIELDS: dict[str, tuple[str, str | None, Callable[..., Any], str]] = {
  'iterations': ('iterations', None, flags.DEFINE_integer, 'Optimiser steps per restart.'),
  'restarts': ('restarts', None, flags.DEFINE_integer, 'Starts per target.'),
  'orders': (
    'orders',
    None,
    flags.DEFINE_integer,
    'Several steps on parts of the images: orders of them that are tried.',
  ),
  'order_iterations': (
    'order_iterations',
    None,
    flags.DEFINE_integer,
    'Iterations under each order that is tried.',
  ),
  'lanes': ('lanes', None, flags.DEFINE_integer, 'Restarts and targets run side by side.'),
  'balance': (
    'matching',
    'balance',
    flags.DEFINE_float,
    'Layers are divided by the norm of their gradient to this power, in [0, 1].',
  ),
  'depth_slope': (
    'matching',
    'depth_slope',
    flags.DEFINE_float,
    'Weights of layers rise (above 0) or fall with the depth.',
  ),
  'tv_weight': ('total_variation', 'weight', flags.DEFINE_float, 'Of total variation at first.'),
  'tv_decay': ('total_variation', 'decay', flags.DEFINE_float, 'Factor of it by the end.'),
  'norm_weight': ('image_norm', 'weight', flags.DEFINE_float, 'Of the mean squared pixel.'),
  'group_weight': (
    'group_consistency',
    'weight',
    flags.DEFINE_float,
    'Of the distance to the mean over the restarts of a target.',
  ),
  'group_start': (
    'group_consistency',
    'start',
    flags.DEFINE_float,
    'Share of the iterations after which it sets in.',
  ),
  'bn_weight': (
    'batch_norm_statistics',
    'weight',
    flags.DEFINE_float,
    'Of the distance to the BatchNorm statistics that the client shared; 0 does without.',
  ),
  'learning_rate': (
    'optimizer',
    'learning_rate',
    flags.DEFINE_float,
    "Adam's, before the schedule.",
  ),
  'hold_contrast': (
    'hold_contrast',
    None,
    flags.DEFINE_bool,
    "Where the update does not show the contrast: the public mean image's.",
  ),
  'signed': ('optimizer', 'signed', flags.DEFINE_bool, "Only the gradient's sign is used."),
  'warm_up': ('schedule', 'warm_up', flags.DEFINE_integer, 'Iterations of linear warm-up.'),
  'langevin': ('langevin', None, flags.DEFINE_float, 'Noise added to every step.'),
  'start_bandwidth': (
    'parametrization',
    'start_bandwidth',
    flags.DEFINE_float,
    'With --parametrization=spectral: share of the frequencies that move at first.',
  ),
  'joint_labels': ('joint_labels', None, flags.DEFINE_bool, 'Optimises labels with the images.'),
  'seed': ('seed', None, flags.DEFINE_integer, 'Decides all start images.'),
}
_ENUMS: dict[str, tuple[str, str | None, Any, str]] = {
  'tv_kind': ('total_variation', 'kind', VARIATION_KINDS, 'See attacks/priors.py.'),
  'tv_color': ('total_variation', 'color', VARIATION_COLORS, 'Channels apart or together.'),
  'simulation': (
    'simulation',
    None,
    SIMULATIONS,
    'Several local steps: one after another, or one gradient between old and new weights.',
  ),
  'combination': (
    'combination',
    None,
    COMBINATIONS,
    'Of the restarts: the one of least loss, or their mean once their images are aligned.',
  ),
  'label_rule': ('label_rule', None, LABEL_RULES, 'How labels are inferred.'),
  'xla': ('xla', None, ('auto', 'on', 'off'), 'Compile steps; auto measures.'),
  'dtype': ('dtype', None, ('float32', 'float64'), 'Precision of the attack.'),
}
# Flag: (field, classes by name, what it says). The class's defaults, but for the fields that the
# preset's own class shares with it.
_CLASSES: dict[str, tuple[str, dict[str, Any], str]] = {
  'matching': (
    'matching',
    {**MATCHINGS, 'none': NoMatching},
    'How updates are compared; none for BatchNorm statistics and priors alone.',
  ),
  'parametrization': (
    'parametrization',
    {**PARAMETRIZATIONS, _DEEP: DeepImagePrior},
    'What the optimiser moves: pixels, damped frequencies or the weights of a network.',
  ),
  'rectifier': ('rectifier', RECTIFIERS, 'How the switching of ReLUs is differentiated.'),
  'optimizer': ('optimizer', OPTIMIZERS, 'What moves them.'),
  'schedule': ('schedule', SCHEDULES, 'Of the learning rate.'),
  'init': ('start', STARTS, 'Start images.'),
}
_VALUES = {
  name: define(name, None, f'{text} By default that of --preset.')
  for name, (_, _, define, text) in _FIELDS.items()
}
_VALUES |= {
  name: flags.DEFINE_enum(name, None, list(values), f'{text} By default that of --preset.')
  for name, (_, _, values, text) in _ENUMS.items()
}
_VALUES |= {
  name: flags.DEFINE_enum(name, None, sorted(classes), f'{text} By default that of --preset.')
  for name, (_, classes, text) in _CLASSES.items()
}


def public_prior() -> float:
  """Weight of the prior of public images, times the number of values of an image; 0 for none."""
  if _PUBLIC_PRIOR.value is None:
    return PRESETS[_PRESET.value].public_prior
  return _PUBLIC_PRIOR.value


def attack_config(
  image_shape: tuple[int, int, int], prior: GaussianImages | None = None
) -> AttackConfig:
  """The settings that the flags ask for.

  Args:
    image_shape: Of the images sought.
    prior: Of public images, where `public_prior` asks for one.

  Raises:
    UserError: For a value that does not fit, or a flag that the chosen pieces have no use for.
  """
  preset = PRESETS[_PRESET.value]
  if preset.needs_generator and _GENERATOR.value is None:
    raise UserError(f'--preset={_PRESET.value}: needs --generator')
  config = dataclasses.replace(preset.build(), gaussian_images=prior)
  for name, (field, classes, _) in _CLASSES.items():
    if _VALUES[name].value is not None:
      config = _replaced(config, name, field, None, _made(config, field, classes, name))
  if isinstance(config.parametrization, DeepImagePrior):
    config = dataclasses.replace(
      config, parametrization=dataclasses.replace(config.parametrization, seed=seed())
    )
  if _GENERATOR.value is not None:
    generator = load_generator(_GENERATOR.value, image_shape)
    config = dataclasses.replace(
      config, parametrization=preset.search_in(generator, _GENERATOR.value, seed())
    )
  for name, (field, inner, *_) in (_FIELDS | _ENUMS).items():
    if _VALUES[name].value is not None:
      config = _replaced(config, name, field, inner, _VALUES[name].value)
  if _VALUES['bn_weight'].value:
    # Who asks for the statistics is told if there are none.
    config = _replaced(config, 'bn_weight', 'batch_norm_statistics', 'required', True)
  if _DEPTH.value is not None:
    try:
      depth = tuple(float(value) for value in _DEPTH.value)
    except ValueError as error:
      raise UserError(f'--depth={",".join(_DEPTH.value)}: must be two numbers') from error
    config = _replaced(config, 'depth', 'matching', 'depth', depth)
  return config


def seed() -> int:
  """Decides all start images."""
  own = _VALUES['seed'].value
  return PRESETS[_PRESET.value].build().seed if own is None else own


def generator_path() -> str | None:
  """The file that --generator names."""
  return _GENERATOR.value


def description() -> str:
  """What the chosen preset is."""
  return f'{_PRESET.value}: {PRESETS[_PRESET.value].source}'


def _made(config: AttackConfig, field: str, classes: dict[str, Any], name: str) -> Any:
  """The chosen class with the fields that it shares with what it replaces."""
  chosen = classes[_VALUES[name].value]
  old = getattr(config, field)
  if isinstance(old, chosen):
    return old
  shared = {f.name for f in dataclasses.fields(chosen) if f.init}
  kept = {f.name for f in dataclasses.fields(old) if f.init} & shared
  return chosen(**{key: getattr(old, key) for key in kept if name in ('matching', 'schedule')})


def _replaced(
  config: AttackConfig, name: str, field: str, inner: str | None, value: Any
) -> AttackConfig:
  shown = value
  try:
    if inner is not None:
      part = getattr(config, field)
      if inner not in {f.name for f in dataclasses.fields(part)}:
        raise UserError(f'--{name}: {part.name} has no use for it')
      value = dataclasses.replace(part, **{inner: value})
    return dataclasses.replace(config, **{field: value})
  except ValueError as error:
    raise UserError(f'--{name}={shown}: {error}') from error
