"""The published experiment (Jiang, Ma and Yang 2025) in parts, each kept where it was finished.

Nine clients with 8, 32, 128 and 512 images at batches of 4, as many at batches of 8, and one with
one image; ResNet-18 with BatchNorm, whose statistics are averaged; SGD at 1e-2, a tenth of it after
rounds 40 and 80; 100 rounds of one local epoch, of which 1, 25, 50, 75 and 100 are attacked.

The published attacks search one batch of images for a client, as if it had taken one step on them,
and are told the labels, which here are those of its first batch. Our own attack infers the labels,
and simulates all steps of clients that took few.

`OUTPUT/DEFENCE` is a run directory like those of tff-shadow-train and tff-shadow-attack.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.engine import AttackProgress, attack_observation
from attacks.presets import PRESETS
from attacks.results import described, read_results, write_results
from attacks.scoring import results
from attacks.scoring.gate import better_control
from attacks.scoring.identification import KS, original_ranks
from attacks.scoring.lenient import LenientScore, score_leniently
from attacks.scoring.metrics import METRIC_NAMES, Perceptual
from attacks.scoring.results import AttackResult, load_attack
from attacks.scoring.scores import ImageScore, score, write_scores
from attacks.threat_model import threat_model
from binaries import command
from binaries.progress import Progress
from binaries.tables import write_rows
from tff_shadow.data import (
  EMBEDDED,
  PUBLISHED_SETS,
  Examples,
  FederatedData,
  Partition,
  load,
  load_published,
)
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import (
  RoundReport,
  TrainingRun,
  TrainingSettings,
  evaluate,
)
from tff_shadow.models import build_model, load_generator, load_keras_file
from tff_shadow.observations import (
  ClientObservation,
  ClientTraining,
  Observation,
  Truth,
  WeightArrays,
  read_observation,
  read_truth,
  round_directory_name,
)
from tff_shadow.published import PublishedDefense
from tff_shadow.shadow import SaliencyConfig, build_region_map

# Training images and batch size of each client.
CLIENTS = ((8, 4), (32, 4), (128, 4), (512, 4), (8, 8), (32, 8), (128, 8), (512, 8), (1, 1))
_ROUNDS, _DROPS, _OBSERVED = 100, (40, 80), (1, 25, 50, 75, 100)
_LEARNING_RATE = 1e-2
# Iterations of the published attacks; ours has its preset's.
_ITERATIONS = {
  'shadow_pixels': 40_000,
  'shadow_pixels_released': 40_000,
  'shadow_generator': 10_000,
  'shadow_generator_released': 10_000,
}
OWN_ATTACK = 'best'
ATTACKS = (*_ITERATIONS, OWN_ATTACK)
# Of an image, where the data set names no region: what Grad-CAM++ of the trained model ranks first.
_REGION = SaliencyConfig('gradcam_pp', target=1, top_fraction=0.3)
# Held-out images that a scaled experiment keeps at least.
_MIN_HELD_OUT = 16
# Larger images fill a processor by themselves, and memory.
_SIDE_BY_SIDE_SIZE = 64

DEFENSES = ('none', 'published')

_METRICS = (
  'mse',
  'psnr',
  'lpips',
  'ssim',
  'rdlv',
  *(f'iip_{k}' for k in KS),
  *(name for name in METRIC_NAMES if name.startswith('region_')),
)
COLUMNS = (
  'dataset',
  'defense',
  'round',
  'attack',
  'scoring',
  'client',
  'images',
  'failed',
  *_METRICS,
  'control_psnr',
)
_ALL = 'all'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to run.

  Attributes:
    dataset: A published or an embedded data set.
    data_dir: Of a published one, see `load_published`; of an embedded one, where TFDS keeps it.
    image_size: Side of the images in pixels.
    model: A built-in model.
    scale: In (0, 1]; multiplies client sizes, held-out images, rounds and attack iterations, each
      at least 1. Batch sizes stay.
    seed: Decides partition, model, batches and the starts of attacks.
    attacks: Some of `ATTACKS`.
    generator: A .keras file, for attacks that need one.
    published: Makes the published defence; its rounds are scaled here.
    max_iterations: Of any attack; None for no limit.
    exact_steps: Our own attack simulates clients of at most so many local steps exactly, and takes
      the others as the published ones do.
  """

  dataset: str
  data_dir: str | None
  image_size: int
  model: str = 'resnet18'
  scale: float = 1.0
  seed: int = 0
  attacks: tuple[str, ...] = ('shadow_pixels_released', 'shadow_pixels', OWN_ATTACK)
  generator: str | None = None
  published: Callable[[FederatedData], PublishedDefense] | None = None
  max_iterations: int | None = None
  exact_steps: int = 2

  def __post_init__(self):
    """Raises `UserError` for a plan that cannot be carried out."""
    if self.dataset not in (*PUBLISHED_SETS, *EMBEDDED):
      raise UserError(
        f'--dataset={self.dataset}: use one of {", ".join((*PUBLISHED_SETS, *EMBEDDED))}'
      )
    if self.dataset in PUBLISHED_SETS and not self.data_dir:
      raise UserError(
        f'--data_dir is required with --dataset={self.dataset}: the folder of its images and'
        ' manifests'
      )
    if not 0 < self.scale <= 1:
      raise UserError(f'--scale={self.scale}: must be above 0 and at most 1')
    command.check_choices('attacks', self.attacks, ATTACKS)
    for name in self.attacks:
      if PRESETS[name].needs_generator and not self.generator:
        raise UserError(f'--attacks={name}: needs --generator')

  def scaled(self, count: int) -> int:
    """`count` of the published experiment, in this one."""
    return max(1, round(self.scale * count))

  @property
  def rounds(self) -> int:
    """Rounds to train."""
    return self.scaled(_ROUNDS)

  @property
  def observed_rounds(self) -> tuple[int, ...]:
    """Rounds that are attacked."""
    return tuple(sorted({self.scaled(round_num) for round_num in _OBSERVED}))

  @property
  def learning_rate_drops(self) -> tuple[int, ...]:
    """Rounds after which the clients' learning rate falls."""
    drops = sorted({self.scaled(round_num) for round_num in _DROPS})
    return tuple(drop for drop in drops if drop < self.rounds)


def load_data(plan: Plan) -> FederatedData:
  """The clients of the plan, at its scale.

  Raises:
    UserError: Names the file, row or setting at fault.
  """
  sizes = [plan.scaled(size) for size, _ in CLIENTS]
  if plan.dataset in EMBEDDED:
    partition = Partition.parse('sizes:' + '/'.join(map(str, sizes)))
    try:
      data = load(
        plan.dataset,
        image_size=plan.image_size,
        partition=partition,
        seed=plan.seed,
        data_dir=plan.data_dir,
      )
    except UserError as error:
      if 'training examples' not in str(error):
        raise
      raise UserError(f'--scale={plan.scale}: {error}; lower it') from error
  else:
    data = load_published(plan.dataset, plan.data_dir, image_size=plan.image_size)
    if len(data.clients) != len(CLIENTS):
      raise UserError(
        f'--data_dir={plan.data_dir}: {len(data.clients)} clients in the manifest, the experiment'
        f' has {len(CLIENTS)}'
      )
  clients = {
    client_id: _spread(examples, min(size, len(examples)))
    for (client_id, examples), size in zip(data.clients.items(), sizes, strict=True)
  }
  validation, test = (
    _spread(split, min(len(split), max(_MIN_HELD_OUT, plan.scaled(len(split)))))
    for split in (data.validation, data.test)
  )
  return dataclasses.replace(data, clients=clients, validation=validation, test=test)


def training_settings(plan: Plan, data: FederatedData, defense: str) -> TrainingSettings:
  """The protocol, with one of `DEFENSES`."""
  return TrainingSettings(
    rounds=plan.rounds,
    client_training=ClientTraining('sgd', _LEARNING_RATE, 0.0, 4, 1, None),
    batch_norm_sharing='aggregate',
    observed_rounds=plan.observed_rounds,
    seed=plan.seed,
    defense=_defense(plan, data, defense),
    learning_rate_drops=plan.learning_rate_drops,
    client_batch_sizes={
      client_id: batch_size
      for client_id, (_, batch_size) in zip(data.clients, CLIENTS, strict=True)
    },
  )


def _defense(plan: Plan, data: FederatedData, name: str) -> PublishedDefense | None:
  if name == 'none':
    return None
  defense = plan.published(data)
  rounds = plan.scaled(defense.settings.shadow_rounds)
  return dataclasses.replace(
    defense, settings=dataclasses.replace(defense.settings, shadow_rounds=rounds)
  )


def train(plan: Plan, data: FederatedData, defense: str, run_dir: pathlib.Path) -> None:
  """Trains into `run_dir`, from where an earlier call was interrupted."""
  if (run_dir / 'test.json').exists():
    return
  run_dir.mkdir(parents=True, exist_ok=True)
  model = build_model(
    plan.model,
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
    norm='batch',
    seed=plan.seed,
  )
  training = TrainingRun(data, model, training_settings(plan, data, defense), run_dir)
  resume = any((run_dir / 'state').glob('round_*'))
  with (
    local_worker_context(log_path=run_dir / 'worker.log'),
    Progress('latents', sum(map(len, data.clients.values())), 'images') as latents,
    Progress(f'{defense}: round', plan.rounds, 'rounds') as progress,
  ):

    def report(done: RoundReport) -> None:
      progress.update(done.round_num, f'loss {done.metrics["train/loss"]:.4f}')

    training.train(resume=resume, report=report, report_latents=latents.update)
  model.save(run_dir / 'model.keras')
  command.write_json(
    run_dir / 'test.json', evaluate(model, data.test.float_images(), data.test.labels)
  )


def attack_config(plan: Plan, name: str, image_shape: tuple[int, int, int]) -> AttackConfig:
  """The settings of an attack, at the plan's scale."""
  preset = PRESETS[name]
  config = preset.build()
  iterations = plan.scaled(_ITERATIONS.get(name, config.iterations))
  schedule = dataclasses.replace(
    config.schedule, warm_up=round(plan.scale * config.schedule.warm_up)
  )
  config = dataclasses.replace(
    config,
    iterations=min(iterations, plan.max_iterations or iterations),
    schedule=schedule,
    lanes=config.lanes if plan.image_size <= _SIDE_BY_SIDE_SIZE else 1,
    seed=plan.seed,
    # Each kind of client is compiled anew, which a CPU does not earn back.
    xla='auto' if tf.config.list_logical_devices('GPU') else 'off',
  )
  if preset.needs_generator:
    generator = load_generator(plan.generator, image_shape)
    prior = preset.search_in(generator, plan.generator, plan.seed)
    config = dataclasses.replace(config, parametrization=prior)
  return config


def as_one_step(client: ClientObservation, training: ClientTraining) -> ClientObservation:
  """A client as the published attacks take it: one local step on one batch.

  Its gradient is the mean over its steps; its BatchNorm statistics are recovered as if the change
  of the running ones were that of one step.
  """
  if client.num_steps <= 1:
    return client
  update = WeightArrays(
    tuple(array / np.float32(client.num_steps) for array in client.update.trainable),
    client.update.non_trainable,
  )
  batch = min(client.images_per_step(training), client.num_images)
  return dataclasses.replace(client, num_images=batch, num_steps=1, batch_size=batch, update=update)


def attack(plan: Plan, name: str, round_num: int, run_dir: pathlib.Path) -> pathlib.Path:
  """Attacks a round, from where an earlier call was interrupted; returns where it is."""
  round_name = round_directory_name(round_num)
  directory = run_dir / 'attacks' / f'{name}_{round_name}'
  observation = read_observation(run_dir / 'observations' / round_name)
  seen = _seen_by(plan, name, observation)
  finished = read_results(directory)
  if len(finished) == len(seen.clients):
    return directory
  config = attack_config(plan, name, tuple(observation.image_shape))
  labels = None
  if name != OWN_ATTACK:
    truth = read_truth(run_dir / 'truth' / f'{round_name}.safetensors')
    labels = {
      client.client_id: truth[client.client_id].labels[: client.num_images].tolist()
      for client in seen.clients
    }
  directory.mkdir(parents=True, exist_ok=True)
  _write_attack_config(directory, name, observation, seen, config, labels)
  each = config.iterations * config.restarts
  with Progress(
    f'{name}, round {round_num}', each * len(seen.clients), 'it', done=each * len(finished)
  ) as progress:

    def show(at: AttackProgress) -> None:
      progress.update(at.done, f'{at.targets[0]}, loss {at.loss:.2e}')

    found = attack_observation(
      seen,
      config,
      labels=labels,
      finished=finished,
      on_result=lambda done: write_results(directory, done),
      progress=show,
      checkpoint_path=directory / 'checkpoint.safetensors',
    )
  write_results(directory, found)
  for result in found:
    if result.status == 'failed':
      logging.warning('%s, round %d: %s: %s', name, round_num, result.target, result.reason)
  return directory


def _seen_by(plan: Plan, name: str, observation: Observation) -> Observation:
  """What the attack makes of an observation."""
  training = observation.client_training
  most = plan.exact_steps if name == OWN_ATTACK else 1
  clients = tuple(
    client if client.num_steps <= most else as_one_step(client, training)
    for client in observation.clients
  )
  return dataclasses.replace(observation, clients=clients)


def _write_attack_config(directory, name, observation, seen, config, labels) -> None:
  simplified = [
    own.client_id
    for own, other in zip(observation.clients, seen.clients, strict=True)
    if own is not other
  ]
  sentences = threat_model(observation, config, labels_known=labels is not None)
  if simplified:
    sentences.append(
      f'It takes {", ".join(simplified)} as if one step on one batch had sent the mean of their'
      ' steps.'
    )
  document = {
    'attack': {'preset': name},
    'all_settings': config.as_dict(),
    'observation': f'observations/{round_directory_name(observation.round_num)}',
    'round': observation.round_num,
    'threat_model': sentences,
    'versions': command.versions(),
    **described(observation),
  }
  command.write_json(directory / 'config.json', document)


def score_attack(
  plan: Plan,
  data: FederatedData,
  directory: pathlib.Path,
  perceptual: Perceptual | None,
) -> list[dict[str, Any]]:
  """The rows of an attack in the table: strict and lenient, of each client and of all together.

  Writes the scores of each image (scores.csv), of each reconstruction (lenient_scores.csv) and the
  rows (rows.json), which a later call with LPIPS or without, as before, reads again.
  """
  path = directory / 'rows.json'
  key = {'lpips': getattr(perceptual, 'digest', None)}
  if path.exists():
    saved = json.loads(path.read_text())
    if saved['key'] == key:
      return saved['rows']
  run_dir = directory.parents[1]
  found = load_attack(run_dir, directory.name)
  if plan.dataset in PUBLISHED_SETS:
    found = _with_regions(found, run_dir, data)
  distractors = list(data.validation.float_images())
  strict = score(found, perceptual)
  write_scores(directory / 'scores.csv', strict)
  lenient = score_leniently(
    found, perceptual, set_names=(results.ATTACK, 'prior_only'), distractors=distractors
  )
  _write_lenient(directory / 'lenient_scores.csv', lenient)
  ranks = original_ranks(found, strict, distractors)[results.ATTACK]
  base = {
    'dataset': plan.dataset,
    'defense': run_dir.name,
    'round': found.config['round'],
    'attack': found.config['attack']['preset'],
  }
  rows = []
  for client in (_ALL, *(target.name for target in found.targets)):
    targets = [target for target in found.targets if client in (_ALL, target.name)]
    failed = sum(t.record['images'] for t in targets if t.record['status'] == 'failed')
    own = base | {'client': client, 'failed': failed}
    mine = [place for place, row in enumerate(strict) if client in (_ALL, row.target)]
    rows.append(
      own
      | {'scoring': 'strict'}
      | _strict_means([strict[place] for place in mine], [ranks[place] for place in mine])
    )
    rows.append(
      own
      | {'scoring': 'lenient'}
      | _lenient_means([row for row in lenient if client in (_ALL, row.target)])
    )
  command.write_json(path, {'key': key, 'rows': rows})
  return rows


def _with_regions(found: AttackResult, run_dir: pathlib.Path, data: FederatedData) -> AttackResult:
  """With the regions that the trained model names, for a data set that names none."""
  model = load_keras_file(
    str(run_dir / 'model.keras'),
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
  )
  region_map = build_region_map(_REGION, model)

  def regions(truth: Truth) -> np.ndarray:
    batches = [
      region_map(truth.images[start : start + 16], truth.labels[start : start + 16]).maps.numpy()
      for start in range(0, len(truth.images), 16)
    ]
    return np.concatenate(batches)

  return dataclasses.replace(
    found,
    targets=tuple(dataclasses.replace(target, regions=regions(target)) for target in found.targets),
  )


def _strict_means(rows: Sequence[ImageScore], ranks: Sequence[int | None]) -> dict[str, Any]:
  """Over the images that have a reconstruction."""
  attacked = [(row, rank) for row, rank in zip(rows, ranks, strict=True) if row.status == 'ok']
  only = [row for row, _ in attacked]
  control = better_control(only)
  values = {
    name: [getattr(row.quality[results.ATTACK], name) for row in only] for name in METRIC_NAMES
  }
  values['rdlv'] = [row.rdlv for row in only]
  for k in KS:
    values[f'iip_{k}'] = [float(rank is not None and rank <= k) for _, rank in attacked]
  values['control_psnr'] = [
    row.quality[control].psnr for row in only if control is not None and control in row.quality
  ]
  return {'images': len(only)} | {name: _mean(values[name]) for name in (*_METRICS, 'control_psnr')}


def _lenient_means(rows: Sequence[LenientScore]) -> dict[str, Any]:
  """Over the reconstructions."""
  only = [row for row in rows if row.set_name == results.ATTACK]
  values = {name: [getattr(row.quality, name) for row in only] for name in METRIC_NAMES}
  values['rdlv'] = [row.rdlv for row in only]
  for k in KS:
    values[f'iip_{k}'] = [float(row.rank is not None and row.rank <= k) for row in only]
  values['control_psnr'] = [row.quality.psnr for row in rows if row.set_name != results.ATTACK]
  return {'images': len(only)} | {name: _mean(values[name]) for name in (*_METRICS, 'control_psnr')}


def _mean(values: Sequence[float | None]) -> float | None:
  values = [value for value in values if value is not None]
  return float(np.mean(values)) if values else None


def run(
  plan: Plan,
  defenses: Sequence[str],
  output_dir: pathlib.Path,
  perceptual: Perceptual | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Everything that is not done yet; returns the tables of attacks and of utility.

  They are written to `results.csv` and `utility.csv` after every part.
  """
  data = load_data(plan)
  rows: list[dict[str, Any]] = []
  utility = []
  for defense in defenses:
    run_dir = output_dir / defense
    train(plan, data, defense, run_dir)
    test = results.read_json(run_dir / 'test.json')
    utility.append({'dataset': plan.dataset, 'defense': defense, **test})
    _write_table(output_dir / 'utility.csv', utility, list(utility[0]))
    for round_num in plan.observed_rounds:
      for name in plan.attacks:
        directory = attack(plan, name, round_num, run_dir)
        rows += score_attack(plan, data, directory, perceptual)
        _write_table(output_dir / 'results.csv', rows, COLUMNS)
  return rows, utility


def _write_table(
  path: pathlib.Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]
) -> None:
  """What does not exist is an empty cell."""
  cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
  write_rows(path, columns, cells)


def printed(rows: Sequence[dict[str, Any]]) -> str:
  """The rows over all clients, as a table to read."""
  names = ('defense', 'round', 'attack', 'scoring', 'images', *_METRICS, 'control_psnr')
  shown = [row for row in rows if row['client'] == _ALL]
  names = [name for name in names if any(row[name] is not None for row in shown)]
  lines = [names, *([_short(row[name]) for name in names] for row in shown)]
  widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  )


def _write_lenient(path: pathlib.Path, scores: Sequence[LenientScore]) -> None:
  columns = ('target', 'set', 'reconstruction', *METRIC_NAMES, 'rdlv', 'rank')
  rows = [
    dict.fromkeys(columns)
    | {'target': row.target, 'set': row.set_name, 'reconstruction': row.reconstruction}
    | dataclasses.asdict(row.quality)
    | {'rdlv': row.rdlv, 'rank': row.rank}
    for row in scores
  ]
  _write_table(path, rows, columns)


def _spread(examples: Examples, count: int) -> Examples:
  """`count` examples at even distances, for the lists may be sorted by class."""
  return examples.take(np.linspace(0, len(examples) - 1, count).round())


def _cell(value: Any) -> Any:
  return f'{value:.6g}' if isinstance(value, float) else value


def _short(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:.3f}' if isinstance(value, float) else str(value)
