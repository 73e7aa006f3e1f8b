"""A federated training run: rounds, evaluation, saved state, logged observations."""

import asyncio
import collections
import dataclasses
import functools
import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators import observation_tap_factory
from tff_shadow.data import Examples, FederatedData
from tff_shadow.errors import UserError
from tff_shadow.learning.client_work import BuildGradientFn, build_plain_gradient_fn
from tff_shadow.learning.evaluation import estimate_batch_norm_statistics, evaluate
from tff_shadow.learning.fed_avg import ButAggregation, weighted_fed_avg_but_aggregation
from tff_shadow.learning.keras_task import model_fn_of_config, model_weights
from tff_shadow.learning.noise_settings import ShadowNoise
from tff_shadow.learning.observed_round import Participant, observation_of
from tff_shadow.learning.round_sampler import LocalTask, RoundSampler
from tff_shadow.learning.run_state import RunState
from tff_shadow.learning.settings import TrainingSettings
from tff_shadow.learning.shadow_fed_avg import shadow_fed_avg_but_aggregation
from tff_shadow.models import freeze_batch_norm, model_from_config, model_to_config
from tff_shadow.observations import BatchNormSharing, write_round
from tff_shadow.published import ClientShadows, PublishedDefense

# What TFF's secure metrics say of their sums: bounds, and how many clients were clipped to them.
_SECURE_SUMS = 'secure_sum_measurements'


@dataclasses.dataclass(frozen=True)
class RoundReport:
  """What a caller may show after a round.

  Attributes:
    round_num: The round, from 1.
    seconds: Wall time of the round, evaluation and saving included.
    metrics: As written to metrics.csv.
    dropped: Ids of clients whose update was not finite; none where the server was not told whose.
  """

  round_num: int
  seconds: float
  metrics: dict[str, float]
  dropped: tuple[str, ...]


class TrainingRun:
  """Trains `model` on `data` into a run directory.

  Needs a TFF context of this thread (`tff_shadow.execution.local_worker_context`).
  """

  def __init__(
    self,
    data: FederatedData,
    model: tf.keras.Model,
    settings: TrainingSettings,
    run_dir: pathlib.Path,
    *,
    evaluate_every_rounds: int = 1,
    save_every_rounds: int = 5,
  ):
    """Builds the processes; nothing runs yet.

    Args:
      data: The clients and the validation split.
      model: Architecture and initial weights; changed by `train` to the trained weights.
      settings: See there.
      run_dir: Takes state/, metrics.csv, tensorboard/, observations/ and truth/, and what the
        clients of the published defence keep in client_state/.
      evaluate_every_rounds: Validation metrics are computed in rounds divisible by it and the last.
      save_every_rounds: The state is saved in rounds divisible by it and the last.
    """
    self._data = data
    self._model = model
    self._settings = settings
    self._run_dir = run_dir
    self._evaluate_every = evaluate_every_rounds
    self._save_every = save_every_rounds
    self._sampler = RoundSampler(data, settings)
    if settings.batch_norm_sharing == 'frozen':
      freeze_batch_norm(model)
    self._initial_weights = model_weights(model)
    self._processes: dict[bool, tff.learning.templates.LearningProcess] = {}
    self._but_aggregation: ButAggregation | None = None
    self._process_of(1)  # The others differ in nothing that could be a mistake.
    self._shadows = self._build_shadows()
    self._validation_images = data.validation.float_images()
    self._public_mean_image = self._validation_images.mean(axis=0)

  @property
  def shadows(self) -> ClientShadows | None:
    """The clients' side of the published defence; None without it."""
    return self._shadows

  def train(
    self,
    *,
    resume: bool,
    report: Callable[[RoundReport], None] = lambda report: None,
    report_latents: Callable[[int], None] = lambda images: None,
  ) -> None:
    """Runs the rounds that are not done yet; the model then holds the trained weights.

    On Ctrl-C the last finished round is saved before KeyboardInterrupt goes on.

    Args:
      resume: Continue from the newest saved state instead of the initial weights. A run that was
        ended before it saved any begins.
      report: Called after every round.
      report_latents: Before the first round of the published defence, called with the number of
        training images whose latents are fitted.

    Raises:
      UserError: If no saved state can be read, or all clients of a round were dropped.
    """
    run_state = RunState(self._run_dir / 'state')
    state, done = self._start(run_state, resume)
    if self._shadows:
      self._shadows.fit_latents(report_latents)
    managers = self._release_managers()
    try:
      for round_num in range(done + 1, self._settings.rounds + 1):
        started = time.monotonic()
        new_state, metrics, dropped = self._round(state, round_num)
        if round_num % self._evaluate_every == 0 or round_num == self._settings.rounds:
          metrics.update(self._validate(new_state))
        for manager in managers:
          asyncio.run(manager.release(metrics, round_num))
        # Only now: a round that Ctrl-C cuts short before its metrics are written is not done.
        if self._shadows:
          self._shadows.commit()
        state, done = new_state, round_num
        if round_num % self._save_every == 0 or round_num == self._settings.rounds:
          self._save(run_state, state, round_num)
        report(RoundReport(round_num, time.monotonic() - started, metrics, dropped))
    except (KeyboardInterrupt, UserError):
      self._save(run_state, state, done)
      raise
    self._load_into_model(state)

  def _process_of(self, round_num: int) -> tff.learning.templates.LearningProcess:
    """The process of a round, made when it is first needed.

    The tap keeps no state, so all processes exchange theirs. The updates of a round are collected
    only where they are logged.
    """
    observed = round_num in self._settings.observed_rounds
    if observed not in self._processes:
      self._processes[observed] = self._build(observed)
    return self._processes[observed]

  def _build(self, observed: bool) -> tff.learning.templates.LearningProcess:
    settings = self._settings
    shadow, baseline = settings.shadow_defense, settings.baseline
    decoys = shadow.decoys if shadow else None
    config = model_to_config(self._model)
    traced = _Traced(
      json.dumps(config),
      tuple(self._data.image_shape),
      settings.batch_norm_sharing,
      (settings.client_training.learning_rate, settings.client_training.momentum),
      (settings.server_learning_rate, settings.server_momentum),
      shadow.noise if shadow else None,
      settings.secure_measurements,
    )
    try:
      if baseline is None and decoys is None and _is_of_keras(config):
        return _shared_process(traced, observed)
      if self._but_aggregation is None:
        gradients = {'build_gradient_fn': baseline.gradients(self._model)} if baseline else {}
        self._but_aggregation = _fed_avg(traced, decoys, **gradients)
      return self._but_aggregation(self._aggregator(observed))
    except ValueError as error:
      if shadow is None and baseline is None:
        raise
      raise UserError(f'--defense={"shadow" if shadow else baseline.name}: {error}') from error

  def _aggregator(self, observed: bool) -> tff.aggregators.WeightedAggregationFactory:
    if self._settings.baseline is None:
      return _mean(observed)
    clients_per_round = self._settings.clients_per_round or len(self._data.clients)
    return self._settings.baseline.aggregator(_tap(observed), clients_per_round)

  def _start(self, run_state: RunState, resume: bool) -> tuple[Any, int]:
    process = self._process_of(1)
    state = process.initialize()
    if resume and run_state.any():
      saved, done = run_state.load_latest(_without_hparams(state))
      if self._shadows:
        self._shadows.load(done)
      return saved._replace(client_work=state.client_work), done
    if resume:
      logging.warning('nothing was saved of this run yet; it begins with round 1')
    state = process.set_model_weights(state, self._initial_weights)
    self._save(run_state, state, 0)
    return state, 0

  def _save(self, run_state: RunState, state: Any, round_num: int) -> None:
    """The clients' part first: a round whose state is there has all it needs."""
    if self._shadows:
      self._shadows.save(round_num)
    run_state.save(_without_hparams(state), round_num)

  def _with_learning_rate(self, state: Any, round_num: int) -> Any:
    """The state with the clients' learning rate of a round."""
    hparams = collections.OrderedDict(state.client_work)
    hparams['learning_rate'] = np.float32(self._settings.training_in(round_num).learning_rate)
    return state._replace(client_work=hparams)

  def _build_shadows(self) -> ClientShadows | None:
    settings = self._settings
    if not isinstance(settings.defense, PublishedDefense):
      return None
    return ClientShadows(
      settings.defense,
      self._data,
      self._model,
      settings.rounds,
      settings.batch_norm_sharing,
      self._run_dir / 'client_state',
    )

  def _release_managers(self) -> list[tff.program.ReleaseManager]:
    return [
      tff.program.CSVFileReleaseManager(self._run_dir / 'metrics.csv', key_fieldname='round'),
      tff.program.TensorBoardReleaseManager(self._run_dir / 'tensorboard'),
    ]

  def _round(
    self, state: Any, round_num: int
  ) -> tuple[Any, collections.OrderedDict, tuple[str, ...]]:
    tasks = self._sampler.sample(round_num)
    observed = round_num in self._settings.observed_rounds
    datasets, metrics = self._client_data(tasks, state, round_num)
    state = self._with_learning_rate(state, round_num)
    output = self._process_of(round_num).next(state, datasets)
    work = output.metrics['client_work']
    num_dropped = int(np.sum(work['non_finite']))
    if num_dropped == len(tasks):
      raise UserError(
        f'round {round_num}: the updates of all {len(tasks)} clients were not finite;'
        ' lower --client_learning_rate'
      )
    seen = self._observed(output.metrics['aggregator']) if observed else None
    flags = _dropped(work['non_finite'], seen, len(tasks))
    dropped = tuple(t.client_id for t, flag in zip(tasks, flags, strict=True) if flag)
    for client_id in dropped:
      logging.warning('round %d: the update of %s was not finite; dropped it', round_num, client_id)
    if num_dropped and not dropped:
      logging.warning(
        'round %d: %d of %d updates were not finite; dropped them (whose they were is told of'
        ' observed rounds, and without secure measurements)',
        round_num,
        num_dropped,
        len(tasks),
      )
    if observed:
      self._log(round_num, state, tasks, flags, seen)
    figures = {name: value for name, value in work['train'].items() if name != _SECURE_SUMS}
    metrics.update((f'train/{name}', float(value)) for name, value in sorted(figures.items()))
    metrics['train/dropped_clients'] = float(num_dropped)
    if self._settings.shadow_defense is not None:
      metrics['noise/maps_fell_back'] = float(work['maps_fell_back'])
      for name in ('sent_norm', 'fell_back'):
        metrics[f'noise/{name}'] = float(output.metrics['aggregator'][name])
    if self._settings.baseline is not None:
      for name in self._settings.baseline.figures:
        metrics[f'defense/{name}'] = float(output.metrics['aggregator'][name])
    return output.state, metrics, dropped

  def _client_data(
    self, tasks: list[LocalTask], state: Any, round_num: int
  ) -> tuple[list[tf.data.Dataset], collections.OrderedDict]:
    """What each client puts into the round, and figures of it."""
    metrics = collections.OrderedDict()
    if not self._shadows:
      return [task.dataset for task in tasks], metrics
    weights = state.global_model_weights
    datasets, figures = [], []
    for task in tasks:
      local = self._settings.local_training(task.client_id, round_num)
      images, figure = self._shadows.prepare(task.client_id, task.order, local, weights, round_num)
      labels = self._data.clients[task.client_id].labels[task.order]
      element = collections.OrderedDict(x=images, y=labels)
      datasets.append(tf.data.Dataset.from_tensor_slices(element).batch(local.batch_size))
      figures.append(figure)
    for name in figures[0]:
      metrics[name] = float(np.mean([figure[name] for figure in figures]))
    return datasets, metrics

  def _observed(self, measurements: Any) -> Any:
    """The tap's part of the aggregator's measurements; the tap is inside the defence."""
    if self._settings.baseline is not None:
      return self._settings.baseline.observed(measurements)
    if self._settings.shadow_defense is not None:
      measurements = measurements['inner']
    return measurements['observation']

  def _validate(self, state: Any) -> dict[str, float]:
    self._load_into_model(state)
    metrics = evaluate(self._model, self._validation_images, self._data.validation.labels)
    return {f'validation/{name}': value for name, value in metrics.items()}

  def _load_into_model(self, state: Any) -> None:
    tff.learning.models.ModelWeights(
      list(state.global_model_weights.trainable), list(state.global_model_weights.non_trainable)
    ).assign_weights_to(self._model)
    if self._settings.batch_norm_sharing == 'local':
      estimate_batch_norm_statistics(self._model, self._validation_images)

  def _log(self, round_num, state, tasks, flags, observed) -> None:
    """Writes the observation of a round, and apart from it the truth."""
    settings = self._settings
    participants = [
      Participant(
        task.client_id,
        len(task.truth.images),
        task.num_steps,
        settings.client_batch_sizes.get(task.client_id),
        bool(flag),
      )
      for task, flag in zip(tasks, flags, strict=True)
    ]
    observation = observation_of(
      observed,
      state.global_model_weights,
      self._model,
      settings.training_in(round_num),
      participants,
      round_num=round_num,
      dataset=self._data.name,
      image_shape=tuple(self._data.image_shape),
      class_names=self._data.class_names,
      batch_norm_sharing=settings.batch_norm_sharing,
      defense=settings.defense.public_settings() if settings.defense else {'name': 'none'},
      public_mean_image=self._public_mean_image,
    )
    write_round(self._run_dir, observation, {task.client_id: task.truth for task in tasks})


class _Traced(NamedTuple):
  """All that the processes of a run are made of, but decoys and what a baseline does."""

  model_config: str
  image_shape: tuple[int, int, int]
  batch_norm_sharing: BatchNormSharing
  local_sgd: tuple[float, float]
  server_sgd: tuple[float, float]
  noise: ShadowNoise | None
  secure_measurements: bool


def _dropped(non_finite: Any, seen: Any, num_clients: int) -> np.ndarray:
  """Which clients were dropped, as far as the server can tell: flags [num_clients].

  Args:
    non_finite: Of the client work: a flag per client, or how many were dropped.
    seen: What the tap saw of the round; None where it was not there.
    num_clients: In the round.
  """
  if np.ndim(non_finite):
    return np.asarray(non_finite)
  if not non_finite or seen is None:
    return np.zeros(num_clients, np.int32)
  sent = tf.nest.flatten(seen['updates'])
  return 1 - np.any([np.any(array.reshape(num_clients, -1), axis=1) for array in sent], axis=0)


def _fed_avg(
  traced: _Traced,
  decoys: Examples | None = None,
  build_gradient_fn: BuildGradientFn = build_plain_gradient_fn,
) -> ButAggregation:
  config = json.loads(traced.model_config)
  build_sgdm = tff.learning.optimizers.build_sgdm
  arguments = {
    'model_fn': model_fn_of_config(config, traced.image_shape, traced.batch_norm_sharing),
    'client_optimizer_fn': build_sgdm(*traced.local_sgd),
    'server_optimizer_fn': build_sgdm(*traced.server_sgd),
    'batch_norm_sharing': traced.batch_norm_sharing,
    'secure_measurements': traced.secure_measurements,
  }
  if traced.noise is not None:
    built = shadow_fed_avg_but_aggregation(
      **arguments,
      noise=traced.noise,
      decoys=decoys,
      shadow_model_fn=lambda: model_from_config(config),
    )
  else:
    built = weighted_fed_avg_but_aggregation(**arguments, build_gradient_fn=build_gradient_fn)
  model_from_config(config)  # Undoes what building it in a graph changes: `restore_eager_keras`.
  return built


def _is_of_keras(config: Any) -> bool:
  """Whether all layers are Keras' own: of others a new definition may have the same config."""
  if isinstance(config, dict):
    own = str(config.get('module', 'keras.')).startswith('keras.')
    return own and all(map(_is_of_keras, config.values()))
  return not isinstance(config, list) or all(map(_is_of_keras, config))


def _without_hparams(state: Any) -> Any:
  """What is saved: the clients' hyperparameters are those of the settings, not of the state."""
  return state._replace(client_work=())


def _tap(observed: bool) -> Callable[[Any], Any]:
  return observation_tap_factory if observed else lambda factory: factory


def _mean(observed: bool) -> tff.aggregators.WeightedAggregationFactory:
  return _tap(observed)(tff.aggregators.MeanFactory())


# Runs of one process, of other seeds say, that train an architecture so share what was traced; each
# may have rounds that are observed and others.
_shared_fed_avg = functools.lru_cache(maxsize=4)(_fed_avg)


@functools.lru_cache(maxsize=8)
def _shared_process(traced: _Traced, observed: bool) -> tff.learning.templates.LearningProcess:
  return _shared_fed_avg(traced)(_mean(observed))
