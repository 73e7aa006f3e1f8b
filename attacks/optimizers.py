"""Optimisers as pure functions of their state, and the schedules of learning rates.

Keras optimisers keep their state in variables; an attack needs it as values, to run many targets
through one traced function and to save and resume bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp

# A lane whose gradient has no larger entry is done.
_LBFGS_TOLERANCE = 1e-8


@dataclasses.dataclass(frozen=True)
class CosineDecay:
  """From 1 at the first iteration to 0 after the last, along half a cosine."""

  warm_up: int = 0
  name: str = dataclasses.field(default='cosine', init=False)

  def __call__(self, iteration: tf.Tensor, iterations: int, dtype: tf.DType) -> tf.Tensor:
    """The factor of the learning rate at `iteration` (int, from 0) of `iterations`."""
    progress = tf.cast(iteration, dtype) / iterations
    factor = (1 + tf.cos(tf.cast(math.pi, dtype) * progress)) / 2
    return factor * _warm_up(iteration, self.warm_up, dtype)


@dataclasses.dataclass(frozen=True)
class StepDecay:
  """Times `factor` at 3/8, 5/8 and 7/8 of the iterations (Geiping et al. 2020).

  Attributes:
    warm_up: Iterations of linear growth at the start.
    factor: See above.
    phases: The schedule runs so many times, one after the other, for searches in as many phases.
  """

  warm_up: int = 0
  factor: float = 0.1
  phases: int = 1
  name: str = dataclasses.field(default='step', init=False)

  def __call__(self, iteration: tf.Tensor, iterations: int, dtype: tf.DType) -> tf.Tensor:
    """The factor of the learning rate at `iteration` (int, from 0) of `iterations`."""
    phase = tf.minimum(iteration * self.phases // iterations, self.phases - 1)
    place = iteration * self.phases - phase * iterations
    passed = [tf.cast(8 * place >= eighths * iterations, dtype) for eighths in (3, 5, 7)]
    return tf.cast(self.factor, dtype) ** tf.add_n(passed) * _warm_up(
      iteration, self.warm_up, dtype
    )


@dataclasses.dataclass(frozen=True)
class ConstantRate:
  """1 throughout."""

  warm_up: int = 0
  name: str = dataclasses.field(default='constant', init=False)

  def __call__(self, iteration: tf.Tensor, iterations: int, dtype: tf.DType) -> tf.Tensor:
    """The factor of the learning rate at `iteration` (int, from 0)."""
    del iterations
    return _warm_up(iteration, self.warm_up, dtype)


Schedule = CosineDecay | StepDecay | ConstantRate
SCHEDULES: dict[str, type[Schedule]] = {
  'cosine': CosineDecay,
  'step': StepDecay,
  'constant': ConstantRate,
}


@dataclasses.dataclass(frozen=True)
class Adam:
  """Adam (Kingma and Ba 2015), optionally on the sign of the gradient.

  Attributes:
    learning_rate: Before the schedule; pixels are in [0, 1].
    signed: Whether only the gradient's sign is used, as Geiping et al. (2020) do.
    beta_1: Decay of the first moment.
    beta_2: Decay of the second moment.
    epsilon: Added to the root of the second moment.
  """

  learning_rate: float = 0.1
  signed: bool = False
  beta_1: float = 0.9
  beta_2: float = 0.999
  epsilon: float = 1e-12
  name: str = dataclasses.field(default='adam', init=False)

  def start(self, parameters: Any) -> Any:
    """First and second moment before the first step: zeros."""
    zeros = tf.nest.map_structure(tf.zeros_like, parameters)
    return (zeros, zeros)

  def step(
    self, gradient: Any, moments: Any, iteration: tf.Tensor, factor: tf.Tensor
  ) -> tuple[Any, Any]:
    """One step.

    Args:
      gradient: Of the objective, a nest of tensors.
      moments: From `start` or the last step.
      iteration: Steps taken before this one.
      factor: Of the learning rate, from a schedule.

    Returns:
      What to add to the parameters, in the structure of `gradient`, and the new moments.
    """
    if self.signed:
      gradient = tf.nest.map_structure(tf.sign, gradient)
    first = tf.nest.map_structure(
      lambda m, g: self.beta_1 * m + (1 - self.beta_1) * g, moments[0], gradient
    )
    second = tf.nest.map_structure(
      lambda m, g: self.beta_2 * m + (1 - self.beta_2) * tf.square(g), moments[1], gradient
    )

    def change(first, second):
      count = tf.cast(iteration + 1, first.dtype)
      unbiased_first = first / (1 - tf.cast(self.beta_1, first.dtype) ** count)
      unbiased_second = second / (1 - tf.cast(self.beta_2, first.dtype) ** count)
      direction = unbiased_first / (tf.sqrt(unbiased_second) + self.epsilon)
      return -self.learning_rate * factor * direction

    return tf.nest.map_structure(change, first, second), (first, second)


@dataclasses.dataclass(frozen=True)
class Lbfgs:
  """Limited-memory BFGS with a line search (Liu and Nocedal 1989; Hager and Zhang 2006).

  A step takes as many gradients as its line search needs. Learning rate, schedule, Langevin noise
  and the projection onto the box have no part in it; the objective must not change with the
  iterations.

  Attributes:
    pairs: Remembered steps.
    line_search: Most gradients of one line search.
  """

  pairs: int = 10
  line_search: int = 20
  name: str = dataclasses.field(default='lbfgs', init=False)

  def start(self, parameters: Any) -> Any:
    """What `step` takes first: results without a step."""
    # Of no objective at all: only to have the structure, which the first step fills.
    return tfp.optimizer.lbfgs_minimize(
      lambda flat: (tf.zeros(flat.shape[:1], flat.dtype), tf.zeros_like(flat)),
      initial_position=_joined(parameters),
      num_correction_pairs=self.pairs,
      max_iterations=0,
    )

  def step(
    self, objective_fn: Callable[[Any], tuple[tf.Tensor, Any]], parameters: Any, results: Any
  ) -> tuple[Any, Any]:
    """One step of every lane.

    Args:
      objective_fn: Parameters -> values [R] and gradients like the parameters.
      parameters: A nest of tensors [R, ...]; where to start if no step was taken yet.
      results: From `start` or the last step.

    Returns:
      The new parameters, and the new results.
    """
    taken = results.num_iterations

    def value_and_gradients(flat):
      value, gradient = objective_fn(_parted(flat, parameters))
      return value, _joined(gradient)

    def at_the_start():
      # As `lbfgs_minimize` begins; given to it as a start, all of its graph would be there twice.
      position = _joined(parameters)
      value, gradient = value_and_gradients(position)
      small = tf.reduce_max(tf.abs(gradient), axis=1) < _LBFGS_TOLERANCE
      return results._replace(
        converged=tf.math.is_finite(value) & small,
        position=position,
        objective_value=value,
        objective_gradient=gradient,
      )

    new = tfp.optimizer.lbfgs_minimize(
      value_and_gradients,
      initial_position=None,
      previous_optimizer_results=tf.cond(taken > 0, lambda: results, at_the_start),
      num_correction_pairs=self.pairs,
      tolerance=_LBFGS_TOLERANCE,
      max_iterations=taken + 1,
      max_line_search_iterations=self.line_search,
    )
    return _parted(new.position, parameters), new


Optimizer = Adam | Lbfgs
OPTIMIZERS: dict[str, type[Optimizer]] = {'adam': Adam, 'lbfgs': Lbfgs}


def _joined(nest: Any) -> tf.Tensor:
  """A nest of tensors [R, ...] as one [R, D]."""
  return tf.concat([tf.reshape(t, [t.shape[0], -1]) for t in tf.nest.flatten(nest)], axis=1)


def _parted(flat: tf.Tensor, like: Any) -> Any:
  """The inverse of `_joined`."""
  tensors = tf.nest.flatten(like)
  parts = tf.split(flat, [math.prod(tensor.shape[1:]) for tensor in tensors], axis=1)
  return tf.nest.pack_sequence_as(
    like, [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
  )


def _warm_up(iteration: tf.Tensor, warm_up: int, dtype: tf.DType) -> tf.Tensor:
  if not warm_up:
    return tf.ones((), dtype)
  return tf.minimum(tf.cast(iteration + 1, dtype) / warm_up, tf.ones((), dtype))
