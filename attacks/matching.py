"""Matching losses: how far a simulated update is from the observed one.

Each is a frozen dataclass, called with two lists of tensors of the same shapes; the result is a
scalar that is 0 for a perfect match and is differentiable in its first argument.
"""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

# A layer that no gradient reaches has the norm zero.
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class CosineMatching:
  """One minus the cosine over all weights concatenated, in [0, 2].

  Blind to the scale of the update (Geiping et al. 2020, "Inverting gradients", equation 4).

  Attributes:
    balance: Each weight tensor is divided by the norm of its observed gradient to this power: 0 is
      the plain cosine, in which the last layers outweigh the first by far; at 1 all count the same.
  """

  balance: float = 0.0
  name: str = dataclasses.field(default='cosine', init=False)

  def __call__(self, simulated: Sequence[tf.Tensor], observed: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns 1 - <simulated, observed> / (|simulated| |observed|)."""
    if self.balance:
      scales = [(_squared_norm([b]) + _TINY) ** (-self.balance / 2) for b in observed]
      simulated = [a * scale for a, scale in zip(simulated, scales, strict=True)]
      observed = [b * scale for b, scale in zip(observed, scales, strict=True)]
    dot = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(simulated, observed, strict=True)])
    return 1 - dot * tf.math.rsqrt(_squared_norm(simulated) * _squared_norm(observed))


@dataclasses.dataclass(frozen=True)
class SquaredMatching:
  """Squared error over the squared norm of the observed update.

  The loss of "Deep leakage from gradients" (Zhu et al. 2019), divided so that a weight set beside
  it means the same for every model.
  """

  name: str = dataclasses.field(default='l2', init=False)

  def __call__(self, simulated: Sequence[tf.Tensor], observed: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns |simulated - observed|^2 / |observed|^2."""
    difference = [a - b for a, b in zip(simulated, observed, strict=True)]
    return _squared_norm(difference) / _squared_norm(observed)


Matching = CosineMatching | SquaredMatching
MATCHINGS: dict[str, type[Matching]] = {'cosine': CosineMatching, 'l2': SquaredMatching}


def _squared_norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
  return tf.add_n([tf.reduce_sum(tf.square(tensor)) for tensor in tensors])
