"""Gaussian noise of one public shape, with which (epsilon, delta) can be stated."""

import collections
import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators.client_side import ClientSide, Factory, client_side_factory
from tff_shadow.aggregators.entropy import draw_key
from tff_shadow.aggregators.measurements import federated_average
from tff_shadow.aggregators.shadow_noise import (
  check_float32,
  squared_norm,
  stateless_normal_like,
)


def public_shadow_noise_factory(
  deviations: Any,
  *,
  clip_norm: float,
  noise_multiplier: float,
  inner: Factory | None = None,
  secure_measurements: bool = False,
) -> Factory:
  """Returns a factory that clips and noises updates on the client in one public geometry.

  With D = diag(deviations) and D normalised to a root mean square of 1, a client sends

    clip(update) + noise_multiplier clip_norm D z,  z ~ N(0, I),

  where clip scales the update so that |D^-1 update| <= clip_norm. The shape is public: computed by
  a shadow on public data, kept in the state, broadcast to the clients. So it carries nothing
  private, the mechanism is the Gaussian one in the coordinates D^-1 x, and
  `tff_shadow.privacy.public_shape_guarantee` accounts for it. Noise is fresh in every execution,
  drawn from the client's own entropy.

  Takes any structure of floating point tensors, so it drops into every stock
  `tff.learning.algorithms.build_*(model_aggregator=...)`.

  State: `OrderedDict(inner, context)`, where context holds the normalised deviations; a server may
  replace them between rounds by others that are as public. Measurements: `OrderedDict(inner,
  sent_norm)`; the mean over clients of |D^-1 y| of what y they send. Weighted if `inner` is.

  The guarantee covers what this factory is given. A weight (number of examples) and training
  metrics that a learning process sends beside the update are outside of it.

  Args:
    deviations: Standard deviations, positive; a structure like the update.
    clip_norm: Above 0.
    noise_multiplier: Noise relative to `clip_norm`, not negative.
    inner: Aggregates what the clients send; the weighted mean by default.
    secure_measurements: Whether the mean norm is computed by secure summation, in steps of 1e-6 and
      with at most 4096 from a client.

  Raises:
    ValueError: If a number is out of range, or a deviation is not positive and finite.
  """
  if not (math.isfinite(clip_norm) and clip_norm > 0):
    raise ValueError(f'clip_norm must be finite and above 0, found {clip_norm}')
  if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
    raise ValueError(f'noise_multiplier must be finite and not negative, found {noise_multiplier}')
  normalised = normalised_deviations(deviations)

  def build(value_type: tff.types.Type) -> ClientSide:
    check_float32(value_type)

    @tff.tensorflow.computation
    def context():
      return [tf.constant(array) for array in normalised]

    @tff.tensorflow.computation(value_type, context.type_signature.result)
    @tf.function(autograph=False)
    def transform(value, deviations):
      update = tf.nest.flatten(value)
      # Here, where both are in the order of tf.nest: a type keeps dictionaries in their own.
      found, expected = ([tuple(t.shape) for t in tensors] for tensors in (deviations, update))
      if found != expected:
        raise TypeError(f'deviations have the shapes {found}, the update has {expected}')
      key = draw_key()
      norm = tf.sqrt(squared_norm(_whitened(update, deviations)))
      finite = tf.math.is_finite(norm)
      scale = tf.where(finite, tf.minimum(1.0, clip_norm / tf.maximum(norm, 1e-30)), 0.0)
      clipped = [tf.where(finite, scale * u, 0.0) for u in update]
      normal = stateless_normal_like(clipped, key, draw=0)
      noise = [
        noise_multiplier * clip_norm * d * n for d, n in zip(deviations, normal, strict=True)
      ]
      noised = [u + n for u, n in zip(clipped, noise, strict=True)]
      # Of what is sent, not of the clean update: a statistic of that would void the guarantee.
      sent_norm = tf.sqrt(squared_norm(_whitened(noised, deviations)))
      statistics = collections.OrderedDict(sent_norm=sent_norm)
      return tf.nest.pack_sequence_as(value, noised), statistics

    def measure(statistics):
      return collections.OrderedDict(
        sent_norm=federated_average(statistics.sent_norm, secure_measurements)
      )

    return ClientSide(transform, value_type, measure, context)

  return client_side_factory(build, inner)


def _whitened(update, deviations) -> list[tf.Tensor]:
  return [u / d for u, d in zip(update, deviations, strict=True)]


def normalised_deviations(deviations: Any) -> list[np.ndarray]:
  """Flattens `deviations` and scales them to a root mean square of 1 over all weights.

  Raises:
    ValueError: If one is not positive and finite: a weight without noise leaks what it holds.
  """
  arrays = [np.asarray(array, np.float32) for array in tf.nest.flatten(deviations)]
  if not arrays or not all(np.isfinite(a).all() and (a > 0).all() for a in arrays):
    raise ValueError('deviations must be positive and finite')
  total = sum(float(np.square(a.astype(np.float64)).sum()) for a in arrays)
  count = sum(a.size for a in arrays)
  return [(a / math.sqrt(total / count)).astype(np.float32) for a in arrays]
