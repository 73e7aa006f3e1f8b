"""The inner loop of an attack: many optimiser steps per call of one traced function."""

import time
from typing import NamedTuple

import tensorflow as tf

from attacks.config import AttackConfig
from attacks.rectifiers import SurrogateRectifier
from attacks.simulator import ClientSimulator

# A step slower than this is not tried with XLA on a CPU, where compiling a large network takes
# longer than it could win.
_XLA_WORTH_TRYING_SECS = 0.02
_MEASURED_STEPS = 10
# Compiling has to win clearly: a busy machine's timings scatter.
_XLA_MUST_SAVE = 0.2


class SolverState(NamedTuple):
  """One attack between two steps; everything that resuming needs.

  Attributes:
    parameters: What the optimiser moves, in the shape of the images [B, H, W, C].
    first_moment: Of Adam.
    second_moment: Of Adam.
    iteration: int32, steps taken.
    loss: Objective's own loss at the last step's images: matching, or the prior in a control.
    best_loss: The least of these so far; infinite before the first step.
    best_images: The images it was found at.
  """

  parameters: tf.Tensor
  first_moment: tf.Tensor
  second_moment: tf.Tensor
  iteration: tf.Tensor
  loss: tf.Tensor
  best_loss: tf.Tensor
  best_images: tf.Tensor


class Solver:
  """Runs attacks on targets of one simulator; traced once per shape of the image batch.

  The observed gradient is an argument, so that all clients of a round share the trace.
  """

  def __init__(
    self, simulator: ClientSimulator, config: AttackConfig, *, matching: bool, use_xla: bool = False
  ):
    """Stores the pieces.

    Args:
      simulator: Of the client.
      config: Settings.
      matching: False deletes the matching term: the prior-only control.
      use_xla: Whether a step is compiled by XLA.
    """
    self._simulator = simulator
    self._config = config
    self._matching = matching
    self.use_xla = use_xla
    self._step = tf.function(self._one_step, jit_compile=use_xla, reduce_retracing=True)
    self._steps = tf.function(self._many_steps)

  def start(self, images) -> SolverState:
    """The state before the first step from start images [B, H, W, C]."""
    images = tf.constant(images, self._simulator.dtype)
    parameters = self._config.parametrization.parameters(images)
    infinity = tf.constant(float('inf'), images.dtype)
    zeros = tf.zeros_like(parameters)
    return SolverState(
      parameters, zeros, zeros, tf.constant(0, tf.int32), infinity, infinity, images
    )

  def advance(
    self, state: SolverState, labels: tf.Tensor, observed: list[tf.Tensor], stop: int
  ) -> SolverState:
    """Runs steps until `state.iteration` is `stop`.

    The same steps give the same bits however they are divided into calls.
    """
    return self._steps(state, tf.constant(labels), tuple(observed), tf.constant(stop, tf.int32))

  def _many_steps(self, state, labels, observed, stop):
    return SolverState(
      *tf.while_loop(
        lambda *s: SolverState(*s).iteration < stop,
        lambda *s: tuple(self._step(SolverState(*s), labels, observed)),
        tuple(state),
      )
    )

  def _one_step(self, state: SolverState, labels, observed) -> SolverState:
    config = self._config
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(state.parameters)
      images = config.parametrization.images(state.parameters)
      prior = config.total_variation(images, state.iteration, config.iterations)
      loss = self.matching_loss(images, labels, observed, state.iteration)
      objective = prior + loss if self._matching else prior
    own_loss = loss if self._matching else prior
    gradient = tape.gradient(objective, state.parameters)
    factor = config.schedule(state.iteration, config.iterations, gradient.dtype)
    change, moments = config.optimizer.step(
      gradient, (state.first_moment, state.second_moment), state.iteration, factor
    )
    moved = config.box.project(config.parametrization.images(state.parameters + change))
    better = own_loss < state.best_loss
    return SolverState(
      parameters=config.parametrization.parameters(moved),
      first_moment=moments[0],
      second_moment=moments[1],
      iteration=state.iteration + 1,
      loss=own_loss,
      best_loss=tf.where(better, own_loss, state.best_loss),
      best_images=tf.where(better, config.box.project(images), state.best_images),
    )

  def matching_loss(self, images, labels, observed, iteration=0) -> tf.Tensor:
    """How far the update simulated at `images` is from the observed one; 0 in a control."""
    if not self._matching:
      return tf.zeros((), images.dtype)
    config = self._config
    sharpness = None
    if isinstance(config.rectifier, SurrogateRectifier):
      sharpness = config.rectifier.sharpness(iteration, config.iterations, images.dtype)
    return config.matching(self._simulator.gradient(images, labels, sharpness), observed)


def choose_xla(simulator: ClientSimulator, config: AttackConfig, images, labels, observed) -> bool:
  """Resolves `config.xla` for this machine; 'auto' runs a few steps both ways.

  Args:
    simulator: Of the client.
    config: Settings.
    images: [B, H, W, C], to measure on.
    labels: int32 [B].
    observed: A gradient.

  Returns:
    Whether to compile the steps.
  """
  if config.xla != 'auto':
    return config.xla == 'on'
  plain = seconds_per_step(Solver(simulator, config, matching=True), images, labels, observed)
  on_cpu = not tf.config.list_logical_devices('GPU')
  if on_cpu and plain > _XLA_WORTH_TRYING_SECS:
    return False
  compiled = Solver(simulator, config, matching=True, use_xla=True)
  try:
    compiled_secs = seconds_per_step(compiled, images, labels, observed)
    return compiled_secs < (1 - _XLA_MUST_SAVE) * plain
  except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
    # The user's model has an operation that XLA cannot compile.
    return False


def seconds_per_step(solver: Solver, images, labels, observed) -> float:
  """Mean duration of a step, after tracing and compiling."""
  state = solver.advance(solver.start(images), labels, observed, 1)
  begin = time.perf_counter()
  state = solver.advance(state, labels, observed, 1 + _MEASURED_STEPS)
  state.loss.numpy()
  return (time.perf_counter() - begin) / _MEASURED_STEPS
