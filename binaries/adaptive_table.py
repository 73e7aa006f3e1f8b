"""What attackers that know the defence make of it, shadow noise or baseline: results/adaptive.csv.

One round as in the frontier: 16 clients that send one step on one image. 'best' knows of no
defence. 'calibrated' simulates the defence on public images (half of the validation split), chooses
there how to match, how smooth to be and how much to denoise, by a network trained on the other half
to take out region noise, and how much to trust another that has learned there to give images back
from updates, and then attacks; with the clients' region maps given, or not. The truth
of the attacked clients decides nothing. The change of region PSNR is against the undefended round
under the same attack, paired by image, with its 95 % interval.

Rows are kept in --cache_dir as they come, so that an interrupted run continues.
"""

import pathlib

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.adaptive.attacker import AdaptiveAttacker, Effort
from attacks.adaptive.simulated_defense import region_map_of
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.results import TargetResult
from attacks.scoring.metrics import measure
from attacks.scoring.statistics import mean_interval
from attacks.shared_solvers import SharedSolvers
from attacks.threads import share_cores
from binaries import command
from binaries.attacked_rounds import UNDEFENDED, AttackedRounds, missing_cells, parse_defense
from binaries.small_federation import variations
from binaries.tables import RowCache, write_table
from tff_shadow.data import EMBEDDED, Examples

_OUTPUT = flags.DEFINE_string('output', 'results/adaptive.csv', 'Table to write.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/adaptive', 'Finished rows, to go on from.')
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_DEFENSES = flags.DEFINE_list(
  'defenses',
  [
    *('isotropic/0.3', 'isotropic/1.0', 'diagonal/0.3', 'diagonal/1.0'),
    *('correlated/0.3', 'correlated/1.0', 'correlated/images:0.05', 'correlated/images:0.1'),
  ],
  'SHAPE/STRENGTH, strengths as of the frontier, or NAME/PARAMETER:VALUE of a baseline, as in'
  ' top_k/fraction:0.1, its other parameters at their defaults; the undefended round is always'
  ' attacked too.',
)
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Number of seeds.', lower_bound=1)
_ITERATIONS = flags.DEFINE_integer('iterations', 500, 'Of an inversion.', lower_bound=1)
_CALIBRATION_CLIENTS = flags.DEFINE_integer(
  'calibration_clients', 12, 'Clients that the attacker plays itself.', lower_bound=2
)
_DENOISER_STEPS = flags.DEFINE_integer(
  'denoiser_steps', 1500, "Of the denoiser's training; 0 for no denoiser.", lower_bound=0
)

_INVERSION_CLIENTS = flags.DEFINE_integer(
  'inversion_clients',
  3000,
  'Clients simulated to learn the way back from updates; 0 for none.',
  lower_bound=0,
)

_BEST, _CALIBRATED = 'best', 'calibrated'
_METRICS = ('psnr', 'ssim', 'region_psnr', 'region_ssim')
_KEY = ('dataset', 'seed', 'shape', 'strength')
_CELL = (*_KEY, 'attack', 'knows_region')
_CACHE_COLUMNS = (*_CELL, 'chosen', 'image', *_METRICS)
_GROUP = ('dataset', 'shape', 'strength', 'attack', 'knows_region')
_COLUMNS = (
  *_GROUP,
  'chosen',
  *_METRICS,
  'region_psnr_change',
  'ci95_low',
  'ci95_high',
  'images',
  'seeds',
)


def main() -> None:
  """Computes what is missing and writes the table."""
  command.check_choices('datasets', _DATASETS.value, EMBEDDED)
  defenses = [UNDEFENDED, *(parse_defense(text, baselines=True) for text in _DEFENSES.value)]
  share_cores(AttackConfig().lanes)
  settings = [
    flag.value for flag in (_ITERATIONS, _CALIBRATION_CLIENTS, _DENOISER_STEPS, _INVERSION_CLIENTS)
  ]
  # Rows of other settings are other rows.
  name = f'adaptive-{"-".join(map(str, settings))}.csv'
  cache = RowCache(pathlib.Path(_CACHE_DIR.value) / name, _CACHE_COLUMNS)
  done = cache.done(_KEY)
  attacked: AttackedRounds | None = None
  for rounds, defense in missing_cells(
    'adaptive',
    _DATASETS.value,
    _SEEDS.value,
    defenses,
    lambda dataset, seed, defense: (dataset, str(seed), *defense) in done,
  ):
    if rounds is not attacked:
      attacked, attacker = rounds, _attacker(rounds.dataset, rounds.seed, rounds.data.validation)
    base = dict(zip(_KEY, (rounds.dataset, rounds.seed, *defense), strict=True))
    cache.add([base | row for row in _attack(rounds, defense, attacker)])
  rows = _join(cache.rows)
  write_table(pathlib.Path(_OUTPUT.value), _COLUMNS, rows, key=_GROUP)
  print(f'{len(rows)} rows written to {_OUTPUT.value}')


def _attacker(dataset: str, seed: int, public: Examples) -> AdaptiveAttacker:
  effort = Effort(
    _CALIBRATION_CLIENTS.value,
    _DENOISER_STEPS.value,
    _INVERSION_CLIENTS.value,
    variations(dataset),
  )
  return AdaptiveAttacker(public, AttackConfig(seed=seed, iterations=_ITERATIONS.value), effort)


def _attack(
  rounds: AttackedRounds, defense: tuple[str, str], attacker: AdaptiveAttacker
) -> list[dict]:
  """Rows of all attacks on one round, all images."""
  observation = rounds.observation(*defense)
  config = AttackConfig(seed=rounds.seed, iterations=_ITERATIONS.value)
  shared = SharedSolvers([observation])
  results = attack_observation(observation, config, shared=shared)
  rows = _rows(rounds, results, _BEST, '', '')
  region_map = region_map_of(observation)
  maps = {name: region_map(own) for name, own in rounds.truth.items()}
  made = attacker.attack([observation], list(maps), maps, shared=shared)
  for knows_region, own in zip(('no', 'yes'), made, strict=True):
    trial = own.calibrations[0].trial  # All clients are of one kind.
    chosen = f'{trial.candidate}, denoised {trial.level:g}, learned {trial.learned_share:g}'
    rows += _rows(rounds, own.results, _CALIBRATED, knows_region, chosen)
  return rows


def _rows(
  rounds: AttackedRounds, results: list[TargetResult], attack: str, knows: str, chosen: str
) -> list[dict]:
  rows = []
  for image, result in enumerate(results):
    if result.status != 'ok':
      raise RuntimeError(f'{attack} on {result.target}: {result.reason}')
    own = rounds.truth[result.target]
    quality = measure(result.reconstructions['attack'][0], own.images[0], own.regions[0])
    rows.append(
      {'attack': attack, 'knows_region': knows, 'chosen': chosen, 'image': image}
      | {name: f'{getattr(quality, name):.4f}' for name in _METRICS}
    )
  return rows


def _join(rows: list[dict]) -> list[dict]:
  """A row of the table for each group of `_GROUP`."""
  groups: dict[tuple, dict] = {}
  chosen: dict[tuple, list[str]] = {}
  for row in rows:
    key = tuple(row[name] for name in _GROUP)
    values = [float(row[name]) for name in _METRICS]
    groups.setdefault(key, {})[row['seed'], row['image']] = values
    chosen.setdefault(key, []).append(row['chosen'])
  region = _METRICS.index('region_psnr')
  table = []
  for (dataset, shape, strength, *attack), found in groups.items():
    clean = groups.get((dataset, *UNDEFENDED, *attack), {})
    changes = [own[region] - clean[at][region] for at, own in found.items() if at in clean]
    interval = mean_interval(changes) if (shape, strength) != UNDEFENDED and changes else None
    means = np.mean(list(found.values()), axis=0)
    key = (dataset, shape, strength, *attack)
    table.append(
      dict.fromkeys(_COLUMNS, '')
      | dict(zip(_GROUP, key, strict=True))
      | {name: f'{value:.3f}' for name, value in zip(_METRICS, means, strict=True)}
      | {
        'chosen': ' / '.join(dict.fromkeys(chosen[key])),
        'region_psnr_change': '' if interval is None else f'{interval.mean:.2f}',
        'ci95_low': '' if interval is None or interval.low is None else f'{interval.low:.2f}',
        'ci95_high': '' if interval is None or interval.high is None else f'{interval.high:.2f}',
        'images': len(found),
        'seeds': len({seed for seed, _ in found}),
      }
    )
  return table


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
