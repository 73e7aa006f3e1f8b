"""Rounds of the small federation as the server sees them, with and without a defence."""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from binaries import command, frontier_plot
from binaries.progress import Progress
from binaries.small_federation import (
  ATTACKED_TRAINING,
  KEPT_TRAINING,
  attacked_data,
  kept_data,
  small_model,
)
from tff_shadow.aggregators import NOISE_SHAPES, NoiseStrength
from tff_shadow.data import FederatedData
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import (
  BASELINES,
  BaselineDefense,
  RoundReport,
  ShadowDefense,
  ShadowNoise,
  TrainingRun,
  TrainingSettings,
)
from tff_shadow.learning.decoys import decoy_pool
from tff_shadow.observations import (
  Observation,
  Truth,
  WeightArrays,
  mean_update,
  read_round,
)
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.noise_keys import experiment_secret

UNDEFENDED = ('none', '0')


def shadow_noise(shape: str, strength: str) -> ShadowNoise | None:
  """The noise of a row of a table, in the region that the data set gives; None for `UNDEFENDED`."""
  if shape == UNDEFENDED[0]:
    return None
  kind, value = parse_strength(strength)
  return ShadowNoise(
    shape,
    NoiseStrength('scale' if kind == 'images' else kind, value),
    SaliencyConfig(kind='given'),
    propagation='images' if kind == 'images' else 'per_step',
    **_floor(strength),
  )


def defense_of(shape: str, strength: str) -> ShadowNoise | BaselineDefense | None:
  """The noise or baseline of a row of a table; see `parse_defense`."""
  return parse_baseline(shape, strength) if shape in BASELINES else shadow_noise(shape, strength)


def public_settings(shape: str, strength: str, frozen: bool) -> dict[str, Any]:
  """What the summary of a run with the defence of a row of a table says of it."""
  defense = defense_of(shape, strength)
  if defense is None:
    return {'name': UNDEFENDED[0]}
  if isinstance(defense, ShadowNoise):
    return ShadowDefense(defense, frozen, {}).public_settings()
  return defense.public_settings()


def parse_strength(text: str) -> tuple[str, float]:
  """Kind and value; raises `ValueError` for text that is no strength."""
  kind, value = frontier_plot.split_strength(text)
  if kind not in ('ratio', 'image_ratio', 'scale', 'images') or text.startswith('ratio:'):
    raise ValueError('must be a ratio, image_ratio:R, scale:S or images:S')
  _floor(text)
  return kind, NoiseStrength('scale', value).value


def _floor(text: str) -> dict[str, float]:
  """What a strength says after a plus sign; raises `ValueError` for anything but a floor."""
  _, plus, setting = text.partition('+')
  name, _, value = setting.partition(':')
  if plus and name != 'floor':
    raise ValueError(f'may be followed by +floor:SHARE, found {setting!r}')
  return {'floor': float(value)} if plus else {}


def fits(shape: str, strength: str) -> bool:
  """Whether tables have noise of a shape with a strength; other scales are no multiples."""
  kind, _ = parse_strength(strength)
  if _floor(strength) and (shape == 'isotropic' or kind == 'images'):
    return False
  if kind == 'scale':
    return shape in ('correlated', 'decoy')
  return kind != 'images' or shape == 'correlated'


def parse_baseline(name: str, parameters: str) -> BaselineDefense:
  """The baseline with PARAMETER:VALUE+..., its others at their defaults.

  Raises:
    ValueError: If it has no such parameter, or not of this value.
  """
  types = {field.name: field.type for field in dataclasses.fields(BASELINES[name])}
  settings = {}
  for parameter in parameters.split('+'):
    field, _, value = parameter.partition(':')
    if field not in types or field in settings:
      raise ValueError(f'use {" or ".join(f"{name}/{own}:VALUE" for own in types)}')
    try:
      settings[field] = types[field](value)
    except ValueError:
      raise ValueError(
        f'{field} must be of type {types[field].__name__}, found {value!r}'
      ) from None
  return BASELINES[name](**settings)


def parse_baselines(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
  """Name and PARAMETER:VALUE+... of baselines, each from NAME/PARAMETER:VALUE+...

  Args:
    flag: That gives them.
    texts: Its value.

  Raises:
    UserError: If one is no such thing.
  """
  found = []
  for text in texts:
    name, _, parameters = text.partition('/')
    command.check_choices(flag, [name], BASELINES)
    try:
      parse_baseline(name, parameters)
    except ValueError as error:
      raise UserError(f'--{flag}={text}: {error}') from error
    found.append((name, parameters))
  return found


def parse_defense(text: str, *, baselines: bool = False) -> tuple[str, str]:
  """Shape and strength of noise from SHAPE/STRENGTH, or NAME/PARAMETER:VALUE+... of a baseline.

  Args:
    text: One of --defenses.
    baselines: Whether baselines are allowed.

  Raises:
    UserError: If it is no such thing.
  """
  shape, _, strength = text.partition('/')
  if baselines and shape in BASELINES:
    return parse_baselines('defenses', [text])[0]
  command.check_choices('defenses', [shape], [*NOISE_SHAPES, *(BASELINES if baselines else ())])
  try:
    kind, _ = parse_strength(strength)
  except ValueError as error:
    raise UserError(f'--defenses={text}: the strength {error}') from error
  if not fits(shape, strength):
    raise UserError(f'--defenses={text}: {kind} is no strength of {shape} noise here')
  return shape, strength


def train(
  data: FederatedData,
  model,
  settings: TrainingSettings,
  defense: ShadowNoise | BaselineDefense | None,
  run_dir: pathlib.Path,
  *,
  frozen: bool = True,
  report: Callable[[RoundReport], None] = lambda report: None,
) -> None:
  """Trains `model` with a baseline, or with noise whose keys follow from the seed."""
  if isinstance(defense, ShadowNoise):
    secrets = {client_id: experiment_secret(settings.seed, client_id) for client_id in data.clients}
    defense = ShadowDefense(defense, frozen, secrets, decoy_pool(data.validation))
  settings = dataclasses.replace(settings, defense=defense)
  TrainingRun(data, model, settings, run_dir, save_every_rounds=settings.rounds).train(
    resume=False, report=report
  )


class AttackedRounds:
  """The first rounds of one data set and seed, under any shadow noise or baseline.

  In one round noise that is added is proportional to its strength, so that one run with strength 1
  stands for all strengths, and whether it is fresh does not tell. In several it is fresh.

  Attributes:
    dataset: Its name.
    seed: Decides everything.
    images: Of a client, in its one step; in several rounds it has no others.
    rounds: How many.
    data: The clients, and the public images.
    truth: What the clients trained on.
  """

  def __init__(self, dataset: str, seed: int, images: int = 1, rounds: int = 1):
    """Runs the undefended rounds."""
    self.dataset, self.seed, self.images, self.rounds = dataset, seed, images, rounds
    self.data = attacked_data(dataset, seed) if rounds == 1 else kept_data(dataset, seed, images)
    self._observed: dict[tuple[str, str], list[Observation]] = {}
    self._observed[UNDEFENDED], self.truth = self._run(None)

  def observation(self, shape: str, strength: str) -> Observation:
    """What the server sees of the one round under this noise or baseline; see `parse_defense`."""
    (observation,) = self.observations(shape, strength)
    return observation

  def observations(self, shape: str, strength: str) -> list[Observation]:
    """What it sees of all rounds."""
    if (shape, strength) == UNDEFENDED or shape in BASELINES or self.rounds > 1:
      return self._seen(shape, strength)
    kind, value = parse_strength(strength)
    if kind == 'images' or _floor(strength):
      return self._seen(shape, strength)
    (unit,) = self._seen(shape, '1.0' if kind == 'ratio' else f'{kind}:1.0')
    return [with_noise_scaled(*self._seen(*UNDEFENDED), unit, value)]

  def _seen(self, shape: str, strength: str) -> list[Observation]:
    key = (shape, strength)
    if key not in self._observed:
      self._observed[key], _ = self._run(defense_of(shape, strength))
    return self._observed[key]

  def _run(
    self, defense: ShadowNoise | BaselineDefense | None
  ) -> tuple[list[Observation], dict[str, Truth]]:
    training = ATTACKED_TRAINING if self.rounds == 1 else KEPT_TRAINING
    numbers = tuple(range(1, self.rounds + 1))
    settings = TrainingSettings(
      self.rounds,
      dataclasses.replace(training, batch_size=self.images),
      observed_rounds=numbers,
      seed=self.seed,
    )
    model = small_model(self.data, self.seed, 'none')
    with tempfile.TemporaryDirectory() as name:
      run_dir = pathlib.Path(name)
      train(self.data, model, settings, defense, run_dir, frozen=self.rounds == 1)
      rounds = [read_round(run_dir, number) for number in numbers]
      return [observation for observation, _ in rounds], rounds[0][1]


def missing_cells(
  name: str,
  datasets: Sequence[str],
  seeds: int,
  defenses: Sequence[tuple[str, str]],
  is_done: Callable[[str, int, tuple[str, str]], bool],
  images: int = 1,
  num_rounds: int = 1,
) -> Iterator[tuple[AttackedRounds, tuple[str, str]]]:
  """The rounds and defences of a table of which there are no rows yet.

  Shows progress; what is made of a cell is to be kept before the next one is asked for.

  Args:
    name: Of the table, for progress.
    datasets: Of the cells.
    seeds: How many.
    defenses: Each with each data set and seed; see `parse_defense`.
    is_done: Whether there are rows of a data set, seed and defence.
    images: See `AttackedRounds`.
    num_rounds: Likewise.
  """
  cells = list(itertools.product(datasets, range(seeds), defenses))
  rounds: AttackedRounds | None = None
  with local_worker_context(), Progress(name, len(cells), 'cells') as progress:
    for count, (dataset, seed, defense) in enumerate(cells):
      if not is_done(dataset, seed, defense):
        if rounds is None or (rounds.dataset, rounds.seed) != (dataset, seed):
          rounds = AttackedRounds(dataset, seed, images, num_rounds)
        yield rounds, defense
      progress.update(count + 1, f'{dataset} {seed} {"/".join(defense)}')


def with_noise_scaled(clean: Observation, noised: Observation, factor: float) -> Observation:
  """`noised` with the difference of every client's update from `clean` times `factor`."""
  clients = []
  for own in noised.clients:
    arrays = [
      before + np.float32(factor) * (after - before)
      for before, after in zip(
        clean.client(own.client_id).update.trainable, own.update.trainable, strict=True
      )
    ]
    clients.append(dataclasses.replace(own, update=WeightArrays(tuple(arrays))))
  strength = noised.defense['strength']
  defense = {**noised.defense, 'strength': {**strength, 'value': factor * strength['value']}}
  return dataclasses.replace(
    noised, clients=tuple(clients), aggregate=mean_update(clients), defense=defense
  )
