"""Protection against utility of shadow noise: rows of results/frontier.csv.

Every cell is a data set, a noise shape, its freshness, a strength (noise over update norm) and a
seed. Utility: 9 clients of 64 images, full local epochs; F1 on test, and the rounds until the F1 of
validation reaches 90 % of the undefended test F1. Protection: 16 clients that send one step on one
image in round 1, attacked with the default inversion; a single round, so freshness does not enter.
Rows that the file has already are kept, so that an interrupted run continues.
"""

import csv
import dataclasses
import itertools
import pathlib
import tempfile

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.scoring.metrics import measure
from binaries import command
from binaries.progress import Progress
from tff_shadow.aggregators import NOISE_SHAPES, NoiseStrength
from tff_shadow.data import EMBEDDED, FederatedData, Partition, load
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import (
  ShadowDefense,
  ShadowNoise,
  TrainingRun,
  TrainingSettings,
  evaluate,
)
from tff_shadow.models import build_model
from tff_shadow.observations import (
  ClientTraining,
  read_observation,
  read_truth,
  round_directory_name,
)
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.noise_keys import experiment_secret

_OUTPUT = flags.DEFINE_string('output', 'results/frontier.csv', 'CSV file to write or continue.')
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_SHAPES = flags.DEFINE_list('shapes', list(NOISE_SHAPES), 'Noise shapes.')
_FRESHNESS = flags.DEFINE_list('freshness', ['frozen', 'fresh'], 'frozen, fresh.')
_STRENGTHS = flags.DEFINE_list('strengths', ['0.1', '0.3', '1.0', '3.0'], 'Noise over update norm.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Number of seeds.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 40, 'Rounds of the utility runs.', lower_bound=1)
_NORM = 'group'
_UTILITY = ClientTraining('sgd', 0.1, 0.0, 8, 1, None)
_ATTACKED = ClientTraining('sgd', 0.05, 0.0, 1, 1, 1)
_IMAGES = 16
_COLUMNS = (
  'dataset',
  'shape',
  'freshness',
  'strength',
  'seed',
  'f1',
  'f1_undefended',
  'rounds_to_90',
  'psnr',
  'region_psnr',
  'psnr_undefended',
  'region_psnr_undefended',
  'images',
)


def main() -> None:
  """Fills the table cell by cell."""
  _check_flags()
  path = pathlib.Path(_OUTPUT.value)
  rows = _read_rows(path)
  cells = list(
    itertools.product(
      _DATASETS.value, range(_SEEDS.value), _SHAPES.value, _STRENGTHS.value, _FRESHNESS.value
    )
  )
  done = {(r['dataset'], int(r['seed']), r['shape'], r['strength'], r['freshness']) for r in rows}
  undefended: dict = {}
  protection: dict = {}
  with local_worker_context(), Progress('cell', len(cells), 'cells') as progress:
    for count, cell in enumerate(cells):
      if cell not in done:
        rows.append(_row(cell, undefended, protection))
        _write_rows(path, rows)
      progress.update(count + 1, ' '.join(map(str, cell)))


def _row(cell, undefended: dict, protection: dict) -> dict:
  dataset, seed, shape, strength, freshness = cell
  if (dataset, seed) not in undefended:
    f1, curve = _utility(dataset, seed, None, frozen=True)
    undefended[dataset, seed] = (f1, curve, *_protection(dataset, seed, None))
  clean_f1, _, clean_psnr, clean_region_psnr = undefended[dataset, seed]
  noise = ShadowNoise(shape, NoiseStrength('ratio', float(strength)), SaliencyConfig(kind='given'))
  if (dataset, seed, shape, strength) not in protection:
    protection[dataset, seed, shape, strength] = _protection(dataset, seed, noise)
  psnr, region_psnr = protection[dataset, seed, shape, strength]
  f1, curve = _utility(dataset, seed, noise, frozen=freshness == 'frozen')
  reached = [index + 1 for index, value in enumerate(curve) if value >= 0.9 * clean_f1]
  values = (dataset, shape, freshness, strength, seed, f'{f1:.4f}', f'{clean_f1:.4f}')
  values += (reached[0] if reached else '',)
  values += tuple(f'{v:.2f}' for v in (psnr, region_psnr, clean_psnr, clean_region_psnr))
  return dict(zip(_COLUMNS, (*values, _IMAGES), strict=True))


def _utility(dataset, seed, noise, *, frozen) -> tuple[float, list[float]]:
  """Test F1 of the trained model, and validation F1 after each round."""
  data = _load(dataset, 'sizes:' + '/'.join(['64'] * 9), seed)
  model = _model(data, seed, _NORM)
  with tempfile.TemporaryDirectory() as name:
    run_dir = pathlib.Path(name)
    settings = TrainingSettings(_ROUNDS.value, _UTILITY, observed_rounds=(), seed=seed)
    curve = []
    _run(
      data,
      model,
      settings,
      noise,
      frozen,
      run_dir,
      lambda r: curve.append(r.metrics['validation/f1']),
    )
  return evaluate(model, data.test.float_images(), data.test.labels)['f1'], curve


def _protection(dataset, seed, noise) -> tuple[float, float]:
  """Mean PSNR and region PSNR in dB of the attack on round 1."""
  data = _load(dataset, f'iid:{_IMAGES}', seed)
  with tempfile.TemporaryDirectory() as name:
    run_dir = pathlib.Path(name)
    settings = TrainingSettings(1, _ATTACKED, observed_rounds=(1,), seed=seed)
    _run(data, _model(data, seed, 'none'), settings, noise, True, run_dir, lambda report: None)
    observation = read_observation(run_dir / 'observations' / round_directory_name(1))
    truth = read_truth(run_dir / 'truth' / f'{round_directory_name(1)}.safetensors')
  values = []
  for result in attack_observation(observation, AttackConfig(seed=seed)):
    own = truth[result.target]
    if result.status != 'ok':
      raise RuntimeError(f'{dataset}, {noise}: attack on {result.target} failed: {result.reason}')
    quality = measure(result.reconstructions['attack'][0], own.images[0], own.regions[0])
    values.append((quality.psnr, quality.region_psnr))
  return tuple(float(value) for value in np.mean(values, axis=0))


def _run(data, model, settings, noise, frozen, run_dir, report) -> None:
  if noise is not None:
    secrets = {client_id: experiment_secret(settings.seed, client_id) for client_id in data.clients}
    defense = ShadowDefense(noise, frozen, secrets)
    settings = dataclasses.replace(settings, defense=defense)
  TrainingRun(data, model, settings, run_dir, save_every_rounds=settings.rounds).train(
    resume=False, report=report
  )


def _load(dataset: str, partition: str, seed: int) -> FederatedData:
  return load(dataset, image_size=32, partition=Partition.parse(partition), seed=seed)


def _model(data: FederatedData, seed: int, norm):
  return build_model(
    'conv_small',
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
    norm=norm,
    seed=seed,
  )


def _check_flags() -> None:
  for name, given, allowed in (
    ('datasets', _DATASETS.value, EMBEDDED),
    ('shapes', _SHAPES.value, NOISE_SHAPES),
    ('freshness', _FRESHNESS.value, ('frozen', 'fresh')),
  ):
    for value in given:
      if value not in allowed:
        raise UserError(f'--{name}={value}: use some of {", ".join(allowed)}')
  for value in _STRENGTHS.value:
    try:
      NoiseStrength('ratio', float(value))
    except ValueError as error:
      raise UserError(f'--strengths={value}: {error}') from error


def _read_rows(path: pathlib.Path) -> list[dict]:
  if not path.exists():
    return []
  with path.open() as file:
    return list(csv.DictReader(line for line in file if not line.startswith('#')))


def _write_rows(path: pathlib.Path, rows: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', newline='') as file:
    file.write(f'# command: {command.command_line()}\n')
    writer = csv.DictWriter(file, _COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
