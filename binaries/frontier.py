"""Protection against utility of the defences: results/frontier.csv and docs/frontier.png.

Every row is a data set, a noise shape, its freshness, a strength, a seed, a normalisation and the
learning rate of the clients. A strength is the ratio of noise to update norm, or image_ratio:R, to
the norm of what one image adds to the update, or for correlated noise also scale:S, the linear part
of what noise of standard deviation S in the region of the images does, and images:S, that noise
itself. Baselines stand with their names in place of a shape, and their parameters in place of a
strength; what they draw is fresh in each round.

Utility: 9 clients, full local epochs of batches of 8, a model with the normalisation of --norm, of
BatchNorm the statistics kept by each client; F1 on test and on validation as the mean over the last
third of the rounds, and the rounds until the F1 of validation reaches 90 % of the undefended one of
that learning rate.
Protection: 16 clients that send one step on one image in round 1, attacked with the default
inversion; a single round, so freshness does not enter, and a model without normalisation.

Both parts are kept in --cache_dir as they come, so that an interrupted run continues. The table
holds the rows of which utility is there; protection is empty where it has not been computed. Parts
that it has already are not computed again.
"""

import dataclasses
import itertools
import math
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.scoring.metrics import measure
from attacks.threads import share_cores
from binaries import command, frontier_plot
from binaries.attacked_rounds import (
  UNDEFENDED,
  AttackedRounds,
  defense_of,
  fits,
  parse_baselines,
  parse_strength,
  shadow_noise,
  train,
)
from binaries.progress import Progress
from binaries.small_federation import (
  UTILITY_ROUNDS,
  UTILITY_TRAINING,
  UtilityF1,
  is_usual,
  num_last,
  small_model,
  utility_data,
)
from binaries.tables import RowCache, read_rows, write_table
from tff_shadow.aggregators import NOISE_SHAPES
from tff_shadow.data import EMBEDDED
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import TrainingSettings

_OUTPUT = flags.DEFINE_string('output', 'results/frontier.csv', 'Table to write.')
_PLOT = flags.DEFINE_string('plot', 'docs/frontier.png', 'Plot to write.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/frontier', 'Finished parts, to go on from.')
_PARTS = flags.DEFINE_list(
  'parts', ['utility', 'protection'], 'What to compute of what is missing: utility, protection.'
)
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_SHAPES = flags.DEFINE_list('shapes', list(NOISE_SHAPES), 'Noise shapes.')
_FRESHNESS = flags.DEFINE_list('freshness', ['frozen', 'fresh'], 'frozen, fresh.')
_STRENGTHS = flags.DEFINE_list(
  'strengths',
  ['0.1', '0.3', '1.0', '3.0', 'images:0.05', 'images:0.1'],
  'Noise over update norm, or image_ratio:R, over the norm of what one image adds; or scale:S, of'
  ' correlated noise in image units and of decoy noise in those of what one public image adds; or'
  ' images:S, of correlated noise in the images. With +floor:SHARE so much of the energy is'
  ' isotropic, whatever the shape.',
)
_BASELINES = flags.DEFINE_list(
  'baselines',
  [
    'percentile_gaussian/sigma0:0.1',
    'top_k/fraction:0.1',
    'quantization/bits:4',
  ],
  'NAME/PARAMETER:VALUE+..., their other parameters at their defaults; dp_sgd with --norm=group.'
  ' soteria/percentile:60, which takes a backward pass a feature a step, takes hours a seed.',
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Number of seeds.', lower_bound=1)

# Without any, the rate of `UTILITY_TRAINING` makes the training diverge.
_NORM = flags.DEFINE_enum(
  'norm',
  'batch',
  ['batch', 'group'],
  'Normalisation of the model that tells utility; group takes twice the time of a step.',
)
_LEARNING_RATES = flags.DEFINE_list(
  'learning_rates', [str(UTILITY_TRAINING.learning_rate)], 'Of the clients that tell utility.'
)

_BATCH_NORM_SHARING = 'local'
_KEY = ('dataset', 'seed', 'shape', 'strength')
_UTILITY_KEY = (*_KEY, 'freshness', 'norm', 'learning_rate')
_UTILITY_COLUMNS = (*_UTILITY_KEY, 'f1', 'validation_f1')
_PROTECTION_COLUMNS = (*_KEY, 'image', 'psnr', 'region_psnr')
_COLUMNS = (
  'dataset',
  'shape',
  'freshness',
  'strength',
  'seed',
  'norm',
  'learning_rate',
  'f1',
  'f1_undefended',
  'validation_f1',
  'validation_f1_undefended',
  'rounds_to_90',
  'psnr',
  'region_psnr',
  'psnr_undefended',
  'region_psnr_undefended',
  'images',
)


def main() -> None:
  """Computes what is missing and writes the table and the plot."""
  _check_flags()
  share_cores(AttackConfig().lanes)
  cache = pathlib.Path(_CACHE_DIR.value)
  utility = RowCache(cache / 'utility.csv', _UTILITY_COLUMNS)
  protection = RowCache(cache / 'protection.csv', _PROTECTION_COLUMNS)
  table = read_rows(pathlib.Path(_OUTPUT.value))
  if _PARTS.value:
    with local_worker_context():
      if 'utility' in _PARTS.value:
        _compute_utility(utility, table)
      if 'protection' in _PARTS.value:
        _compute_protection(protection, table)
  rows = _join(table, utility.rows, protection.rows)
  if not rows:
    print('no row has its utility yet')
    return
  write_table(pathlib.Path(_OUTPUT.value), _COLUMNS, rows)
  frontier_plot.write(pathlib.Path(_PLOT.value), [row for row in rows if is_usual(row)])
  print(f'{len(rows)} rows in {_OUTPUT.value}, plot in {_PLOT.value}')


def _compute_utility(cache: RowCache, table: Sequence[dict]) -> None:
  cells = []
  for seed, dataset, rate in itertools.product(
    range(_SEEDS.value), _DATASETS.value, _LEARNING_RATES.value
  ):
    training = (_NORM.value, str(float(rate)))
    cells.append((dataset, str(seed), *UNDEFENDED, 'frozen', *training))
    cells += [
      (dataset, str(seed), shape, strength, freshness, *training)
      for (shape, strength), freshness in itertools.product(_noises(), _FRESHNESS.value)
    ]
    cells += [(dataset, str(seed), *baseline, 'fresh', *training) for baseline in _baselines()]
  done = cache.done(_UTILITY_KEY) | {_named(row, _UTILITY_KEY) for row in table}
  with Progress('utility', len(cells), 'cells') as progress:
    for count, cell in enumerate(cells):
      if cell not in done:
        dataset, seed, shape, strength, freshness, norm, rate = cell
        f1, curve = _utility(
          dataset, int(seed), norm, float(rate), defense_of(shape, strength), freshness == 'frozen'
        )
        row = dict(zip(_UTILITY_KEY, cell, strict=True))
        curve = ' '.join(f'{value:.4f}' for value in curve)
        cache.add([row | {'f1': f'{f1:.4f}', 'validation_f1': curve}])
      progress.update(count + 1, ' '.join(cell))


def _compute_protection(cache: RowCache, table: Sequence[dict]) -> None:
  cells = list(itertools.product(_DATASETS.value, range(_SEEDS.value)))
  done = cache.done(_KEY) | {_named(row, _KEY) for row in table if row['psnr']}
  with Progress('protection', len(cells), 'cells') as progress:
    for count, (dataset, seed) in enumerate(cells):
      wanted = [UNDEFENDED, *_noises(), *_baselines()]
      missing = [key for key in wanted if (dataset, str(seed), *key) not in done]
      if missing:
        for key, values in _protection(dataset, seed, missing):
          base = dict(zip(_KEY, (dataset, seed, *key), strict=True))
          cache.add(
            [
              base | {'image': i, 'psnr': f'{psnr:.4f}', 'region_psnr': f'{region_psnr:.4f}'}
              for i, (psnr, region_psnr) in enumerate(values)
            ]
          )
      progress.update(count + 1, f'{dataset} {seed}')


def _noises() -> list[tuple[str, str]]:
  """Pairs (shape, strength); the scale of the other shapes is in other units."""
  pairs = itertools.product(_SHAPES.value, _STRENGTHS.value)
  return [(a, b) for a, b in pairs if fits(a, b)]


def _baselines() -> list[tuple[str, str]]:
  return parse_baselines('baselines', _BASELINES.value)


def _utility(dataset, seed, norm, learning_rate, defense, frozen) -> tuple[float, list[float]]:
  """Test F1, mean over the last rounds, and validation F1 after each round."""
  data = utility_data(dataset, seed)
  model = small_model(data, seed, norm)
  rounds = UTILITY_ROUNDS[dataset]
  training = dataclasses.replace(UTILITY_TRAINING, learning_rate=learning_rate)
  settings = TrainingSettings(
    rounds, training, observed_rounds=(), seed=seed, batch_norm_sharing=_BATCH_NORM_SHARING
  )
  f1 = UtilityF1(data, model, settings)
  with tempfile.TemporaryDirectory() as name:
    train(data, model, settings, defense, pathlib.Path(name), frozen=frozen, report=f1)
  return f1.test, f1.validation


def _protection(dataset, seed, keys):
  """Yields each (shape, strength) with PSNR and region PSNR in dB of the attack on every image."""
  rounds = AttackedRounds(dataset, seed)
  for key in keys:
    values = []
    for result in attack_observation(rounds.observation(*key), AttackConfig(seed=seed)):
      if result.status != 'ok':
        raise RuntimeError(f'{dataset}, {key[0]}: attack on {result.target}: {result.reason}')
      own = rounds.truth[result.target]
      quality = measure(result.reconstructions['attack'][0], own.images[0], own.regions[0])
      values.append((quality.psnr, quality.region_psnr))
    yield key, values


class _Utility(NamedTuple):
  """F1 on test, on validation as the mean over the last rounds and, if known, after each round."""

  f1: str
  validation_f1: str
  curve: tuple[float, ...]
  rounds_to_90: str


class _Protection(NamedTuple):
  """Means over the images; empty where nothing was attacked."""

  psnr: str = ''
  region_psnr: str = ''
  images: str = ''


def _join(
  table: Sequence[dict], utility: Sequence[dict], protection: Sequence[dict]
) -> list[dict[str, str]]:
  """The rows of the table: those it had, and those of which the caches have the utility."""
  trained = {
    _named(row, _UTILITY_KEY): _Utility(row['f1'], row['validation_f1'], (), row['rounds_to_90'])
    for row in table
  }
  trained |= {_named(row, _UTILITY_KEY): _trained(row) for row in utility}
  attacked = {
    _named(row, _KEY): _Protection(row['psnr'], row['region_psnr'], row['images']) for row in table
  }
  attacked |= _attacked(protection)
  return list(_rows(trained, attacked))


def _named(row: dict, columns: Sequence[str]) -> tuple[str, ...]:
  return tuple(row[name] for name in columns)


def _trained(row: dict) -> _Utility:
  curve = tuple(float(value) for value in row['validation_f1'].split())
  return _Utility(row['f1'], f'{np.mean(curve[-num_last(len(curve)) :]):.4f}', curve, '')


def _attacked(protection: Sequence[dict]) -> dict[tuple[str, ...], _Protection]:
  measured: dict = {}
  for row in protection:
    values = (float(row['psnr']), float(row['region_psnr']))
    measured.setdefault(_named(row, _KEY), []).append(values)
  return {
    key: _Protection(*(f'{value:.2f}' for value in np.mean(values, axis=0)), str(len(values)))
    for key, values in measured.items()
  }


def _rows(trained: dict, attacked: dict) -> Iterator[dict[str, str]]:
  for (dataset, seed, shape, strength, freshness, *training), own in trained.items():
    clean = trained.get((dataset, seed, *UNDEFENDED, 'frozen', *training))
    if clean is None:
      continue
    keys = [(dataset, seed, shape, strength), (dataset, seed, *UNDEFENDED)]
    if all(key in attacked for key in keys):
      reconstructed, clean_reconstructed = (attacked[key] for key in keys)
    else:
      reconstructed = clean_reconstructed = _Protection()
    rounds_to_90 = own.rounds_to_90
    if own.curve:
      enough = 0.9 * float(clean.validation_f1)
      reached = [index + 1 for index, value in enumerate(own.curve) if value >= enough]
      rounds_to_90 = str(reached[0]) if reached else ''
    values = (dataset, shape, freshness, strength, seed, *training, own.f1, clean.f1)
    values += (own.validation_f1, clean.validation_f1, rounds_to_90)
    values += (*reconstructed[:2], *clean_reconstructed[:2], reconstructed.images)
    yield dict(zip(_COLUMNS, values, strict=True))


def _check_flags() -> None:
  for name, parameter in _baselines():
    if name == 'dp_sgd' and _NORM.value == 'batch':
      raise UserError(
        f'--baselines={name}/{parameter}: the model has BatchNorm, which mixes the examples that'
        ' dp_sgd clips one by one; use --norm=group'
      )
  for name, given, allowed in (
    ('datasets', _DATASETS.value, EMBEDDED),
    ('shapes', _SHAPES.value, NOISE_SHAPES),
    ('freshness', _FRESHNESS.value, ('frozen', 'fresh')),
    ('parts', _PARTS.value, ('utility', 'protection')),
  ):
    command.check_choices(name, given, allowed)
  for value in _LEARNING_RATES.value:
    try:
      is_rate = 0 < float(value) < math.inf
    except ValueError:
      is_rate = False
    if not is_rate:
      raise UserError(f'--learning_rates={value}: use positive numbers')
  for value in _STRENGTHS.value:
    try:
      parse_strength(value)
      for shape in (own for own in _SHAPES.value if fits(own, value)):
        shadow_noise(shape, value)
    except ValueError as error:
      raise UserError(f'--strengths={value}: {error}') from error


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
