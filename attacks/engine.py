"""Gradient inversion of one round: every client's update, one after another."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from attacks.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from attacks.config import AttackConfig
from attacks.labels import Labels, infer_labels, known_labels
from attacks.results import TargetResult
from attacks.simulator import ClientSimulator
from attacks.solver import Solver, SolverState, choose_xla
from tff_shadow.errors import UserError
from tff_shadow.observations import ClientObservation, Observation

# A call of the solver lasts about this long, so that Ctrl-C and progress do not wait.
_CALL_SECS = 0.5
_NOISY_GUESSES = 16


@dataclasses.dataclass(frozen=True)
class AttackProgress:
  """Where an attack stands.

  Attributes:
    target: Client id.
    target_index: From 0.
    num_targets: Of this attack.
    restart: From 0.
    iteration: Steps taken in this restart.
    loss: Matching loss of the last step.
  """

  target: str
  target_index: int
  num_targets: int
  restart: int
  iteration: int
  loss: float


class _Failed(Exception):
  """Why a target has no result."""


def attack_observation(
  observation: Observation,
  config: AttackConfig,
  targets: Sequence[str] | None = None,
  *,
  labels: Mapping[str, Sequence[int]] | None = None,
  finished: Sequence[TargetResult] = (),
  on_result: Callable[[list[TargetResult]], None] | None = None,
  progress: Callable[[AttackProgress], None] | None = None,
  checkpoint_path: pathlib.Path | None = None,
  checkpoint_every_secs: float = 60.0,
) -> list[TargetResult]:
  """Attacks single clients of one round.

  Args:
    observation: What the server saw; nothing else is used but `labels`.
    config: Settings.
    targets: Client ids; all by default.
    labels: The labels of each target if the attacker was told them; inferred by default.
    finished: Results of an earlier, interrupted call; kept as they are.
    on_result: Called with all results so far whenever a target is done.
    progress: Called about twice a second.
    checkpoint_path: Where to keep the state of an unfinished target; it is read first, written
      every `checkpoint_every_secs` and on Ctrl-C, and deleted when the target is done.
    checkpoint_every_secs: See above.

  Returns:
    One result per target, in the order of `targets`.

  Raises:
    UserError: If a target is unknown, labels do not fit, or the observation cannot be attacked.
    KeyboardInterrupt: On Ctrl-C, after the checkpoint is written.
  """
  attack = _Attack(observation, config, progress, checkpoint_path, checkpoint_every_secs)
  targets = list(targets) if targets else [client.client_id for client in observation.clients]
  known = [client.client_id for client in observation.clients]
  for target in targets:
    if target not in known:
      raise UserError(f'--targets: no client {target!r} in this round; it has {", ".join(known)}')
  results = {result.target: result for result in finished if result.target in targets}
  todo = [target for target in targets if target not in results]
  for target in todo:
    attack.position = (targets.index(target), len(targets))
    told = None if labels is None else labels[target]
    results[target] = attack.run(observation.client(target), known.index(target), told)
    if on_result:
      on_result([results[name] for name in targets if name in results])
    if checkpoint_path:
      checkpoint_path.unlink(missing_ok=True)
  return [results[target] for target in targets]


class _Attack:
  """The models and traced functions that the targets of one round share."""

  def __init__(self, observation, config, progress, checkpoint_path, checkpoint_every_secs):
    self._observation = observation
    self._config = config
    self._progress = progress
    self._checkpoint_path = checkpoint_path
    self._checkpoint_every_secs = checkpoint_every_secs
    self._simulator = ClientSimulator(observation, config.dtype)
    self._solver: Solver | None = None
    self._control = Solver(self._simulator, config, matching=False)
    self.position = (0, 1)

  def run(self, client: ClientObservation, index: int, told: Sequence[int] | None) -> TargetResult:
    """Attacks one client; a failure becomes a result that says so."""
    labels = None
    reconstructions = self._controls(client.num_images, index)
    try:
      observed = self._observed(client)
      labels = self._labels(client, observed, told)
      done = self._restarts(client, index, labels.values, observed)
    except _Failed as failure:
      return TargetResult(
        target=client.client_id,
        images=client.num_images,
        labels=tuple(int(value) for value in labels.values) if labels else (),
        labels_source=labels.source if labels else None,
        status='failed',
        reason=str(failure),
        loss=None,
        restart_losses=(),
        chosen_restart=None,
        iterations=0,
        seconds=0.0,
        reconstructions=reconstructions,
      )
    chosen = int(np.argmin(done.restart_losses))
    return TargetResult(
      target=client.client_id,
      images=client.num_images,
      labels=tuple(int(value) for value in labels.values),
      labels_source=labels.source,
      status='ok',
      reason=None,
      loss=done.restart_losses[chosen],
      restart_losses=done.restart_losses,
      chosen_restart=chosen,
      iterations=self._config.iterations * self._config.restarts,
      seconds=round(done.seconds, 3),
      reconstructions={'attack': done.restart_images[chosen], **reconstructions},
    )

  def _observed(self, client: ClientObservation) -> list[tf.Tensor]:
    arrays = client.update.trainable
    if client.dropped:
      raise _Failed('the client dropped its update because it was not finite')
    if client.num_images < 1 or client.num_steps < 1:
      raise _Failed('the client did not train')
    if not all(np.isfinite(array).all() for array in arrays):
      raise _Failed('the update is not finite')
    if not any(array.any() for array in arrays):
      raise _Failed('the update is all zeros')
    return self._simulator.observed_gradient(client)

  def _labels(self, client, observed, told) -> Labels:
    if told is not None:
      return known_labels(
        told, client.num_images, len(self._observation.class_names), f'labels of {client.client_id}'
      )
    mean = self._observation.public_mean_image
    noise = tf.random.stateless_normal((_NOISY_GUESSES, *mean.shape), (0, 0), alg='philox').numpy()
    return infer_labels(
      self._simulator, observed, client.num_images, np.clip(mean + 0.1 * noise, 0, 1)
    )

  def _start(self, client_index: int, num_images: int, restart: int) -> np.ndarray:
    seed = (self._config.seed, client_index * self._config.restarts + restart)
    return self._config.start(self._observation.public_mean_image, num_images, seed)

  def _restarts(self, client, index, labels, observed) -> Checkpoint:
    """All restarts on one client, from its checkpoint if there is one."""
    saved = read_checkpoint(self._checkpoint_path) if self._checkpoint_path else None
    start = self._start(index, client.num_images, 0)
    if saved is None or saved.target != client.client_id:
      if self._solver is None:
        use_xla = choose_xla(self._simulator, self._config, start, labels, observed)
        self._solver = Solver(self._simulator, self._config, matching=True, use_xla=use_xla)
      saved = Checkpoint(
        client.client_id, self._solver.start(start), (), (), 0.0, self._solver.use_xla
      )
    elif self._solver is None or self._solver.use_xla != saved.use_xla:
      self._solver = Solver(self._simulator, self._config, matching=True, use_xla=saved.use_xla)
    while True:
      saved = self._one_restart(saved, labels, observed)
      losses = (*saved.restart_losses, float(saved.state.best_loss))
      images = (*saved.restart_images, saved.state.best_images.numpy().astype(np.float32))
      state = saved.state
      if len(losses) < self._config.restarts:
        state = self._solver.start(self._start(index, client.num_images, len(losses)))
      saved = dataclasses.replace(saved, state=state, restart_losses=losses, restart_images=images)
      if len(losses) == self._config.restarts:
        return saved

  def _one_restart(self, saved: Checkpoint, labels, observed) -> Checkpoint:
    """Runs the restart at work to its end."""
    steps, last_write = 1, time.monotonic()
    try:
      while (iteration := int(saved.state.iteration)) < self._config.iterations:
        begin = time.monotonic()
        stop = min(iteration + steps, self._config.iterations)
        state = self._solver.advance(saved.state, labels, observed, stop)
        loss = float(state.loss)
        duration = time.monotonic() - begin
        saved = dataclasses.replace(saved, state=state, seconds=saved.seconds + duration)
        if not np.isfinite(loss):
          raise _Failed(
            f'the matching loss became {loss} at iteration {int(state.iteration)} of restart'
            f' {len(saved.restart_losses)}'
          )
        self._report(saved, loss)
        # The first call traces, so its duration says nothing: grow by tens until it does.
        steps = int(np.clip(_CALL_SECS * (stop - iteration) / duration, 1, 10 * steps))
        if self._checkpoint_path and time.monotonic() - last_write > self._checkpoint_every_secs:
          write_checkpoint(self._checkpoint_path, saved)
          last_write = time.monotonic()
    except KeyboardInterrupt:
      if self._checkpoint_path:
        write_checkpoint(self._checkpoint_path, saved)
      raise
    return saved

  def _report(self, saved: Checkpoint, loss: float) -> None:
    if not self._progress:
      return
    index, num_targets = self.position
    restart, iteration = len(saved.restart_losses), int(saved.state.iteration)
    self._progress(AttackProgress(saved.target, index, num_targets, restart, iteration, loss))

  def _controls(self, num_images: int, index: int) -> dict[str, np.ndarray]:
    """What the attacker has without the update: same starts, same steps, no matching term."""
    labels = tf.zeros((num_images,), tf.int32)
    states: list[SolverState] = []
    for restart in range(self._config.restarts):
      state = self._control.start(self._start(index, num_images, restart))
      states.append(self._control.advance(state, labels, [], self._config.iterations))
    best = min(states, key=lambda state: float(state.best_loss))
    # The prior's weight may fall with the iterations, and with it the loss: take the last images.
    images = self._config.parametrization.images(best.parameters)
    mean = self._observation.public_mean_image.astype(np.float32)
    return {
      'prior_only': self._config.box.project(images).numpy().astype(np.float32),
      'mean_image': np.repeat(mean[None], num_images, axis=0),
    }
