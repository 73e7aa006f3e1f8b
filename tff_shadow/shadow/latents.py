"""Latents of images: step 1 of the published shadow defence (Jiang, Ma and Yang 2025)."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models import graph_function

_HALVED_AT_EIGHTHS = (3, 5, 7)
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


@dataclasses.dataclass(frozen=True)
class LatentFit:
  """How a latent is fitted to an image; the defaults are the published constants.

  The published learning rate moves a coordinate by at most about 0.29 in 500 steps, of latents that
  are drawn from N(0, 1); about 0.1 comes far closer to the images.

  Attributes:
    learning_rate: Of AdamW, halved at 3/8, 5/8 and 7/8 of the steps.
    weight_decay: Of AdamW, times the learning rate (PyTorch's default).
    steps: At most.
    patience: So many steps in a row with a rising error stop an image.
    patience_after: The first step, counted from 0, at which it can be stopped.
  """

  learning_rate: float = 1e-3
  weight_decay: float = 0.01
  steps: int = 500
  patience: int = 5
  patience_after: int = 50

  def __post_init__(self):
    """Raises `ValueError` for a setting out of range."""
    if not 0 < self.learning_rate < math.inf:
      raise ValueError(f'learning_rate must be a positive number, found {self.learning_rate}')
    if not 0 <= self.weight_decay < math.inf:
      raise ValueError(f'weight_decay must be at least 0, found {self.weight_decay}')
    for name, least in (('steps', 1), ('patience', 1), ('patience_after', 0)):
      if getattr(self, name) < least:
        raise ValueError(f'{name} must be at least {least}, found {getattr(self, name)}')


class FittedLatents(NamedTuple):
  """What `fit_latents` found.

  Attributes:
    latents: float32 [N, ...].
    mse: float32 [N], of the generator's images of these latents, over pixels and channels.
    steps: int32 [N], taken before the image was stopped.
  """

  latents: np.ndarray
  mse: np.ndarray
  steps: np.ndarray


class _State(NamedTuple):
  """Of the images of a batch, each by itself; [B, ...] or [B]."""

  latents: tf.Tensor
  first: tf.Tensor
  second: tf.Tensor
  mse: tf.Tensor
  rising: tf.Tensor
  active: tf.Tensor
  steps: tf.Tensor


def start_latents(generator: tf.keras.Model, count: int, *, seed: int) -> np.ndarray:
  """Start latents ~ N(0, 1), float32 [count, ...]; fewer of the same seed are the first of more."""
  shape = (count, *generator.inputs[0].shape[1:])
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fit_latents(
  generator: tf.keras.Model,
  images: np.ndarray,
  settings: LatentFit | None = None,
  *,
  seed: int,
  batch_size: int = 32,
  report: Callable[[int], None] | None = None,
) -> FittedLatents:
  """Finds the latent of each image: AdamW on the mean squared error of the generator's image.

  Every image is fitted by itself, from a start of its own: neither the others of its batch nor
  their number matter, but for the last bits. An image that is stopped keeps its latent.

  Args:
    generator: Latents [B, ...] -> images [B, H, W, C] in [0, 1], called in inference mode and not
      changed; its weights are read as they are now.
    images: float [N, H, W, C] in [0, 1].
    settings: The published ones by default.
    seed: Decides the start latents.
    batch_size: Images fitted side by side, which bounds the memory.
    report: Told how many images are done after each batch.

  Returns:
    Latents, errors and steps.

  Raises:
    UserError: If the images do not fit the generator, or an error or a latent is not finite.
  """
  settings = settings or LatentFit()
  images = np.asarray(images, np.float32)
  wanted = generator.outputs[0].shape
  if images.ndim != 4 or not len(images) or not wanted[1:].is_compatible_with(images.shape[1:]):
    raise UserError(
      f'latent fit: images of shape {images.shape}, the generator draws {tuple(wanted)}'
    )
  if not np.isfinite(images).all():
    raise UserError('latent fit: an image has pixels that are not finite')
  count = len(images)
  starts = start_latents(generator, count, seed=seed)
  # The last batch is filled up with images of the first ones: one shape, one trace.
  batch_size = min(batch_size, count)
  fit = graph_function(
    lambda z, x: _fit_batch(generator, z, x, settings), generator
  ).get_concrete_function(
    tf.TensorSpec([batch_size, *starts.shape[1:]]), tf.TensorSpec([batch_size, *images.shape[1:]])
  )
  found = []
  for begin in range(0, count, batch_size):
    chosen = np.arange(begin, begin + batch_size) % count
    state = fit(tf.constant(starts[chosen]), tf.constant(images[chosen]))
    kept = min(batch_size, count - begin)
    found.append([tensor[:kept].numpy() for tensor in (state.latents, state.mse, state.steps)])
    if report is not None:
      report(begin + kept)
  latents, mse, steps = (np.concatenate(parts) for parts in zip(*found, strict=True))
  finite = np.isfinite(mse) & np.isfinite(latents.reshape(count, -1)).all(axis=1)
  if not finite.all():
    raise UserError(
      f'latent fit: the latent or the error of image {int(np.argmin(finite))} is not finite; does'
      f' the generator draw finite images, and is the learning rate {settings.learning_rate} too'
      ' large?'
    )
  return FittedLatents(latents, mse, steps)


def _fit_batch(
  generator: tf.keras.Model, latents: tf.Tensor, images: tf.Tensor, settings: LatentFit
) -> _State:
  batch = latents.shape[0]

  def errors(latents):
    drawn = generator(tf.cast(latents, generator.inputs[0].dtype), training=False)
    return tf.reduce_mean(tf.square(tf.cast(drawn, tf.float32) - images), axis=(1, 2, 3))

  def step(index, state):
    with tf.GradientTape() as tape:
      tape.watch(state.latents)
      mse = errors(state.latents)
    # Images do not meet in the generator, so the sum's gradient is each one's own.
    gradient = tape.gradient(mse, state.latents)
    rising = tf.where(mse > state.mse, state.rising + 1, 0)
    stopped = (rising >= settings.patience) & (index >= settings.patience_after)
    active = state.active & tf.logical_not(stopped)
    latents, first, second = _adamw(state, gradient, index, settings)
    new = _State(latents, first, second, mse, rising, active, state.steps + 1)
    # What is stopped stays as it is, its moments included: momentum would carry it on.
    return index + 1, tf.nest.map_structure(
      lambda new, old: tf.where(tf.reshape(active, [batch] + [1] * (new.shape.rank - 1)), new, old),
      new,
      state,
    )._replace(active=active)

  start = _State(
    latents=latents,
    first=tf.zeros_like(latents),
    second=tf.zeros_like(latents),
    mse=tf.fill([batch], np.float32(np.inf)),
    rising=tf.zeros([batch], tf.int32),
    active=tf.ones([batch], tf.bool),
    steps=tf.zeros([batch], tf.int32),
  )
  _, state = tf.while_loop(
    lambda index, state: tf.reduce_any(state.active),
    step,
    (tf.constant(0), start),
    maximum_iterations=settings.steps,
    parallel_iterations=1,
  )
  return state._replace(mse=errors(state.latents))


def _adamw(
  state: _State, gradient: tf.Tensor, index: tf.Tensor, settings: LatentFit
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """One step of AdamW (Loshchilov and Hutter 2019) as in PyTorch: new latents and moments."""
  passed = [
    tf.cast(8 * index >= eighths * settings.steps, tf.float32) for eighths in _HALVED_AT_EIGHTHS
  ]
  rate = settings.learning_rate * 0.5 ** tf.add_n(passed)
  first = _BETA_1 * state.first + (1 - _BETA_1) * gradient
  second = _BETA_2 * state.second + (1 - _BETA_2) * tf.square(gradient)
  count = tf.cast(index + 1, tf.float32)
  unbiased_first = first / (1 - _BETA_1**count)
  unbiased_second = second / (1 - _BETA_2**count)
  decayed = state.latents * (1 - rate * settings.weight_decay)
  step = rate * unbiased_first / (tf.sqrt(unbiased_second) + _EPSILON)
  return decayed - step, first, second
