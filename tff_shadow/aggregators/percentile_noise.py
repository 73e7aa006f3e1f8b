"""Gaussian noise whose scale follows a percentile of each client's update."""

import math

import tensorflow as tf
import tensorflow_probability as tfp

from tff_shadow.aggregators.client_side import Factory
from tff_shadow.aggregators.entropy import draw_key
from tff_shadow.aggregators.shadow_noise import stateless_normal_like
from tff_shadow.aggregators.update_transform import update_transform_factory


def percentile_noise_factory(
  sigma0: float,
  percentile: float = 95.0,
  inner: Factory | None = None,
  *,
  secure_measurements: bool = False,
) -> Factory:
  """Returns a factory whose clients add isotropic noise in proportion to their own update.

  A client sends Delta + N(0, sigma^2 I), where sigma is `sigma0` times the given percentile of
  |Delta_j| over all entries that are not zero, of all tensors together. This is the filter
  `GaussianPrivacy` of NVFlare's research/quantifying-data-leakage (Hatamizadeh et al. 2023, "Do
  gradient inversion attacks make federated learning unsafe?"), whose defaults are 0.1 and 95; not
  NVFlare's `PercentilePrivacy`, which truncates the update and adds no noise.

  The scale depends on private data, so no (epsilon, delta) can be stated. Noise is fresh in every
  execution, drawn from the client's own entropy, and so cannot be reproduced.

  State, measurements and weightedness: see `update_transform_factory`.

  Args:
    sigma0: Noise relative to the percentile, not negative.
    percentile: From 0 to 100.
    inner: Aggregates what the clients send; the weighted mean by default.
    secure_measurements: See `update_transform_factory`.

  Raises:
    ValueError: If a number is out of range.
    TypeError: If `inner` is no factory.
  """
  if not (math.isfinite(sigma0) and sigma0 >= 0):
    raise ValueError(f'sigma0 must be finite and not negative, found {sigma0}')
  if not 0 <= percentile <= 100:
    raise ValueError(f'percentile must be from 0 to 100, found {percentile}')

  return update_transform_factory(
    lambda update: percentile_noised(update, draw_key(), sigma0, percentile),
    inner,
    secure_measurements=secure_measurements,
  )


def percentile_noised(
  update: list[tf.Tensor], key: tf.Tensor, sigma0: float, percentile: float
) -> list[tf.Tensor]:
  """What one client sends; the arithmetic of `percentile_noise_factory`.

  Args:
    update: Of any shapes.
    key: int32 [2], decides the noise.
    sigma0: See there.
    percentile: See there.

  Returns:
    As many tensors of the same shapes.
  """
  magnitudes = tf.abs(tf.concat([tf.reshape(tensor, [-1]) for tensor in update], axis=0))
  nonzero = tf.boolean_mask(magnitudes, magnitudes > 0)
  # One zero stands in for an update of zeros, which gets no noise.
  nonzero = tf.cond(tf.size(nonzero) > 0, lambda: nonzero, lambda: tf.zeros([1]))
  sigma = sigma0 * tfp.stats.percentile(nonzero, percentile, interpolation='linear')
  normal = stateless_normal_like(update, key, draw=0)
  return [tensor + sigma * n for tensor, n in zip(update, normal, strict=True)]
