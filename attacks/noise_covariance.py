"""Noise whose covariance an attacker knows, and the squared error in units of it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from attacks.principal_directions import principal_directions

# Directions along which there is less than so much more noise than elsewhere count as the others.
_LEAST_EXCESS = 0.25
# Every direction costs as much as reading the gradient once more; a hundred at most stand out of a
# floor of 99 % of decoy noise.
_MOST_DIRECTIONS = 128


class NoiseCovariance(NamedTuple):
  """Of noise that is independent and alike in all entries of a gradient, but for some directions.

  Attributes:
    directions: float32 [d, r], orthonormal; the entries are those of all trainable variables, one
      variable after another.
    ratios: float32 [r], the variance along each over that along all others; at least 1.
  """

  directions: np.ndarray
  ratios: np.ndarray

  @classmethod
  def fitted(
    cls, draws: np.ndarray, variance: float, most: int = _MOST_DIRECTIONS
  ) -> 'NoiseCovariance':
    """Of the sum of noise like `draws` and white noise.

    Args:
      draws: [N, d], of mean zero.
      variance: Of each entry of the white noise; above 0.
      most: Directions at most.

    Raises:
      ValueError: If the variance is not above 0.
    """
    if not variance > 0:
      raise ValueError(f'variance must be above 0, found {variance}')
    directions, energies = principal_directions(draws, most)
    excess = energies / len(draws) / variance
    kept = excess > _LEAST_EXCESS
    return cls(directions[:, kept], (1 + excess[kept]).astype(np.float32))

  def mahalanobis(self, simulated: Sequence[tf.Tensor], observed: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns |simulated - observed|^2 / |observed|^2, of the norm |v|^2 = v' covariance^-1 v.

    `SquaredMatching` in units of the noise; beside a Gaussian prior the exponent of the posterior
    of an attacker who knows the noise.
    """
    given = tf.concat([tf.reshape(tensor, [-1]) for tensor in observed], axis=0)
    tried = tf.concat([tf.reshape(tensor, [-1]) for tensor in simulated], axis=0)
    return self._squared(tried - given) / self._squared(given)

  def _squared(self, vector: tf.Tensor) -> tf.Tensor:
    """`vector` [d] in units of the noise along most directions."""
    along = tf.linalg.matvec(tf.cast(self.directions, vector.dtype), vector, transpose_a=True)
    shares = tf.cast(1 - 1 / self.ratios, vector.dtype)
    return tf.reduce_sum(tf.square(vector)) - tf.reduce_sum(shares * tf.square(along))
