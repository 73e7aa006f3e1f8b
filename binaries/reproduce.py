"""Runs the published experiment on shadow defence as one command.

Trains under each defence, attacks the published rounds with the published attacks, as their code
computes them and with a matching loss that is differentiated, and with our own beside them, and
scores all strictly and as the publication does (lenient). See binaries/published_protocol.py for
what it is, and results.csv and utility.csv in --output_dir for what came out. Each part is kept
there, so that an interrupted experiment goes on.
"""

import dataclasses
import functools
import logging
import pathlib
import sys

import tensorflow_federated as tff
from absl import flags

from attacks.presets import PRESETS
from binaries import command, published_flags, reproduction, reproduction_table, run_directory
from binaries.published_protocol import ATTACKS, DEFENSES, Plan
from tff_shadow.data import EMBEDDED, PUBLISHED_SETS
from tff_shadow.errors import UserError
from tff_shadow.models import MODELS

_DATASET = flags.DEFINE_enum(
  'dataset',
  'chestxray',
  [*PUBLISHED_SETS, *EMBEDDED],
  'A published set, with --data_dir, or an embedded one.',
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, "Folder of a published set: its images and the authors' three manifests."
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir',
  None,
  'Where everything goes, and an interrupted experiment goes on; by default'
  ' runs/reproduce/DATASET.',
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', None, 'Side of the images; by default 224, for embedded sets 32.', lower_bound=16
)
_MODEL = flags.DEFINE_enum('model', 'resnet18', sorted(MODELS), 'A built-in model.')
_SCALE = flags.DEFINE_float(
  'scale',
  1.0,
  'In (0, 1]: shrinks client sizes, held-out images, rounds and attack iterations alike.',
)
_DEFENSES = flags.DEFINE_list('defenses', list(DEFENSES), f'Some of {", ".join(DEFENSES)}.')
_ATTACKS = flags.DEFINE_list(
  'attacks',
  None,
  f'Some of {", ".join(ATTACKS)}; by default those for which there is all they need.',
)
_GENERATOR = flags.DEFINE_string(
  'generator', None, 'A .keras file, latent to image, for the attacks through a generator.'
)
_MAX_ITERATIONS = flags.DEFINE_integer(
  'max_iterations',
  None,
  'At most so many in any attack; at --scale=1 the published ones have 40,000 and 10,000.',
  lower_bound=1,
)
_EXACT_STEPS = flags.DEFINE_integer(
  'exact_steps',
  2,
  'Our own attack simulates exactly what clients of at most so many local steps did.',
  lower_bound=1,
)
_LPIPS_WEIGHTS = flags.DEFINE_string(
  'lpips_weights', None, 'Safetensors file with the weights of LPIPS; without it, no LPIPS.'
)
_LPIPS_NET = flags.DEFINE_enum('lpips_net', 'alex', ['alex', 'vgg'], 'Network of these weights.')
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Decides partition, model, batches and starts.', lower_bound=0
)

# These may change between the parts of an experiment: they add to it.
_MAY_CHANGE = frozenset(
  {'data_dir', 'output_dir', 'defenses', 'attacks', 'lpips_weights', 'lpips_net'}
)


def main() -> None:
  """Runs what is missing and prints the tables."""
  plan = _plan()
  command.check_choices('defenses', _DEFENSES.value, DEFENSES)
  if not _DEFENSES.value:
    raise UserError(f'--defenses: name at least one of {", ".join(DEFENSES)}')
  perceptual = None
  if _LPIPS_WEIGHTS.value is not None:
    from attacks.scoring.lpips import load_lpips

    perceptual = load_lpips(_LPIPS_WEIGHTS.value, _LPIPS_NET.value)
    perceptual.check_shape((plan.image_size, plan.image_size, 3))
  output_dir = pathlib.Path(_OUTPUT_DIR.value or f'runs/reproduce/{plan.dataset}')
  logging.getLogger('tensorflow').setLevel(logging.ERROR)
  config = {
    'program': 'reproduce',
    'flags': {
      **command.flag_values(sys.modules[__name__]),
      **command.flag_values(published_flags),
    },
  }
  started = (output_dir / 'config.json').exists()
  run_directory.claim(output_dir, config, resume=started, may_change=_MAY_CHANGE)
  rows, utility = reproduction.run(plan, _DEFENSES.value, output_dir, perceptual)
  print(reproduction_table.printed(rows))
  for row in utility:
    figures = '  '.join(f'{key} {value:.4f}' for key, value in row.items() if _is_number(value))
    print(f'{row["defense"]}: test  {figures}')
  print(f'tables in {output_dir / "results.csv"} and {output_dir / "utility.csv"}')


def _plan() -> Plan:
  attacks = _ATTACKS.value
  if attacks is None:
    attacks = [name for name in ATTACKS if _GENERATOR.value or not PRESETS[name].needs_generator]
  plan = Plan(
    dataset=_DATASET.value,
    data_dir=_DATA_DIR.value,
    image_size=_IMAGE_SIZE.value or (32 if _DATASET.value in EMBEDDED else 224),
    model=_MODEL.value,
    scale=_SCALE.value,
    seed=_SEED.value,
    attacks=tuple(attacks),
    generator=_GENERATOR.value,
    max_iterations=_MAX_ITERATIONS.value,
    exact_steps=_EXACT_STEPS.value,
  )
  if 'published' not in _DEFENSES.value:
    return plan
  settings = published_flags.published_settings()
  published_flags.check_generator()
  make = functools.partial(published_flags.published_defense, settings, seed=_SEED.value)
  return dataclasses.replace(plan, published=make)


def _is_number(value: object) -> bool:
  return isinstance(value, float)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
