"""The inner loop of an attack: many optimiser steps per call of one traced function.

Several attacks run side by side as lanes: a lane is one restart on one target. Lanes share
iteration, trace and call, and nothing else unless a prior ties them together.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from attacks.config import AttackConfig
from attacks.contrast import with_contrast
from attacks.local_steps import LocalSteps
from attacks.matching import NoMatching
from attacks.noise_covariance import NoiseCovariance
from attacks.optimizers import Lbfgs
from attacks.priors import reweighted
from attacks.rectifiers import SurrogateRectifier
from attacks.simulator import ClientSimulator
from tff_shadow.models import graph_function

# A step slower than this is not tried with XLA on a CPU, where compiling a large network takes
# longer than it could win.
_XLA_WORTH_TRYING_SECS = 0.02
_MEASURED_STEPS = 10
# Compiling has to win clearly: a busy machine's timings scatter.
_XLA_MUST_SAVE = 0.2
_IMAGES, _LABELS, _POSITION = 'images', 'labels', 'position'


class SolverState(NamedTuple):
  """R lanes between two steps; everything that resuming needs.

  Attributes:
    parameters: What the optimiser moves, a dict of nests of tensors [R, ...].
    moments: Of the optimiser.
    iteration: int32, steps taken.
    loss: [R], the objective's own loss at the last step's images: matching, or the prior in a
      control, or the whole objective of an attack that matches no update.
    best_loss: [R], the least of these so far; infinite before the first step.
    best_images: [R, B, H, W, C], the images it was found at.
    diverged_at: int32 [R], the first iteration at which the loss was not finite; -1 if none was.
  """

  parameters: Any
  moments: Any
  iteration: tf.Tensor
  loss: tf.Tensor
  best_loss: tf.Tensor
  best_images: tf.Tensor
  diverged_at: tf.Tensor


class Evidence(NamedTuple):
  """What the lanes are matched with. T targets; V views, rounds that show the same images.

  Attributes:
    target: int32 [R], which target a lane attacks.
    labels: int32 [T, B]; not used where labels are optimised with the images.
    gradients: Per view, per trainable variable: [T, ...], the observed mean gradients.
    statistics: Per view, per BatchNorm layer (mean, variance), [T, channels] each; a view without
      them has none, and without that prior it is empty.
    seeds: int32 [R, 2], of each lane's own draws.
    weights: Per view, per trainable variable: [T, ...], what both gradients are multiplied by
      before they are compared; empty to compare them as they are.
    covariances: Per view, of the noise on its gradients, in units of which they are compared then
      by the squared error; empty where it is not known.
    prior_weights: By the name of an image prior, a scalar in place of its weight in the config, so
      that attacks which differ in nothing else share a trace.
    orders: int32 [R, M], the images that the local steps of the first view train on one after
      another; empty for the order of its `LocalSteps`.
  """

  target: tf.Tensor
  labels: tf.Tensor
  gradients: Any
  statistics: Any
  seeds: tf.Tensor
  weights: Any = ()
  covariances: Sequence[NoiseCovariance] = ()
  prior_weights: Mapping[str, tf.Tensor] = {}
  orders: Any = ()


class LossAndGradient(NamedTuple):
  """Of all lanes at one point.

  Attributes:
    images: [R, B, H, W, C].
    loss: [R], matching alone; the objective in a control, or where no update is matched.
    objective: [R], what is minimised.
    gradient: Of the sum of the objectives, like the parameters.
  """

  images: tf.Tensor
  loss: tf.Tensor
  objective: tf.Tensor
  gradient: Any


class Solver:
  """Runs attacks on targets of the same simulators; traced once per shape of the lanes.

  The evidence is an argument, so that all clients of a round share the trace.
  """

  def __init__(
    self,
    simulators: Sequence[ClientSimulator],
    steps: Sequence[LocalSteps],
    config: AttackConfig,
    *,
    matching: bool,
    contrast: float | None = None,
    use_xla: bool = False,
  ):
    """Stores the pieces.

    Args:
      simulators: Of the client, one per view.
      steps: The client's local steps in each view; those of later views that have an order are
        simulated as `AttackConfig.simulation` 'between'.
      config: Settings.
      matching: False deletes the matching term: the prior-only control.
      contrast: That all images have after each step (`contrast.with_contrast`); None to leave it.
      use_xla: Whether a step is compiled by XLA.
    """
    self._simulators = list(simulators)
    self._local_steps = list(steps)
    self._config = config
    # Each round has an order of its own, and the images are numbered by that of the first. One
    # gradient on all of them, in no order, is nearer to the truth than steps in a wrong one.
    self._between = [
      config.simulation == 'between' or (view > 0 and own.is_ordered)
      for view, own in enumerate(steps)
    ]
    self._matching = matching
    self._contrast = contrast
    self.use_xla = use_xla
    self._models = [simulator.model for simulator in simulators]
    self._step = graph_function(self._one_step, *self._models, jit_compile=use_xla)
    self._steps = graph_function(self._many_steps, *self._models)

  def start(self, images, seeds, labels=None) -> SolverState:
    """The state before the first step.

    Args:
      images: [R, B, H, W, C].
      seeds: int32 [R, 2], for parametrizations that start from a draw.
      labels: Start logits [R, B, classes] if labels are optimised too.
    """
    config = self._config
    images = tf.constant(images, self._simulators[0].dtype)
    num_lanes = images.shape[0]
    parameters = {_IMAGES: config.parametrization.parameters(images, tf.constant(seeds)[:, 1])}
    if labels is not None:
      parameters[_LABELS] = tf.constant(labels, images.dtype)
    if any(self._between) and self._matching:
      parameters[_POSITION] = tf.fill([num_lanes], tf.cast(config.start_position, images.dtype))
    infinity = tf.fill([num_lanes], tf.constant(float('inf'), images.dtype))
    return SolverState(
      parameters=parameters,
      moments=config.optimizer.start(parameters),
      iteration=tf.constant(0, tf.int32),
      loss=infinity,
      best_loss=infinity,
      best_images=images,
      diverged_at=tf.fill([num_lanes], -1),
    )

  def advance(self, state: SolverState, evidence: Evidence, stop: int) -> SolverState:
    """Runs steps until `state.iteration` is `stop`.

    The same steps give the same bits however they are divided into calls.
    """
    return self._steps(state, evidence, tf.constant(stop, tf.int32))

  def images(self, state: SolverState) -> tf.Tensor:
    """The images [R, B, H, W, C] at which the state stands."""
    config = self._config
    return config.box.project(config.parametrization.images(state.parameters[_IMAGES]))

  def _many_steps(self, state, evidence, stop):
    flat = tf.while_loop(
      lambda *s: tf.nest.pack_sequence_as(state, s).iteration < stop,
      lambda *s: tf.nest.flatten(self._step(tf.nest.pack_sequence_as(state, s), evidence)),
      tf.nest.flatten(state),
    )
    return tf.nest.pack_sequence_as(state, flat)

  def _one_step(self, state: SolverState, evidence: Evidence) -> SolverState:
    config = self._config
    if isinstance(config.optimizer, Lbfgs):
      images, own_loss, parameters, moments = self._line_search(state, evidence)
    else:
      images, own_loss, parameters, moments = self._scheduled_step(state, evidence)
    if _POSITION in parameters:
      parameters[_POSITION] = tf.clip_by_value(parameters[_POSITION], 0, 1)
    better = own_loss < state.best_loss
    diverged = tf.logical_not(tf.math.is_finite(own_loss)) & (state.diverged_at < 0)
    return SolverState(
      parameters=parameters,
      moments=moments,
      iteration=state.iteration + 1,
      loss=own_loss,
      best_loss=tf.where(better, own_loss, state.best_loss),
      best_images=tf.where(
        better[:, None, None, None, None], config.box.project(images), state.best_images
      ),
      diverged_at=tf.where(diverged, state.iteration, state.diverged_at),
    )

  def _line_search(self, state: SolverState, evidence: Evidence):
    """A step of L-BFGS; the loss is that after it."""
    optimizer = self._config.optimizer

    def objective(parameters):
      seen = self.loss_and_gradient(parameters, evidence, state.iteration)
      return seen.objective, seen.gradient

    # The search has it at ten places of its graph, and preparing that is what takes time.
    objective = graph_function(
      objective, *self._models, experimental_attributes={'_noinline': True}
    )
    parameters, moments = optimizer.step(objective, state.parameters, state.moments)
    seen = self.loss_and_gradient(parameters, evidence, state.iteration)
    return seen.images, seen.loss, parameters, moments

  def _scheduled_step(self, state: SolverState, evidence: Evidence):
    """A step of Adam; the loss is that before it."""
    config = self._config
    parametrization = config.parametrization
    seen = self.loss_and_gradient(state.parameters, evidence, state.iteration)
    images, own_loss, gradient = seen.images, seen.loss, seen.gradient
    factor = config.schedule(state.iteration, config.iterations, images.dtype)
    change, moments = config.optimizer.step(gradient, state.moments, state.iteration, factor)
    if config.langevin:
      change[_IMAGES] = self._with_noise(change[_IMAGES], evidence, state.iteration, factor)
    active = parametrization.active(state.parameters[_IMAGES], state.iteration, config.iterations)
    change[_IMAGES] = tf.nest.map_structure(tf.multiply, change[_IMAGES], active)
    parameters = tf.nest.map_structure(tf.add, state.parameters, change)
    if parametrization.invertible:
      moved = parametrization.images(parameters[_IMAGES])
      if self._contrast is not None:
        moved = with_contrast(moved, self._contrast, config.box.center)
      parameters[_IMAGES] = parametrization.parameters(config.box.project(moved))
    return images, own_loss, parameters, moments

  def loss_and_gradient(self, parameters, evidence: Evidence, iteration) -> LossAndGradient:
    """Everything at `parameters` that a step needs."""
    config = self._config
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(parameters)
      images = config.parametrization.images(parameters[_IMAGES])
      prior = tf.zeros(images.shape[:1], images.dtype)
      for image_prior in config.image_priors:
        if image_prior.name in evidence.prior_weights:
          image_prior = reweighted(image_prior, evidence.prior_weights[image_prior.name])
        prior += image_prior(images, iteration, config.iterations, evidence.target)
    if not self._matching:
      gradient = tape.gradient(prior, parameters, unconnected_gradients='zero')
      return LossAndGradient(images, prior, prior, gradient)
    # The lanes' gradients are taken inside the map, so that one lane's activations are gone
    # before the next one's are needed, if memory is short.
    seen = {**parameters, _IMAGES: images}
    loss, penalty, of_seen = self._over_lanes(seen, evidence, iteration)
    gradient = tape.gradient(
      [prior, images],
      parameters,
      output_gradients=[tf.ones_like(prior), of_seen.pop(_IMAGES)],
      unconnected_gradients='zero',
    )
    objective = loss + penalty + prior
    if isinstance(config.matching, NoMatching):
      loss = objective
    return LossAndGradient(images, loss, objective, {**gradient, **of_seen})

  def _over_lanes(self, seen, evidence, iteration):
    """Matching loss and statistics' prior of every lane, and the gradient of their sum."""

    def one(lane):
      own, target, order = lane
      with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(own)
        loss, penalty = self.lane_loss(own, target, evidence, iteration, order)
        objective = loss + penalty
      gradient = tape.gradient(objective, own, unconnected_gradients='zero')
      # Batches gathered from the images have a sparse one.
      dense = {name: tf.convert_to_tensor(tensor) for name, tensor in gradient.items()}
      return loss, penalty, dense

    lanes = (seen, evidence.target, evidence.orders)
    if evidence.target.shape[0] == 1:
      result = one(tf.nest.map_structure(lambda tensor: tensor[0], lanes))
      return tf.nest.map_structure(lambda tensor: tensor[None], result)
    dtype = seen[_IMAGES].dtype
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), seen)
    return tf.map_fn(
      one,
      lanes,
      fn_output_signature=(tf.TensorSpec((), dtype), tf.TensorSpec((), dtype), specs),
      parallel_iterations=self._config.lanes,
    )

  def lane_loss(
    self, own, target, evidence: Evidence, iteration, order=()
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Matching loss and statistics' prior of one lane, two scalars.

    Args:
      own: 'images' [B, H, W, C], and what else of the lane is optimised: 'labels', logits
        [B, classes], and 'position', a scalar.
      target: Index of the lane's target in `evidence`.
      evidence: Of all targets.
      iteration: From 0.
      order: Of the lane, from `evidence.orders`.
    """
    config = self._config
    images = own[_IMAGES]
    labels = tf.nn.softmax(own[_LABELS]) if _LABELS in own else evidence.labels[target]
    sharpness = None
    if isinstance(config.rectifier, SurrogateRectifier):
      sharpness = config.rectifier.sharpness(iteration, config.iterations, images.dtype)
    losses, penalties = [], []
    for view, (simulator, steps) in enumerate(
      zip(self._simulators, self._local_steps, strict=True)
    ):
      observed = [tensor[target] for tensor in evidence.gradients[view]]
      statistics = evidence.statistics[view] if evidence.statistics else ()
      known = [(mean[target], variance[target]) for mean, variance in statistics]
      if isinstance(config.matching, NoMatching):
        if known:
          penalties.append(config.batch_norm_statistics(simulator.statistics(images), known))
        losses.append(tf.zeros((), images.dtype))
        continue
      if self._between[view]:
        scale = -simulator.update_over_gradient(len(steps.batches))
        update = [scale * tensor for tensor in observed]
        simulated = simulator.gradient_between(images, labels, update, own[_POSITION], sharpness)
      elif known:
        simulated, statistics = simulator.gradient_and_statistics(images, labels, sharpness)
        penalties.append(config.batch_norm_statistics(statistics, known))
      else:
        own_order = order if view == 0 and tf.is_tensor(order) else None
        simulated = simulator.mean_gradient(images, labels, steps, sharpness, own_order)
      if evidence.weights:
        weights = [tensor[target] for tensor in evidence.weights[view]]
        simulated = [tensor * w for tensor, w in zip(simulated, weights, strict=True)]
        observed = [tensor * w for tensor, w in zip(observed, weights, strict=True)]
      if evidence.covariances:
        losses.append(evidence.covariances[view].mahalanobis(simulated, observed))
      else:
        losses.append(config.matching(simulated, observed))
    penalty = tf.add_n(penalties) / len(penalties) if penalties else tf.zeros((), images.dtype)
    return tf.add_n(losses) / len(losses), penalty

  def _with_noise(self, change, evidence, iteration, factor):
    """Adds every lane's own noise, of a scale that the schedule turns down."""
    scale = self._config.langevin * factor

    def one(lane):
      seed, own = lane
      seed = tf.random.experimental.stateless_fold_in(seed, iteration)
      flat = tf.nest.flatten(own)
      seeds = tf.random.experimental.stateless_split(seed, len(flat))
      noise = [
        tf.random.stateless_normal(tensor.shape, seeds[k], dtype=tensor.dtype, alg='philox')
        for k, tensor in enumerate(flat)
      ]
      return tf.nest.pack_sequence_as(
        own, [tensor + scale * n for tensor, n in zip(flat, noise, strict=True)]
      )

    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), change)
    return tf.map_fn(one, (evidence.seeds, change), fn_output_signature=specs)


def choose_xla(solver: Solver, state: SolverState, evidence: Evidence, compiled: Solver) -> bool:
  """Whether `compiled` is clearly faster than `solver`, by running a few steps of both."""
  plain = seconds_per_step(solver, state, evidence)
  on_cpu = not tf.config.list_logical_devices('GPU')
  if on_cpu and plain > _XLA_WORTH_TRYING_SECS:
    return False
  try:
    return seconds_per_step(compiled, state, evidence) < (1 - _XLA_MUST_SAVE) * plain
  except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
    # The user's model has an operation that XLA cannot compile.
    return False


def seconds_per_step(solver: Solver, state: SolverState, evidence: Evidence) -> float:
  """Mean duration of a step of all lanes, after tracing and compiling."""
  state = solver.advance(state, evidence, 1)
  begin = time.perf_counter()
  state = solver.advance(state, evidence, 1 + _MEASURED_STEPS)
  state.loss.numpy()
  return (time.perf_counter() - begin) / _MEASURED_STEPS
