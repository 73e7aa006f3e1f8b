"""Gradient pruning: only the largest entries of an update are sent."""

import numpy as np
import tensorflow as tf

from tff_shadow.aggregators.client_side import Factory
from tff_shadow.aggregators.update_transform import update_transform_factory


def top_k_factory(
  fraction: float, inner: Factory | None = None, *, secure_measurements: bool = False
) -> Factory:
  """Returns a factory whose clients send the largest entries of their update and zeros else.

  Of all n entries of all tensors together, the max(1, round(fraction n)) of largest magnitude are
  kept as they are; among equal ones the first. Zhu, Liu and Han 2019 ("Deep leakage from
  gradients", section 5) propose it as a defence, after the compression of Aji and Heafield 2017.
  Unlike compression for its own sake (Lin et al. 2018) what is not sent is not carried over to the
  next round, so that it is never sent.

  State, measurements and weightedness: see `update_transform_factory`.

  Args:
    fraction: Of the entries that are sent, above 0 and at most 1.
    inner: Aggregates what the clients send; the weighted mean by default.
    secure_measurements: See `update_transform_factory`.

  Raises:
    ValueError: If the fraction is out of range.
    TypeError: If `inner` is no factory.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f'fraction must be above 0 and at most 1, found {fraction}')

  return update_transform_factory(
    lambda update: largest_entries(update, fraction), inner, secure_measurements=secure_measurements
  )


def largest_entries(update: list[tf.Tensor], fraction: float) -> list[tf.Tensor]:
  """What one client sends; the arithmetic of `top_k_factory`.

  Args:
    update: Of any shapes.
    fraction: See there.

  Returns:
    As many tensors of the same shapes.
  """
  sizes = [int(np.prod(tensor.shape)) for tensor in update]
  flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in update], axis=0)
  kept = max(1, round(fraction * sum(sizes)))
  # By index, not by a threshold, which would keep all entries that equal it.
  indices = tf.math.top_k(tf.abs(flat), kept).indices
  pruned = tf.scatter_nd(indices[:, tf.newaxis], tf.gather(flat, indices), tf.shape(flat))
  parts = tf.split(pruned, sizes)
  return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, update, strict=True)]
