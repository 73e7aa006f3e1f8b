"""Stochastic quantisation of updates to a few bits per entry."""

import tensorflow as tf

from tff_shadow.aggregators.client_side import Factory
from tff_shadow.aggregators.entropy import draw_key
from tff_shadow.aggregators.update_transform import update_transform_factory

_MAX_BITS = 16


def quantization_factory(
  bits: int, inner: Factory | None = None, *, secure_measurements: bool = False
) -> Factory:
  """Returns a factory whose clients send their update rounded at random to `bits` bits per entry.

  The entries of each tensor are rounded to 2^bits levels that divide the interval from its least to
  its greatest entry evenly: up or down at random, so that the expectation is the entry itself
  (stochastic k-level quantisation, Suresh et al. 2017, "Distributed mean estimation with limited
  communication", section 2.2). What is handed to `inner` are the levels' values, which are as much
  as the bits and the two ends tell.

  TFF's `EncodedSumFactory.quantize_above_threshold` does the same arithmetic but takes no inner
  factory, so that nothing can see what a client sent; its `DiscretizationFactory` rounds to a grid
  of one public width, without end.

  Rounding is fresh in every execution, drawn from the client's own entropy, and so cannot be
  reproduced.

  State, measurements and weightedness: see `update_transform_factory`.

  Args:
    bits: From 1 to 16.
    inner: Aggregates what the clients send; the weighted mean by default.
    secure_measurements: See `update_transform_factory`.

  Raises:
    ValueError: If `bits` is out of range.
    TypeError: If `inner` is no factory.
  """
  if not 1 <= bits <= _MAX_BITS:
    raise ValueError(f'bits must be from 1 to {_MAX_BITS}, found {bits}')

  return update_transform_factory(
    lambda update: quantized(update, draw_key(), bits),
    inner,
    secure_measurements=secure_measurements,
  )


def quantized(update: list[tf.Tensor], key: tf.Tensor, bits: int) -> list[tf.Tensor]:
  """What one client sends; the arithmetic of `quantization_factory`.

  Args:
    update: Of any shapes.
    key: int32 [2], decides what is rounded up and what down.
    bits: See there.

  Returns:
    As many tensors of the same shapes.
  """
  keys = tf.random.experimental.stateless_split(key, len(update))
  return [_rounded(tensor, keys[index], 2**bits - 1) for index, tensor in enumerate(update)]


def _rounded(tensor: tf.Tensor, key: tf.Tensor, steps: int) -> tf.Tensor:
  least = tf.reduce_min(tensor)
  step = (tf.reduce_max(tensor) - least) / steps
  # In units of the step; all zeros for a tensor of one value.
  position = tf.math.divide_no_nan(tensor - least, step)
  lower = tf.floor(position)
  up = tf.random.stateless_uniform(tensor.shape, key) < position - lower
  return least + step * tf.minimum(lower + tf.cast(up, tf.float32), float(steps))
