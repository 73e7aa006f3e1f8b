"""The flags of --defense=published: one for every constant of the method."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from tff_shadow.data import FederatedData
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator
from tff_shadow.published import (
  EQUALIZATIONS,
  MAP_KINDS,
  PublishedDefense,
  PublishedSettings,
  standardization,
)
from tff_shadow.shadow.latents import LatentFit

_PREFIX = 'published_'

_GENERATOR = flags.DEFINE_string(
  'published_generator',
  None,
  'The shadow as pretrained: a .keras file, latent -> image in [0, 1]'
  ' (tff-shadow-train-shadow makes one).',
)
_KNOWN_LATENTS = flags.DEFINE_string(
  'published_latents',
  None,
  'client_state/ of another run with the same generator: its latents are used for the same images,'
  ' the others are fitted.',
)

_PLAIN: dict[str, tuple[Callable[..., Any], str]] = {
  'update_shadow': (flags.DEFINE_bool, 'Update the shadow at all (step 3).'),
  'shadow_rounds': (flags.DEFINE_integer, 'Rounds in which shadow and maps are updated.'),
  'shadow_steps': (flags.DEFINE_integer, 'Steps on the shadow per batch.'),
  'shadow_learning_rate': (
    flags.DEFINE_float,
    'Of these; by default 1e-4 at batch size 1, 1e-3 up to 4, 2e-3 above.',
  ),
  'gradient_weight': (flags.DEFINE_float, 'Of matching the gradient.'),
  'batch_norm_weight': (flags.DEFINE_float, 'Of matching BatchNorm statistics.'),
  'total_variation_weight': (flags.DEFINE_float, 'Of total variation.'),
  'norm_weight': (flags.DEFINE_float, "Of the reconstruction's norm."),
  'reconstruction_weight': (flags.DEFINE_float, 'Of the squared error.'),
  'shadow_average': (flags.DEFINE_float, 'Share of the updated shadow that is kept.'),
  'temperature': (flags.DEFINE_float, 'Of all softmaxes (steps 4 and 6).'),
  'map_momentum': (flags.DEFINE_float, 'Share of the old map (step 5).'),
  'subtract_cam': (flags.DEFINE_bool, 'Subtract Grad-CAM++ (step 6).'),
  'cam_class': (flags.DEFINE_integer, 'Class that Grad-CAM++ explains.'),
  'cam_top_fraction': (flags.DEFINE_float, 'Of its pixels that are kept.'),
  'amplitude': (
    flags.DEFINE_float,
    "Of the first round's noise, over the image's maximum (step 7).",
  ),
}
_LATENTS: dict[str, tuple[Callable[..., Any], str]] = {
  'learning_rate': (flags.DEFINE_float, 'Of fitting a latent (step 1).'),
  'weight_decay': (flags.DEFINE_float, 'Of fitting a latent.'),
  'steps': (flags.DEFINE_integer, 'Most steps of fitting a latent.'),
  'patience': (flags.DEFINE_integer, 'So many rising steps in a row end the fit.'),
  'patience_after': (flags.DEFINE_integer, 'The first step at which they can.'),
}


def _define(table, prefix, default):
  return {
    name: define(f'{prefix}{name}', getattr(default, name), text)
    for name, (define, text) in table.items()
  }


_DEFAULT = PublishedSettings()
_PLAIN_FLAGS = _define(_PLAIN, _PREFIX, _DEFAULT)
_LATENT_FLAGS = _define(_LATENTS, f'{_PREFIX}latent_', _DEFAULT.latents)
_EQUALIZATION = flags.DEFINE_enum(
  'published_equalization',
  _DEFAULT.equalization,
  EQUALIZATIONS,
  "Of the map (step 4): as the paper says, as its authors' code does (pixels end up elsewhere), or"
  ' none.',
)
_MAP_KIND = flags.DEFINE_enum(
  'published_map_kind',
  _DEFAULT.map_kind,
  MAP_KINDS,
  'exposure, or white: independent noise of the same energy in every pixel.',
)
_CAM_WEIGHTS = flags.DEFINE_list(
  'published_cam_weights',
  [str(weight) for weight in _DEFAULT.cam_weights],
  'Lowest and highest alpha (step 6).',
)


def published_settings() -> PublishedSettings:
  """The constants that the flags say.

  Raises:
    UserError: Names the flag that is out of range.
  """
  try:
    low, high = map(float, _CAM_WEIGHTS.value)
  except ValueError as error:
    raise UserError(
      f'--published_cam_weights={",".join(_CAM_WEIGHTS.value)}: must be two numbers'
    ) from error
  try:
    latents = LatentFit(**{name: flag.value for name, flag in _LATENT_FLAGS.items()})
  except ValueError as error:
    raise UserError(f'--{_PREFIX}latent_{error}') from error
  plain = {name: flag.value for name, flag in _PLAIN_FLAGS.items()}
  try:
    return PublishedSettings(
      **plain,
      latents=latents,
      equalization=_EQUALIZATION.value,
      map_kind=_MAP_KIND.value,
      cam_weights=(low, high),
    )
  except ValueError as error:
    raise UserError(f'--{_PREFIX}{error}') from error


def check_generator() -> None:
  """Raises `UserError` unless a generator is named; before minutes of other work."""
  if not _GENERATOR.value:
    raise UserError(
      '--published_generator is required for the published defence: a .keras file of'
      ' tff-shadow-train-shadow, or your own'
    )


def published_defense(
  settings: PublishedSettings,
  data: FederatedData,
  *,
  seed: int,
  secrets: dict[str, bytes] | None = None,
) -> PublishedDefense:
  """The defence that the flags say.

  Args:
    settings: `published_settings()`, or an ablation of it.
    data: Its validation split gives the public mean and standard deviation of pixels.
    seed: Decides the start of the latents.
    secrets: Each client's, for the ablation 'white'.

  Raises:
    UserError: If the generator is missing or does not fit the data.
  """
  check_generator()
  known = pathlib.Path(_KNOWN_LATENTS.value) if _KNOWN_LATENTS.value else None
  if known is not None and not (known / 'latents').is_dir():
    raise UserError(f'--published_latents={known}: has no folder latents/')
  generator = load_generator(
    _GENERATOR.value, tuple(data.image_shape), flag='--published_generator'
  )
  mean, std = standardization(data.validation.float_images())
  return PublishedDefense(
    settings, generator, mean, std, seed=seed, secrets=secrets, known_latents=known
  )


def _check_complete() -> None:
  fields = {field.name for field in dataclasses.fields(PublishedSettings)}
  covered = {*_PLAIN, 'latents', 'equalization', 'map_kind', 'cam_weights'}
  if fields != covered or {f.name for f in dataclasses.fields(LatentFit)} != set(_LATENTS):
    raise AssertionError('a constant of the published defence has no flag')


_check_complete()
