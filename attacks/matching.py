"""Matching losses: how far a simulated update is from the observed one.

Each is a frozen dataclass, called with two lists of tensors of the same shapes, in the order of the
model's layers; the result is a scalar that is 0 for a perfect match and is differentiable in its
first argument. All share the settings of which tensors count, and how much.
"""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tff_shadow.errors import UserError

# A layer that no gradient reaches has the norm zero.
_TINY = 1e-12
# Unit vectors of float32 are about this far from each other by rounding alone.
_ROUNDING = 1e-6

_Tensors = Sequence[tf.Tensor]


@dataclasses.dataclass(frozen=True)
class _Matching:
  """Which of the n weight tensors count, and how much.

  Attributes:
    balance: Each weight tensor is divided by the norm of its observed gradient to this power: at 0
      the last layers outweigh the first by far; at 1 all count the same.
    depth: Tensor i counts if begin <= i / n < end; (0, 1) is all, (0, 0.5) the half next to the
      image.
    depth_slope: In [-1, 1]; the weight of a tensor runs linearly from 1 - slope at the image to
      1 + slope at the labels. -(n - 1) / (n + 1) gives the linear weights in the code of Geiping et
      al. 2020.

  Raises:
    UserError: A field is out of range, or (when called) no tensor is in `depth`.
  """

  balance: float = 0.0
  depth: tuple[float, float] = (0.0, 1.0)
  depth_slope: float = 0.0

  def __post_init__(self):
    object.__setattr__(self, 'depth', tuple(self.depth))
    if len(self.depth) != 2 or not 0 <= self.depth[0] < self.depth[1] <= 1:
      raise UserError(f'matching depth {self.depth}: use two shares 0 <= begin < end <= 1')
    if not -1 <= self.depth_slope <= 1:
      raise UserError(f'matching depth slope {self.depth_slope}: must be in [-1, 1]')

  def _weighted(
    self, simulated: _Tensors, observed: _Tensors, power: float
  ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """The tensors that count, times weight^power; power 0.5 where the loss will square them."""
    if len(simulated) != len(observed):
      raise ValueError(f'{len(simulated)} simulated tensors for {len(observed)} observed ones')
    count = len(observed)
    begin, end = self.depth
    kept = [i for i in range(count) if begin <= i / count < end]
    if not kept:
      raise UserError(f'matching depth {self.depth}: none of the {count} weight tensors lies in it')
    scales = [self._scale(observed[i], i / max(count - 1, 1), power) for i in kept]
    return (
      [simulated[i] * scale for i, scale in zip(kept, scales, strict=True)],
      [observed[i] * scale for i, scale in zip(kept, scales, strict=True)],
    )

  def _scale(self, observed: tf.Tensor, position: float, power: float) -> tf.Tensor | float:
    by_depth = (1 + self.depth_slope * (2 * position - 1)) ** power
    if not self.balance:
      return by_depth
    return (_squared_norm([observed]) + _TINY) ** (-self.balance / 2) * by_depth


@dataclasses.dataclass(frozen=True)
class CosineMatching(_Matching):
  """One minus the cosine over all weights concatenated, in [0, 2].

  Blind to the scale of the update (Geiping et al. 2020, "Inverting gradients", equation 4).
  """

  name: str = dataclasses.field(default='cosine', init=False)

  def __call__(self, simulated: _Tensors, observed: _Tensors) -> tf.Tensor:
    """Returns 1 - <simulated, observed> / (|simulated| |observed|)."""
    simulated, observed = self._weighted(simulated, observed, 0.5)
    dot = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(simulated, observed, strict=True)])
    return 1 - dot * tf.math.rsqrt(_squared_norm(simulated) * _squared_norm(observed))


@dataclasses.dataclass(frozen=True)
class AngularMatching(_Matching):
  """The angle between the two, over all weights concatenated, in radians in [0, pi].

  The arc cosine of what `CosineMatching` subtracts from one. Close to a match its slope does not
  fade as that of the cosine does.
  """

  name: str = dataclasses.field(default='angular', init=False)

  def __call__(self, simulated: _Tensors, observed: _Tensors) -> tf.Tensor:
    """Returns arccos(<simulated, observed> / (|simulated| |observed|))."""
    simulated, observed = self._weighted(simulated, observed, 0.5)
    # The arc cosine itself has an infinite slope at a match, where it also loses half of all
    # digits; the angle at the tip of the rhombus of two unit vectors has neither fault.
    a_scale = tf.math.rsqrt(_squared_norm(simulated))
    b_scale = tf.math.rsqrt(_squared_norm(observed))
    pairs = [(a * a_scale, b * b_scale) for a, b in zip(simulated, observed, strict=True)]
    across = _smooth_norm([a - b for a, b in pairs])
    along = _smooth_norm([a + b for a, b in pairs])
    return 2 * tf.math.atan2(across, along)


@dataclasses.dataclass(frozen=True)
class SquaredMatching(_Matching):
  """Squared error over the squared norm of the observed update.

  The loss of "Deep leakage from gradients" (Zhu et al. 2019), divided so that a weight set beside
  it means the same for every model.
  """

  name: str = dataclasses.field(default='l2', init=False)

  def __call__(self, simulated: _Tensors, observed: _Tensors) -> tf.Tensor:
    """Returns |simulated - observed|^2 / |observed|^2."""
    simulated, observed = self._weighted(simulated, observed, 0.5)
    difference = [a - b for a, b in zip(simulated, observed, strict=True)]
    return _squared_norm(difference) / _squared_norm(observed)


@dataclasses.dataclass(frozen=True)
class AbsoluteMatching(_Matching):
  """Absolute error over the summed magnitude of the observed update.

  A few entries that cannot be matched, say where noise was added, weigh less than in the squared
  error. Deng et al. 2021, "TAG", add it to the squared one, with weights that depend on depth.
  """

  name: str = dataclasses.field(default='l1', init=False)

  def __call__(self, simulated: _Tensors, observed: _Tensors) -> tf.Tensor:
    """Returns |simulated - observed|_1 / |observed|_1."""
    simulated, observed = self._weighted(simulated, observed, 1.0)
    difference = [a - b for a, b in zip(simulated, observed, strict=True)]
    return _absolute_sum(difference) / _absolute_sum(observed)


@dataclasses.dataclass(frozen=True)
class NormMatching(_Matching):
  """Sum over the weight tensors of the norm of their error, in units of the gradient.

  Not divided by anything, so that its weight beside the priors depends on the model: for attacks
  published that way (Jiang et al. 2025, of updates, so of the learning rate times this).

  Attributes:
    weight: Factor of the sum.
  """

  weight: float = 1.0
  name: str = dataclasses.field(default='norm', init=False)

  def __call__(self, simulated: _Tensors, observed: _Tensors) -> tf.Tensor:
    """Returns weight * sum_i |simulated_i - observed_i|."""
    simulated, observed = self._weighted(simulated, observed, 1.0)
    norms = [_smooth_norm([a - b]) for a, b in zip(simulated, observed, strict=True)]
    return self.weight * tf.add_n(norms)


@dataclasses.dataclass(frozen=True)
class NoMatching:
  """Updates are not compared: only priors, and BatchNorm statistics if they have a weight.

  What a matching loss amounts to that is computed from tensors detached from the image, as in the
  code released with Jiang et al. 2025. A solver with it chooses by the whole objective.
  """

  name: str = dataclasses.field(default='none', init=False)


Matching = CosineMatching | AngularMatching | SquaredMatching | AbsoluteMatching | NormMatching
MATCHINGS: dict[str, type[Matching]] = {
  'cosine': CosineMatching,
  'angular': AngularMatching,
  'l2': SquaredMatching,
  'l1': AbsoluteMatching,
  'norm': NormMatching,
}


def _squared_norm(tensors: _Tensors) -> tf.Tensor:
  return tf.add_n([tf.reduce_sum(tf.square(tensor)) for tensor in tensors])


def _smooth_norm(tensors: _Tensors) -> tf.Tensor:
  """The norm, but with the slope 0 where it is 0."""
  return tf.sqrt(_squared_norm(tensors) + _ROUNDING**2) - _ROUNDING


def _absolute_sum(tensors: _Tensors) -> tf.Tensor:
  return tf.add_n([tf.reduce_sum(tf.abs(tensor)) for tensor in tensors])
