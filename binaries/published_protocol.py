"""The published experiment (Jiang, Ma and Yang 2025), and how a plan scales it.

Nine clients with 8, 32, 128 and 512 images at batches of 4, as many at batches of 8, and one with
one image; ResNet-18 with BatchNorm, whose statistics are averaged; SGD at 1e-2, a tenth of it after
rounds 40 and 80; 100 rounds of one local epoch, of which 1, 25, 50, 75 and 100 are attacked.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.presets import PRESETS
from binaries import command
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
from tff_shadow.learning import TrainingSettings
from tff_shadow.models import load_generator
from tff_shadow.observations import ClientTraining
from tff_shadow.published import PublishedDefense

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
DEFENSES = ('none', 'published')
# Held-out images that a scaled experiment keeps at least.
_MIN_HELD_OUT = 16
# Larger images fill a processor by themselves, and memory.
_SIDE_BY_SIDE_SIZE = 64


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


def _spread(examples: Examples, count: int) -> Examples:
  """`count` examples at even distances, for the lists may be sorted by class."""
  return examples.take(np.linspace(0, len(examples) - 1, count).round())


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
