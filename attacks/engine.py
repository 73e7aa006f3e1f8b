"""Gradient inversion of logged rounds: every target's restarts, side by side."""

import dataclasses
import pathlib
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attacks.checkpoints import Checkpoint, FinishedLane, read_checkpoint, write_checkpoint
from attacks.config import AttackConfig
from attacks.labels import Labels
from attacks.local_steps import LocalSteps, local_steps
from attacks.matching import SquaredMatching
from attacks.noise_covariance import NoiseCovariance
from attacks.order_search import OrderSearch, Trial
from attacks.priors import GroupConsistency
from attacks.results import TargetResult
from attacks.scoring.assignment import in_order
from attacks.shared_solvers import SharedSolvers
from attacks.solver import Evidence, Solver, SolverState, choose_xla
from attacks.targets import Target, TargetFailed, Targets
from tff_shadow.observations import AGGREGATE, Observation

# A call of the solver lasts about this long, so that Ctrl-C and progress do not wait.
_CALL_SECS = 0.5


@dataclasses.dataclass(frozen=True)
class AttackProgress:
  """Where an attack stands.

  Attributes:
    targets: Client ids at work.
    lanes: How many restarts of them run side by side.
    done: Steps taken by all lanes of all targets so far, finished ones included; `planned_steps` in
      the end.
    iteration: Steps taken by each of the lanes at work.
    loss: Mean matching loss of their last step.
    trying_orders: Whether the lanes are orders that are tried.
  """

  targets: tuple[str, ...]
  lanes: int
  done: int
  iteration: int
  loss: float
  trying_orders: bool

  def __str__(self) -> str:
    what = 'trying orders, ' if self.trying_orders else ''
    return f'{what}iteration {self.iteration}, loss {self.loss:.2e}'


def planned_steps(observation: Observation, config: AttackConfig, targets: Sequence[str]) -> int:
  """How many steps an attack on these targets of a (first) round takes at most."""
  total = len(targets) * config.restarts * config.iterations
  for name in targets:
    if name != AGGREGATE:
      steps = local_steps(observation.client(name), observation.client_training)
      total += _trial_steps(steps, config)
  return total


def _trial_steps(steps: LocalSteps, config: AttackConfig) -> int:
  """Steps under orders of a client's images that are tried, at most."""
  tries = config.tries_orders and steps.is_ordered
  return config.orders * config.order_iterations if tries else 0


def attack_observation(
  observation: Observation | Sequence[Observation],
  config: AttackConfig,
  targets: Sequence[str] | None = None,
  *,
  labels: Mapping[str, Sequence[int]] | None = None,
  inferred: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
  weights: Mapping[str, Sequence[Sequence[np.ndarray]]] | None = None,
  covariances: Sequence[NoiseCovariance] = (),
  orders: Mapping[str, Sequence[int]] | None = None,
  finished: Sequence[TargetResult] = (),
  on_result: Callable[[list[TargetResult]], None] | None = None,
  progress: Callable[[AttackProgress], None] | None = None,
  checkpoint_path: pathlib.Path | None = None,
  checkpoint_every_secs: float = 60.0,
  controls: bool = True,
  shared: SharedSolvers | None = None,
) -> list[TargetResult]:
  """Attacks clients of one round, or of several rounds jointly.

  Targets and their restarts run side by side, `config.lanes` at a time; what comes out for one
  does not depend on which others run beside it.

  Args:
    observation: What the server saw; nothing else is used but `labels`. Several rounds are attacked
      jointly: every target must have trained on the same images in each.
    config: Settings.
    targets: Client ids, or `observations.AGGREGATE` for the mean of all clients; all clients by
      default.
    labels: The labels of each target if the attacker was told them; inferred by default.
    inferred: Labels that the attacker has inferred by a rule of its own, of some of the targets;
      those of the others are inferred by `config.label_rule`.
    weights: For each target, per round and per trainable variable, what observed and simulated
      gradient are multiplied by before they are compared: 1 over the deviation of noise that was
      added to them, say. As they are by default.
    covariances: Of the noise on the clients' gradients, one per round, in units of which observed
      and simulated gradient are then compared; with `SquaredMatching()` alone.
    orders: `TargetResult.order` of targets where it is known; searched by default.
    finished: Results of an earlier, interrupted call; kept as they are.
    on_result: Called with all results so far whenever targets are done.
    progress: Called about twice a second.
    checkpoint_path: Where to keep the state of unfinished targets; it is read first, written every
      `checkpoint_every_secs` and on Ctrl-C, and deleted when they are done.
    checkpoint_every_secs: See above.
    controls: Whether results have what the attacker knows without the update.
    shared: Solvers of other attacks on these rounds, so that they need not be traced again.

  Returns:
    One result per target, in the order of `targets`.

  Raises:
    UserError: If a target is unknown, labels do not fit, or the observation cannot be attacked.
    ValueError: If `shared` is of other rounds, or `covariances` do not go with the rest.
    KeyboardInterrupt: On Ctrl-C, after the checkpoint is written.
  """
  observations = [observation] if isinstance(observation, Observation) else list(observation)
  shared = shared or SharedSolvers(observations, config.dtype)
  if not shared.fits(observations, config.dtype):
    raise ValueError('the shared solvers are of other rounds')
  if covariances and (
    weights is not None
    or config.matching != SquaredMatching()
    or len(covariances) != len(observations)
  ):
    raise ValueError('covariances of the noise, one per round, go with plain squared errors alone')
  known = Targets(observations, config, shared.simulators)
  names = list(targets) if targets else known.default_names
  chosen = [
    known.find(name, None if labels is None else labels[name], inferred.get(name)) for name in names
  ]
  attack = _Attack(
    known,
    config,
    shared,
    weights,
    covariances,
    orders or {},
    progress,
    checkpoint_path,
    checkpoint_every_secs,
    controls,
  )
  results = {result.target: result for result in finished if result.target in names}
  for group in attack.groups([target for target in chosen if target.name not in results]):
    attack.done = planned_steps(observations[0], config, list(results))
    results.update((result.target, result) for result in attack.run(group))
    if on_result:
      on_result([results[name] for name in names if name in results])
    if checkpoint_path:
      checkpoint_path.unlink(missing_ok=True)
  return [results[name] for name in names]


class _Lane(NamedTuple):
  """A restart on a target.

  Attributes:
    name: In checkpoints; what stands before the last slash is the target's.
    target: Attacked.
    restart: From 0.
    order: Of its images in the local steps; None for that of `Target.steps`.
  """

  name: str
  target: Target
  restart: int
  order: Sequence[int] | None


class _Attack:
  """Attacks groups of targets, one after another."""

  def __init__(
    self,
    known,
    config,
    shared,
    weights,
    covariances,
    known_orders,
    progress,
    checkpoint_path,
    checkpoint_every_secs,
    with_controls,
  ):
    self._known = known
    self._config = config
    self._shared = shared
    self._weights = weights
    self._covariances = tuple(
      NoiseCovariance(*(tf.constant(array, config.dtype) for array in own)) for own in covariances
    )
    self._known_orders = known_orders
    self._progress = progress
    self._checkpoint_path = checkpoint_path
    self._checkpoint_every_secs = checkpoint_every_secs
    self._with_controls = with_controls
    self._order_config = dataclasses.replace(
      config,
      iterations=config.order_iterations,
      restarts=1,
      # It would tie images together that are sought under different orders.
      group_consistency=GroupConsistency(weight=0.0),
    )
    # Of the targets of the present group.
    self._tried: dict[str, list[Trial]] = {}
    self._orders: dict[str, Sequence[int]] = {}
    # Steps of it that were made, or are not needed, before those of the lanes at work.
    self._before = 0
    self._prior_weights = {
      prior.name: tf.constant(prior.weight, config.dtype) for prior in config.image_priors
    }
    self.done = 0

  def groups(self, targets: Sequence[Target]) -> list[list[Target]]:
    """Targets that are attacked together: of one kind, and no more lanes than allowed."""
    size = max(1, self._config.lanes // self._config.restarts)
    kinds: dict = {}
    for target in targets:
      kinds.setdefault((target.num_images, target.steps), []).append(target)
    return [
      group[start : start + size]
      for group in kinds.values()
      for start in range(0, len(group), size)
    ]

  def run(self, group: list[Target]) -> list[TargetResult]:
    """Attacks targets of one kind; a failure becomes a result that says so."""
    labels: dict[str, Labels] = {}
    failures: dict[str, str] = {}
    for target in group:
      try:
        self._known.check(target)
        labels[target.name] = self._known.labels(target)
      except TargetFailed as failure:
        failures[target.name] = str(failure)
    healthy = [target for target in group if target.name not in failures]
    statistics = self._known.statistics(healthy)
    hold = self._config.hold_contrast and not statistics
    contrast = self._known.hidden_contrast if hold else None
    controls = self._controls(group, contrast) if self._with_controls else {}
    known_labels = [labels[target.name] for target in healthy]
    found = self._restarts(healthy, known_labels, statistics, contrast) if healthy else {}
    return [
      self._result(
        target,
        labels.get(target.name),
        found.get(target.name, ()),
        failures.get(target.name),
        controls.get(target.name, {}),
      )
      for target in group
    ]

  def _result(self, target, labels, restarts, reason, controls) -> TargetResult:
    """From the finished restarts of a target, or the reason why it has none."""
    # One that diverged later on still has the best images that it came past.
    sound = [k for k, restart in enumerate(restarts) if np.isfinite(restart.loss)]
    whole = [k for k in sound if restarts[k].diverged_at < 0]
    if not reason and not whole:
      reason = (
        f'the matching loss stopped being finite in all restarts, first at iteration'
        f' {min(restart.diverged_at for restart in restarts)}'
      )
    values = () if labels is None else labels.values
    attacked = {}
    if sound:
      # A mean would suffer from one that stopped early; the best does not.
      used = whole if whole and self._config.combination == 'mean' else sound
      attacked['attack'] = self._combined([(restarts[k].loss, restarts[k].images) for k in used])
    chosen = min(sound, key=lambda k: restarts[k].loss) if sound else None
    tried = self._tried.get(target.name, ())
    steps = self._config.iterations * len(restarts) + self._config.order_iterations * len(tried)
    seconds = sum(own.seconds for own in (*restarts, *tried))
    order = self._orders.get(target.name)
    return TargetResult(
      target=target.name,
      images=target.num_images,
      labels=tuple(int(value) for value in values),
      labels_source=labels.source if labels else None,
      status='ok' if sound else 'failed',
      reason=reason,
      loss=restarts[chosen].loss if sound else None,
      restart_losses=tuple(own.loss if k in sound else None for k, own in enumerate(restarts))
      if sound
      else (),
      chosen_restart=chosen,
      iterations=steps if sound else 0,
      seconds=round(seconds, 3),
      order=None if order is None else tuple(map(int, order)),
      reconstructions={**attacked, **controls},
    )

  def _restarts(
    self, targets: list[Target], labels: list[Labels], statistics, contrast: float | None
  ) -> dict[str, list[FinishedLane]]:
    """All restarts of targets of one kind, from the checkpoint if there is one."""
    config = self._config
    saved = read_checkpoint(self._checkpoint_path) if self._checkpoint_path else None
    finished = dict(saved.finished) if saved else {}
    self._tried = dict(saved.tried) if saved else {}
    self._before = 0
    self._orders = self._found_orders(targets, labels, statistics, contrast, saved)
    # More restarts than lanes: the one target of the group takes them in turns.
    for first in range(0, config.restarts, config.lanes):
      restarts = range(first, min(first + config.lanes, config.restarts))
      lanes = [
        _Lane(_lane_name(target, restart), target, restart, self._orders.get(target.name))
        for target in targets
        for restart in restarts
      ]
      if not all(lane.name in finished for lane in lanes):
        state, seconds = self._run_lanes(
          lanes, targets, labels, statistics, contrast, config, saved, finished
        )
        for index, lane in enumerate(lanes):
          finished[lane.name] = FinishedLane(
            float(state.best_loss[index]),
            state.best_images[index].numpy().astype(np.float32),
            seconds / len(lanes),
            int(state.diverged_at[index]),
          )
    return {
      target.name: [finished[_lane_name(target, k)] for k in range(config.restarts)]
      for target in targets
    }

  def _found_orders(
    self, targets: list[Target], labels: list[Labels], statistics, contrast: float | None, saved
  ) -> dict[str, Sequence[int]]:
    """The order of each target's images that explains its update best; none where none is used."""
    config = self._config
    if not (config.uses_order and targets[0].steps[0].is_ordered):
      return {}
    found = {target.name: target.steps[0].order for target in targets} | self._known_orders
    if config.orders == 1:
      return found
    searches = {
      target.name: OrderSearch(
        target.steps[0],
        own.values,
        config.orders,
        (config.seed, target.index),
        self._tried.get(target.name, ()),
      )
      for target, own in zip(targets, labels, strict=True)
      if target.name not in self._known_orders
    }
    self._before = sum(len(search.tried) for search in searches.values()) * config.order_iterations
    while lanes := [
      _Lane(f'{target.name}/order_{len(searches[target.name].tried) + k}', target, 0, order)
      for target in targets
      if target.name in searches
      for k, order in enumerate(searches[target.name].next_orders())
    ]:
      trials = []
      for first in range(0, len(lanes), config.lanes):
        some = lanes[first : first + config.lanes]
        state, seconds = self._run_lanes(
          some, targets, labels, statistics, contrast, self._order_config, saved, {}
        )
        trials += [
          Trial(lane.order, float(loss), seconds / len(some))
          for lane, loss in zip(some, state.best_loss, strict=True)
        ]
        self._before += len(some) * config.order_iterations
      for lane, trial in zip(lanes, trials, strict=True):
        searches[lane.target.name].tried.append(trial)
      self._tried = {name: search.tried for name, search in searches.items()}
    self._before = len(targets) * _trial_steps(targets[0].steps[0], config)
    return found | {name: search.best for name, search in searches.items()}

  def _run_lanes(
    self, lanes: list[_Lane], targets, labels, statistics, contrast, config, saved, finished
  ) -> tuple[SolverState, float]:
    """Runs lanes to their end; returns the state and the seconds it took."""
    names = tuple(lane.name for lane in lanes)
    if saved is not None and saved.lanes != names:
      saved = None
    seeds = np.array([self._seed(lane.target, lane.restart) for lane in lanes], np.int32)
    evidence = self._evidence(lanes, targets, labels, statistics, seeds)
    logits = None
    if config.joint_labels:
      start_logits = self._known.start_logits(labels)
      logits = np.stack([start_logits[targets.index(lane.target)] for lane in lanes])
    start = np.stack([self._start(lane.target, lane.restart) for lane in lanes])
    kind = ('attack', targets[0].num_images, targets[0].steps, len(lanes), contrast)
    solver = self._shared.get(config, kind)
    if solver is None or (saved and saved.use_xla != solver.use_xla):
      solver = self._solver(
        config, targets[0].steps, contrast, saved, start, seeds, logits, evidence
      )
      self._shared.put(config, kind, solver)
    state, seconds = solver.start(start, seeds, logits), 0.0
    if saved is not None:
      state, seconds = saved.restore(state), saved.seconds
    return self._advance(solver, config, state, evidence, seconds, names, finished)

  def _solver(self, config, steps, contrast, saved, start, seeds, logits, evidence) -> Solver:
    """A solver for targets of a kind, compiled if that is what is wanted, or faster."""
    simulators = self._known.simulators

    def build(use_xla: bool) -> Solver:
      return Solver(simulators, steps, config, matching=True, contrast=contrast, use_xla=use_xla)

    if saved is not None:
      return build(saved.use_xla)
    if config.xla != 'auto':
      return build(config.xla == 'on')
    plain, compiled = build(False), build(True)
    # On a CPU several lanes keep all cores busy without XLA, whose loops take one after another.
    if len(start) > 1 and not tf.config.list_logical_devices('GPU'):
      return plain
    state = plain.start(start, seeds, logits)
    return compiled if choose_xla(plain, state, evidence, compiled) else plain

  def _advance(
    self, solver, config, state, evidence, seconds, names, finished
  ) -> tuple[SolverState, float]:
    steps, last_write = 1, time.monotonic()

    def save() -> None:
      if self._checkpoint_path:
        write_checkpoint(
          self._checkpoint_path,
          Checkpoint.of(names, state, seconds, solver.use_xla, finished, self._tried),
        )

    try:
      while (iteration := int(state.iteration)) < config.iterations:
        begin = time.monotonic()
        stop = min(iteration + steps, config.iterations)
        state = solver.advance(state, evidence, stop)
        losses = state.loss.numpy()
        duration = time.monotonic() - begin
        seconds += duration
        self._report(names, len(finished), stop, losses, config is self._order_config)
        if not np.isfinite(losses).any():
          break
        # The first call traces, so its duration says nothing: grow by tens until it does.
        steps = int(np.clip(_CALL_SECS * (stop - iteration) / duration, 1, 10 * steps))
        if time.monotonic() - last_write > self._checkpoint_every_secs:
          save()
          last_write = time.monotonic()
    except KeyboardInterrupt:
      save()
      raise
    return state, seconds

  def _report(
    self, names, num_finished: int, iteration: int, losses: np.ndarray, trying_orders: bool
  ) -> None:
    if self._progress:
      targets = dict.fromkeys(name.rpartition('/')[0] for name in names)
      earlier = self._before + num_finished * self._config.iterations
      done = self.done + earlier + iteration * len(names)
      self._progress(
        AttackProgress(
          tuple(targets), len(names), done, iteration, float(np.mean(losses)), trying_orders
        )
      )

  def _evidence(self, lanes, targets, labels, statistics, seeds) -> Evidence:
    weights = ()
    if self._weights is not None:
      weights = _stacked([self._weights[target.name] for target in targets], self._config.dtype)
    orders = [lane.order for lane in lanes if lane.order is not None]
    return Evidence(
      target=tf.constant([targets.index(lane.target) for lane in lanes]),
      labels=tf.constant(np.stack([own.values for own in labels])),
      gradients=_stacked([self._known.gradients(target) for target in targets], self._config.dtype),
      statistics=statistics,
      seeds=tf.constant(seeds),
      weights=weights,
      covariances=self._covariances,
      prior_weights=self._prior_weights,
      orders=tf.constant(np.stack(orders), tf.int32) if orders else (),
    )

  def _seed(self, target: Target, restart: int) -> tuple[int, int]:
    return (self._config.seed, target.index * self._config.restarts + restart)

  def _start(self, target: Target, restart: int) -> np.ndarray:
    mean_image = self._known.public_mean_image
    return self._config.start(mean_image, target.num_images, self._seed(target, restart))

  def _controls(
    self, group: list[Target], contrast: float | None
  ) -> dict[str, dict[str, np.ndarray]]:
    """What the attacker has without the update: same starts, same steps, no matching term."""
    config = self._config
    mean = self._known.public_mean_image.astype(np.float32)
    kind = ('control', group[0].num_images, contrast)
    control = self._shared.get(config, kind)
    if control is None:
      control = Solver(
        self._known.simulators, group[0].steps, config, matching=False, contrast=contrast
      )
      self._shared.put(config, kind, control)
    nothing = tf.zeros((1, group[0].num_images), tf.int32)
    found: dict[str, list[tuple[float, np.ndarray]]] = {}
    for first in range(0, config.restarts, config.lanes):
      restarts = range(first, min(first + config.lanes, config.restarts))
      lanes = [(target, restart) for target in group for restart in restarts]
      seeds = np.array([self._seed(*lane) for lane in lanes], np.int32)
      groups = tf.constant([group.index(target) for target, _ in lanes])
      state = control.start(np.stack([self._start(*lane) for lane in lanes]), seeds)
      evidence = Evidence(
        groups, nothing, (), (), tf.constant(seeds), prior_weights=self._prior_weights
      )
      state = control.advance(state, evidence, config.iterations)
      # The prior's weight may fall with the iterations, and with it the loss: the last images.
      images = control.images(state).numpy().astype(np.float32)
      for index, (target, _) in enumerate(lanes):
        found.setdefault(target.name, []).append((float(state.best_loss[index]), images[index]))
    return {
      target.name: {
        'prior_only': self._combined(found[target.name]),
        'mean_image': np.repeat(mean[None], target.num_images, axis=0),
      }
      for target in group
    }

  def _combined(self, restarts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """The images [B, H, W, C] that restarts make together, each a loss and its images."""
    best = min(restarts, key=lambda restart: restart[0])[1]
    if self._config.combination == 'best':
      return best
    return np.mean([in_order(images, best) for _, images in restarts], axis=0)


def _stacked(per_target: Sequence[Sequence[Sequence[Any]]], dtype: str) -> tuple:
  """Per view, per trainable variable [T, ...], from one such nest for each target."""
  return tuple(
    tuple(tf.constant(np.stack(tensors), dtype) for tensors in zip(*views, strict=True))
    for views in zip(*per_target, strict=True)
  )


def _lane_name(target: Target, restart: int) -> str:
  return f'{target.name}/{restart}'
