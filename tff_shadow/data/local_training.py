"""The order in which a client sees its examples, and the data set that follows it."""

import collections
import math

import numpy as np
import tensorflow as tf

from tff_shadow.data.examples import Examples


def local_training_order(
  num_examples: int,
  batch_size: int,
  epochs: int,
  max_steps: int | None,
  rng: np.random.Generator,
) -> np.ndarray:
  """Returns the example indices of one client's local training, int64 [M].

  One permutation per epoch, joined without a break between epochs, cut to `max_steps` batches
  (None: no cut). Read in batches of `batch_size`, only the very last may be short.

  Raises:
    ValueError: an argument is below 1.
  """
  arguments = {'num_examples': num_examples, 'batch_size': batch_size, 'epochs': epochs}
  if max_steps is not None:
    arguments['max_steps'] = max_steps
  for name, value in arguments.items():
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  order = np.concatenate([rng.permutation(num_examples) for _ in range(epochs)])
  return order if max_steps is None else order[: max_steps * batch_size]


def most_repeats(num_examples: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
  """How often a client's local training uses an example, at most; see `local_training_order`."""
  if max_steps is None:
    return epochs
  return min(epochs, math.ceil(max_steps * batch_size / num_examples))


def client_dataset(
  examples: Examples,
  order: np.ndarray,
  batch_size: int,
  *,
  with_regions: bool = False,
  noise_keys: np.ndarray | None = None,
) -> tf.data.Dataset:
  """Returns the batches of `examples` in `order`.

  Args:
    examples: a client's examples.
    order: int [M], indices into `examples`; repeats allowed.
    batch_size: examples in a batch; the last batch may be short.
    with_regions: adds the sensitive regions.
    noise_keys: int32 [N, 2], adds each example's key (`tff_shadow.shadow.noise_keys`).

  Returns:
    A dataset of OrderedDict(x=float32 [B, H, W, C] in [0, 1], y=int32 [B]) and, with regions,
    region=float32 [B, H, W, 1] in [0, 1]; with keys, noise_key=int32 [B, 2] before it.

  Raises:
    ValueError: `order` points outside the examples.
  """
  order = np.asarray(order, np.int64)
  if order.ndim != 1 or (len(order) and not 0 <= order.min() <= order.max() < len(examples)):
    raise ValueError(f'order must be indices [M] in 0..{len(examples) - 1}')
  # The images stay uint8, once each, however many epochs `order` spans: the data set is copied
  # into every serialised round.
  images = tf.constant(examples.images)
  labels = tf.constant(examples.labels)
  regions = tf.constant(examples.regions) if with_regions else None
  keys = None if noise_keys is None else tf.constant(noise_keys, tf.int32)

  def batch(indices):
    element = collections.OrderedDict(
      x=tf.cast(tf.gather(images, indices), tf.float32) / 255.0, y=tf.gather(labels, indices)
    )
    if keys is not None:
      element['noise_key'] = tf.gather(keys, indices)
    if regions is not None:
      element['region'] = tf.cast(tf.gather(regions, indices), tf.float32) / 255.0
    return element

  return tf.data.Dataset.from_tensor_slices(order).batch(batch_size).map(batch)
