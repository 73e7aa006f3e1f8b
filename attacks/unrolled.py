"""Many steps of a client's local SGD, differentiable in its images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

# A nest of tensors: what one step trains on, or many steps with a leading axis.
Inputs = Any
GradientFn = Callable[[list[tf.Tensor], Inputs], list[tf.Tensor]]


def unrolled_sgd(
  gradient_fn: GradientFn,
  weights: Sequence[tf.Tensor],
  segments: Sequence[Inputs],
  learning_rate: float,
  momentum: float = 0.0,
  *,
  checkpoint_every: int = 1,
) -> list[tf.Tensor]:
  """How far local training moves the weights: initial minus final.

  Each step is v <- momentum v + g, w <- w - learning_rate v with g = gradient_fn(w, inputs) and
  v = 0 at first: the rule of `tff.learning.optimizers.build_sgdm` and of Keras' SGD without
  Nesterov momentum.

  The result can be differentiated once, in reverse mode, with respect to `weights` and to every
  floating point tensor of the segments. The backward pass goes through the steps from the last to
  the first and computes each step's gradient again from the weights it started at, so memory holds
  a copy of the weights per step, but the activations of one step only. The size of the graph does
  not depend on the number of steps. A single step in all is differentiated as it stands.

  Args:
    gradient_fn: Takes weights and the inputs of one step; returns one gradient per weight. It must
      give the same for the same arguments. Tensors that it uses besides are taken as constants.
    weights: The initial weights.
    segments: The steps in order. Each segment is a nest of tensors [S, ...] with a static leading
      axis of steps; several, because the last batch may be smaller.
    learning_rate: Of every step.
    momentum: In [0, 1).
    checkpoint_every: Keep the weights (and velocity) of every n-th step only and compute those
      between again when they are needed: of S steps S / n + n copies (2 S / n + n with momentum)
      instead of S, for one more gradient per step. About the square root of S needs the least
      (Chen et al. 2016, "Training deep nets with sublinear memory cost").

  Returns:
    One tensor per weight. It is summed up by itself, so it is more precise than the difference of
    initial and final weights.

  Raises:
    ValueError: If a segment's tensors do not share a known leading axis, or a setting is out of
      range.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum: {momentum} is not in [0, 1)')
  if checkpoint_every < 1:
    raise ValueError(f'checkpoint_every: {checkpoint_every} must be at least 1')
  weights = [tf.convert_to_tensor(weight) for weight in weights]
  segments = [tf.nest.map_structure(tf.convert_to_tensor, segment) for segment in segments]
  num_steps = [_num_steps(segment) for segment in segments]
  if sum(num_steps) == 1:
    gradient = gradient_fn(weights, _at(segments[num_steps.index(1)], 0))
    return [learning_rate * g for g in gradient]
  zeros = [tf.zeros_like(weight) for weight in weights]
  state = _State(zeros, list(zeros) if momentum else [])
  sgd = _Sgd(gradient_fn, learning_rate, momentum)
  # Even two steps go through loops. Unrolled, TensorFlow's oneDNN pass may fuse the gradient of a
  # convolution's bias with a filter gradient of the way back, which depends on it: a cycle.
  for segment, steps in zip(segments, num_steps, strict=True):
    if steps:
      state = _recomputed(sgd, weights, state, segment, steps, min(checkpoint_every, steps))
  return state.displacement


class _State(NamedTuple):
  """Between two steps; also the derivatives with respect to it.

  Attributes:
    displacement: Initial minus present weights.
    velocity: Empty without momentum.
  """

  displacement: list[tf.Tensor]
  velocity: list[tf.Tensor]


class _Sgd(NamedTuple):
  """The rule of one step, and its derivative."""

  gradient_fn: GradientFn
  learning_rate: float
  momentum: float

  def step(self, weights: list[tf.Tensor], state: _State, inputs: Inputs) -> _State:
    present = [w - d for w, d in zip(weights, state.displacement, strict=True)]
    velocity = self.gradient_fn(present, inputs)
    if state.velocity:
      velocity = [self.momentum * v + g for v, g in zip(state.velocity, velocity, strict=True)]
    displacement = [
      d + self.learning_rate * v for d, v in zip(state.displacement, velocity, strict=True)
    ]
    return _State(displacement, velocity if state.velocity else [])

  def pull_back(
    self, weights: list[tf.Tensor], displacement: list[tf.Tensor], inputs: Inputs, after: _State
  ) -> tuple[_State, list[tf.Tensor]]:
    """Derivatives after a step -> those before it, and those of its floating point inputs."""
    present = [w - d for w, d in zip(weights, displacement, strict=True)]
    floats = _floats(inputs)
    # Both equations of the step are linear in gradient and velocity, so no velocity is needed.
    pulled = [self.learning_rate * d for d in after.displacement]
    if after.velocity:
      pulled = [a + b for a, b in zip(pulled, after.velocity, strict=True)]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch([present, floats])
      gradient = self.gradient_fn(present, inputs)
    of_weights, of_inputs = tape.gradient(
      gradient, (present, floats), pulled, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    before = _State(
      [d - w for d, w in zip(after.displacement, of_weights, strict=True)],
      [self.momentum * v for v in pulled] if after.velocity else [],
    )
    return before, of_inputs


def _recomputed(
  sgd: _Sgd, weights: list[tf.Tensor], state: _State, segment: Inputs, steps: int, every: int
) -> _State:
  """The state after a segment, with a backward pass that computes its steps again."""

  @tf.custom_gradient
  def train(*flat):
    weights_, state_, segment_ = tf.nest.pack_sequence_as((weights, state, segment), flat)
    loops = _Loops(sgd, weights_, segment_, steps, every)
    end, saved = loops.forward(state_)

    def backward(*upstream):
      after = tf.nest.pack_sequence_as(state, upstream)
      before, of_segment = loops.backward(saved, after)
      # present = weights - displacement, at every step.
      of_weights = [a - b for a, b in zip(after.displacement, before.displacement, strict=True)]
      of_segment = iter(of_segment)
      return (
        *of_weights,
        *tf.nest.flatten(before),
        *(next(of_segment) if x.dtype.is_floating else None for x in tf.nest.flatten(segment_)),
      )

    return tuple(tf.nest.flatten(end)), backward

  end = train(*tf.nest.flatten((weights, state, segment)))
  return tf.nest.pack_sequence_as(state, end)


class _Loops:
  """Both directions through the steps of a segment.

  What is saved between them is a list of `tf.TensorArray`, one per tensor, indexed by step or by
  block of `every` steps.
  """

  def __init__(self, sgd: _Sgd, weights: list[tf.Tensor], segment: Inputs, steps: int, every: int):
    self._sgd = sgd
    self._weights = weights
    self._segment = segment
    self._steps = steps
    self._every = every
    self._num_blocks = -(-steps // every)

  def forward(self, state: _State) -> tuple[_State, list[tf.TensorArray]]:
    """The state at the end, and what the way back needs."""
    if self._every == 1:
      return self._forward(state, 0, self._steps, _arrays(state.displacement, self._steps))

    def body(block, state, saved):
      saved = _write(saved, block, tf.nest.flatten(state))
      state, _ = self._forward(state, *self._bounds(block), [])
      return block + 1, state, saved

    saved = _arrays(tf.nest.flatten(state), self._num_blocks)
    _, state, saved = _while(lambda block, *_: block < self._num_blocks, body, (0, state, saved))
    return state, saved

  def backward(self, saved: list[tf.TensorArray], after: _State) -> tuple[_State, list[tf.Tensor]]:
    """Derivatives at the end -> those at the start, and those of the segment's float tensors."""
    of_inputs = _arrays([x[0] for x in _floats(self._segment)], self._steps)
    if self._every == 1:
      before, of_inputs = self._backward(saved, after, of_inputs, 0, self._steps)
      return before, [array.stack() for array in of_inputs]

    def body(block, after, of_inputs):
      start, stop = self._bounds(block - 1)
      state = tf.nest.pack_sequence_as(after, _read(saved, block - 1))
      inner = _arrays(state.displacement, self._every)
      state, inner = self._forward(state, start, stop - 1, inner)
      inner = _write(inner, stop - 1 - start, state.displacement)
      return block - 1, *self._backward(inner, after, of_inputs, start, stop)

    loop = (self._num_blocks, after, of_inputs)
    _, before, of_inputs = _while(lambda block, *_: block > 0, body, loop)
    return before, [array.stack() for array in of_inputs]

  def _bounds(self, block: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    start = block * self._every
    return start, tf.minimum(start + self._every, self._steps)

  def _forward(self, state, start, stop, saved):
    """Steps [start, stop); saves the displacement before each unless `saved` is empty."""

    def body(k, state, saved):
      if saved:
        saved = _write(saved, k - start, state.displacement)
      return k + 1, self._sgd.step(self._weights, state, _at(self._segment, k)), saved

    _, state, saved = _while(lambda k, *_: k < stop, body, (start, state, saved))
    return state, saved

  def _backward(self, saved, after, of_inputs, start, stop):
    """Steps [start, stop) from the last to the first."""

    def body(k, after, of_inputs):
      k -= 1
      before, of_step = self._sgd.pull_back(
        self._weights, _read(saved, k - start), _at(self._segment, k), after
      )
      return k, before, _write(of_inputs, k, of_step)

    _, before, of_inputs = _while(lambda k, *_: k > start, body, (stop, after, of_inputs))
    return before, of_inputs


def _while(condition, body, loop):
  # The gradient at a saved step depends on nothing in the way back, so more than one iteration at a
  # time would hold the activations of as many steps.
  return tf.while_loop(condition, body, loop, parallel_iterations=1)


def _arrays(tensors: Sequence[tf.Tensor], size: int) -> list[tf.TensorArray]:
  return [
    tf.TensorArray(x.dtype, size, element_shape=x.shape, clear_after_read=False) for x in tensors
  ]


def _write(arrays, k, tensors) -> list[tf.TensorArray]:
  return [array.write(k, x) for array, x in zip(arrays, tensors, strict=True)]


def _read(arrays, k) -> list[tf.Tensor]:
  return [array.read(k) for array in arrays]


def _at(segment: Inputs, k: tf.Tensor | int) -> Inputs:
  return tf.nest.map_structure(lambda x: x[k], segment)


def _floats(nest: Inputs) -> list[tf.Tensor]:
  return [x for x in tf.nest.flatten(nest) if x.dtype.is_floating]


def _num_steps(segment: Inputs) -> int:
  shapes = [tuple(x.shape) for x in tf.nest.flatten(segment)]
  sizes = {shape[0] if shape else None for shape in shapes}
  if len(sizes) != 1 or None in sizes:
    raise ValueError(f'segments: need one known leading axis of steps, have the shapes {shapes}')
  return sizes.pop()
