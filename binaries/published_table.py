"""The published defence against none: results/published.csv.

Protection: 16 clients that send one step on one image in round 1, without normalisation and with
BatchNorm whose statistics are sent, under the published attacks, as their authors' code computes
them and with a matching loss that is differentiated, and under ours. Scored strictly and as the
published evaluation does; change and interval are of the region PSNR, paired by image, against no
defence.
Utility: 9 clients, full local epochs of batches of 8, BatchNorm aggregated; F1 on test as the mean
over the last third of the rounds, its change paired by seed, against no defence. Cost: seconds of a
round over those of an undefended one, both in one process, while the shadow learns and afterwards;
and each step of the method over a gradient of the local training.

All is kept in --cache_dir as it comes, so that an interrupted run continues; what is there takes
the place of the table's rows of the same name. Needs a generator for each data set
(`make generator`).
"""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from absl import flags

from attacks.adaptive.attacker import AdaptiveAttacker, Effort
from attacks.adaptive.players import AttackersShadow
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.presets import PRESETS
from attacks.results import TargetResult
from attacks.scoring.assignment import in_order
from attacks.scoring.lenient import best_quality, stretch
from attacks.scoring.metrics import measure
from attacks.scoring.statistics import mean_interval
from attacks.threads import share_cores
from binaries import command
from binaries.peak_memory import peak_memory_gib, reset_peak_memory
from binaries.progress import Progress
from binaries.small_federation import (
  ATTACKED_TRAINING,
  UTILITY_ROUNDS,
  UTILITY_TRAINING,
  UtilityF1,
  attacked_data,
  small_model,
  utility_data,
)
from binaries.tables import RowCache, write_table
from tff_shadow.data import EMBEDDED, FederatedData
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import RoundReport, TrainingRun, TrainingSettings
from tff_shadow.models import load_generator
from tff_shadow.observations import (
  read_round,
)
from tff_shadow.published import PublishedDefense, PublishedSettings, standardization
from tff_shadow.shadow.latents import LatentFit
from tff_shadow.shadow.noise_keys import experiment_secret

_VARIANTS = {
  'none': None,
  'published': {},
  'without_cam': {'subtract_cam': False},
  'without_equalization': {'equalization': 'none'},
  'without_shadow_update': {'update_shadow': False},
  'white_noise': {'map_kind': 'white'},
  'released_equalization': {'equalization': 'released'},
}
_ATTACKS = (
  'shadow_pixels_released',
  'shadow_pixels',
  'shadow_generator_released',
  'shadow_generator',
  'best',
  # Knows the method and the shadow as pretrained, and has tried it on public images.
  'calibrated',
)

_OUTPUT = flags.DEFINE_string('output', 'results/published.csv', 'Table to write.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/published', 'Finished parts, to go on from.')
_PARTS = flags.DEFINE_list(
  'parts',
  ['utility', 'protection', 'cost'],
  'What to compute of what is missing: utility, protection, cost.',
)
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_VARIANT = flags.DEFINE_list(
  'variants', list(_VARIANTS), f'Some of {", ".join(_VARIANTS)}; none is always computed.'
)
_ATTACK = flags.DEFINE_list('attacks', list(_ATTACKS), f'Some of {", ".join(_ATTACKS)}.')
_NORM = flags.DEFINE_list('norms', ['none', 'batch'], 'Normalisation of the attacked model.')
_ITERATIONS = flags.DEFINE_integer(
  'published_iterations', 500, 'Of the published attacks; the paper has 40,000 and 10,000.'
)
_SEEDS = flags.DEFINE_integer('seeds', 2, 'Number of seeds.', lower_bound=1)
_GENERATORS = flags.DEFINE_string(
  'generators',
  'runs/generator/{dataset}/generator.keras',
  'File of the shadow of each data set, with {dataset} in place of its name.',
)
_LATENT_LEARNING_RATE = flags.DEFINE_float(
  'latent_learning_rate', 0.1, 'Of fitting a latent; the published 1e-3 hardly moves it.'
)

_COST_ROUNDS = 6
# The augmentations leave an image of any of the sets one.
_EFFORT = Effort(8, 1500, 2000, ('shifts', 'brightness'))

_KEY = ('dataset', 'seed', 'variant')
_METRICS = ('psnr', 'ssim', 'region_psnr', 'region_ssim')
_UTILITY_COLUMNS = (*_KEY, 'f1')
_PROTECTION_COLUMNS = (*_KEY, 'norm', 'attack', 'scoring', 'image', *_METRICS)
_COST_COLUMNS = ('dataset', 'learning', 'later')
_ROW_KEY = ('dataset', 'defense', 'ablation', 'model', 'attack', 'scoring')
_COLUMNS = (
  *_ROW_KEY,
  *_METRICS,
  'f1',
  'f1_change',
  'f1_ci95_low',
  'f1_ci95_high',
  'region_psnr_change',
  'ci95_low',
  'ci95_high',
  'images',
  'seeds',
  'round_cost_ratio',
)


def main() -> None:
  """Computes what is missing and writes the table."""
  _check_flags()
  share_cores(AttackConfig().lanes)
  cache = pathlib.Path(_CACHE_DIR.value)
  utility = RowCache(cache / 'utility.csv', _UTILITY_COLUMNS)
  protection = RowCache(cache / 'protection.csv', _PROTECTION_COLUMNS)
  cost = RowCache(cache / 'cost.csv', _COST_COLUMNS)
  with local_worker_context() as worker:
    if 'utility' in _PARTS.value:
      _compute_utility(utility)
    if 'protection' in _PARTS.value:
      _compute_protection(protection)
    if 'cost' in _PARTS.value:
      _compute_cost(cost, worker.pid)
  rows = _join(protection.rows, utility.rows, cost.rows)
  if not rows:
    print('no row has been computed yet')
    return
  write_table(pathlib.Path(_OUTPUT.value), _COLUMNS, rows, key=_ROW_KEY)
  print(f'{len(rows)} rows written to {_OUTPUT.value}')


def _variants() -> list[str]:
  return ['none', *(name for name in _VARIANT.value if name != 'none')]


def _compute_utility(table: RowCache) -> None:
  # An ablation's F1 is not worth its time; it has the published one's noise or the same energy.
  variants = [name for name in _variants() if name in ('none', 'published')]
  cells = list(itertools.product(range(_SEEDS.value), _DATASETS.value, variants))
  done = table.done(_KEY)
  with Progress('utility', len(cells), 'cells') as progress:
    for count, (seed, dataset, variant) in enumerate(cells):
      if (dataset, str(seed), variant) not in done:
        data = utility_data(dataset, seed)
        model = small_model(data, seed, 'batch')
        settings = TrainingSettings(
          UTILITY_ROUNDS[dataset], UTILITY_TRAINING, observed_rounds=(), seed=seed
        )
        settings = dataclasses.replace(settings, defense=_defense(dataset, data, variant, seed))
        f1 = UtilityF1(data, model, settings)
        with tempfile.TemporaryDirectory() as name:
          _run(data, model, settings, pathlib.Path(name), f1, evaluate_every_rounds=1)
        row = dict(zip(_KEY, (dataset, seed, variant), strict=True))
        table.add([row | {'f1': f'{f1.test:.4f}'}])
      progress.update(count + 1, f'{dataset} {seed} {variant}')


def _compute_protection(table: RowCache) -> None:
  key = (*_KEY, 'norm', 'attack')
  done = table.done(key)
  cells = list(itertools.product(range(_SEEDS.value), _DATASETS.value, _NORM.value, _variants()))
  with Progress('protection', len(cells), 'cells') as progress:
    for count, (seed, dataset, norm, variant) in enumerate(cells):
      own = (dataset, str(seed), variant, norm)
      missing = [name for name in _attacks(variant, norm) if (*own, name) not in done]
      if missing:
        observation, truth = _observe(dataset, seed, norm, variant)
        for name in missing:
          base = dict(zip(key, (*own, name), strict=True))
          table.add(
            [
              base
              | {'image': image, 'scoring': scoring}
              | {metric: _number(getattr(quality, metric)) for metric in _METRICS}
              for image, scoring, quality in _attack(name, dataset, seed, observation, truth)
            ]
          )
      progress.update(count + 1, f'{dataset} {seed} {norm} {variant}')


def _attacks(variant: str, norm: str) -> list[str]:
  """Without BatchNorm statistics the published attacks have nothing to go by; ablations: ours."""
  if variant not in ('none', 'published'):
    return [name for name in _ATTACK.value if name == 'best']
  if norm == 'none':
    return [name for name in _ATTACK.value if name in ('best', 'calibrated')]
  return _ATTACK.value


def _attack(name, dataset, seed, observation, truth):
  """Yields (image, scoring, quality), strict and lenient, of every image of every client."""
  if name == 'calibrated':
    results = _calibrated(dataset, seed, observation)
  else:
    results = _preset(name, dataset, seed, observation)
  image = 0
  for result in results:
    own = truth[result.target]
    if result.status != 'ok':
      raise RuntimeError(f'{name} on {result.target}: {result.reason}')
    found = result.reconstructions['attack']
    matched = in_order(found, own.images)
    for one, other, region in zip(matched, own.images, own.regions, strict=True):
      yield image, 'strict', measure(one, other, region)
      yield image, 'lenient', best_quality(stretch(one), own.images, own.regions)
      image += 1


def _preset(name, dataset, seed, observation) -> list[TargetResult]:
  preset = PRESETS[name]
  config = dataclasses.replace(preset.build(), seed=seed)
  if name.startswith('shadow_'):
    config = dataclasses.replace(config, iterations=_ITERATIONS.value)
  if preset.needs_generator:
    generator, path = _generator(dataset, observation.image_shape)
    config = dataclasses.replace(config, parametrization=preset.search_in(generator, path, seed))
  return attack_observation(observation, config)


def _calibrated(dataset, seed, observation) -> list[TargetResult]:
  """By an attacker that is told no region."""
  public = attacked_data(dataset, seed).validation
  generator, _ = _generator(dataset, observation.image_shape)
  attacker = AdaptiveAttacker(
    public,
    dataclasses.replace(PRESETS['best'].build(), seed=seed),
    _EFFORT,
    shadow=AttackersShadow.fitted(generator, public.float_images(), 1),
  )
  (attack,) = attacker.attack([observation], [own.client_id for own in observation.clients])
  return attack.results


def _compute_cost(table: RowCache, worker_pid: int) -> None:
  done = table.done(('dataset',))
  for dataset in _DATASETS.value:
    if (dataset,) in done:
      continue
    data = utility_data(dataset, 0)
    seconds, peak_gib = {}, {}
    for name, variant, changes in (
      ('none', 'none', {}),
      ('learning', 'published', {'shadow_rounds': _COST_ROUNDS}),
      ('later', 'published', {'shadow_rounds': 1}),
    ):
      defense = _defense(dataset, data, variant, 0, **changes)
      for pid in ('self', worker_pid):
        reset_peak_memory(pid)
      settings = TrainingSettings(
        _COST_ROUNDS, UTILITY_TRAINING, observed_rounds=(), defense=defense
      )
      with tempfile.TemporaryDirectory() as directory:
        took: list[float] = []
        run = _run(
          data,
          small_model(data, 0, 'batch'),
          settings,
          pathlib.Path(directory),
          lambda report, took=took: took.append(report.seconds),
        )
      # The first two rounds trace, and the last one evaluates.
      seconds[name] = float(np.median(took[2:-1]))
      peak_gib[name] = peak_memory_gib() + peak_memory_gib(worker_pid)
      if name == 'learning':
        shadows = run.shadows
    ratios = {name: f'{seconds[name] / seconds["none"]:.2f}' for name in ('learning', 'later')}
    table.add([{'dataset': dataset, **ratios}])
    for name, ratio in ratios.items():
      print(f'BENCH published_{name}_over_none_{dataset} {ratio}')
    # Of this process and TFF's worker, libraries and data included.
    memory = peak_gib['learning'] / peak_gib['none']
    print(f'BENCH published_peak_memory_over_none_{dataset} {memory:.2f}')
    client_id = next(iter(data.clients))
    steps = shadows.step_seconds(client_id, UTILITY_TRAINING.batch_size)
    for name in (name for name in steps if name != 'gradient'):
      print(f'BENCH published_{name}_over_gradient_{dataset} {steps[name] / steps["gradient"]:.2f}')
    print(
      f'BENCH published_state_mib_a_client_{dataset} {shadows.state_bytes(client_id) / 2**20:.2f}'
    )


def _observe(dataset, seed, norm, variant):
  data = attacked_data(dataset, seed)
  # Clients hold more than the one image they use; a latent is fitted for that one alone.
  data = dataclasses.replace(
    data, clients={name: examples.take([0]) for name, examples in data.clients.items()}
  )
  settings = TrainingSettings(1, ATTACKED_TRAINING, observed_rounds=(1,), seed=seed)
  settings = dataclasses.replace(settings, defense=_defense(dataset, data, variant, seed))
  with tempfile.TemporaryDirectory() as name:
    run_dir = pathlib.Path(name)
    _run(data, small_model(data, seed, norm), settings, run_dir)
    return read_round(run_dir, 1)


def _run(
  data,
  model,
  settings,
  run_dir,
  report: Callable[[RoundReport], None] = lambda report: None,
  evaluate_every_rounds: int | None = None,
) -> TrainingRun:
  run = TrainingRun(
    data,
    model,
    settings,
    run_dir,
    evaluate_every_rounds=evaluate_every_rounds or settings.rounds,
    save_every_rounds=settings.rounds,
  )
  run.train(resume=False, report=report)
  return run


def _defense(
  dataset: str, data: FederatedData, variant: str, seed: int, **changes
) -> PublishedDefense | None:
  if variant == 'none':
    return None
  generator, _ = _generator(dataset, data.image_shape)
  latents = LatentFit(learning_rate=_LATENT_LEARNING_RATE.value)
  settings = PublishedSettings(latents=latents, **_VARIANTS[variant], **changes)
  secrets = {name: experiment_secret(seed, name) for name in data.clients}
  return PublishedDefense(
    settings,
    generator,
    *standardization(data.validation.float_images()),
    seed=seed,
    secrets=secrets,
  )


def _generator(dataset: str, image_shape: Sequence[int]) -> tuple[tf.keras.Model, str]:
  """The shadow of a data set, and its file."""
  path = _GENERATORS.value.replace('{dataset}', dataset)
  if not pathlib.Path(path).is_file():
    raise UserError(f'--generators: {path} is missing; `make generator` makes it')
  return load_generator(path, tuple(image_shape), flag='--generators'), path


def _join(protection: list[dict], utility: list[dict], cost: list[dict]) -> list[dict]:
  """The rows of the table."""
  f1 = {}
  for row in utility:
    f1.setdefault((row['dataset'], row['variant']), {})[row['seed']] = float(row['f1'])
  ratios = {row['dataset']: row['learning'] for row in cost}
  groups = {}
  for row in protection:
    names = ('dataset', 'variant', 'norm', 'attack', 'scoring')
    place = groups.setdefault(tuple(row[name] for name in names), {})
    place[row['seed'], row['image']] = [_parsed(row[name]) for name in _METRICS]
  rows = []
  for (dataset, variant, norm, attack, scoring), found in groups.items():
    clean = groups.get((dataset, 'none', norm, attack, scoring), {})
    region = _METRICS.index('region_psnr')
    changes = [own[region] - clean[at][region] for at, own in found.items() if at in clean]
    # An image without a region has no region PSNR.
    changes = [change for change in changes if np.isfinite(change)]
    means = np.nanmean(np.array(list(found.values()), float), axis=0)
    own_f1 = f1.get((dataset, variant), {})
    clean_f1 = f1.get((dataset, 'none'), {})
    f1_changes = [value - clean_f1[seed] for seed, value in own_f1.items() if seed in clean_f1]
    rows.append(
      dict.fromkeys(_COLUMNS, '')
      | {
        'dataset': dataset,
        'defense': 'none' if variant == 'none' else 'published',
        'ablation': '' if variant in ('none', 'published') else variant,
        'model': f'conv_small/{norm}',
        'attack': attack,
        'scoring': scoring,
        **{name: f'{value:.3f}' for name, value in zip(_METRICS, means, strict=True)},
        'f1': f'{np.mean(list(own_f1.values())):.4f}' if own_f1 else '',
        **_change('f1_change', 'f1_', f1_changes if variant != 'none' else [], 4),
        **_change('region_psnr_change', '', changes if variant != 'none' else [], 2),
        'images': len(found),
        'seeds': len({seed for seed, _ in found}),
        'round_cost_ratio': ratios.get(dataset, '') if variant == 'published' else '',
      }
    )
  return rows


def _change(name: str, prefix: str, changes: Sequence[float], digits: int) -> dict[str, str]:
  """The mean and its 95 % interval, as far as there are enough."""
  if not changes:
    return {}
  interval = mean_interval(changes)
  parts = (name, interval.mean), (f'{prefix}ci95_low', interval.low)
  parts += ((f'{prefix}ci95_high', interval.high),)
  return {key: '' if value is None else f'{value:.{digits}f}' for key, value in parts}


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:.4f}'


def _parsed(text: str) -> float:
  return float(text) if text else float('nan')


def _check_flags() -> None:
  for name, given, allowed in (
    ('datasets', _DATASETS.value, EMBEDDED),
    ('variants', _VARIANT.value, _VARIANTS),
    ('attacks', _ATTACK.value, _ATTACKS),
    ('norms', _NORM.value, ('none', 'batch', 'group')),
    ('parts', _PARTS.value, ('utility', 'protection', 'cost')),
  ):
    command.check_choices(name, given, allowed)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
