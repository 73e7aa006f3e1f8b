"""Where the published defence puts noise: the maps of Jiang, Ma and Yang 2025, steps 4 to 7.

All of it in standardised pixels, (x - mean) / standard deviation of the data set, as in the paper:
temperatures and amplitude are in these units.
"""

from typing import Literal, get_args

import numpy as np
import tensorflow as tf

Equalization = Literal['luminance', 'released', 'none']
EQUALIZATIONS: tuple[Equalization, ...] = get_args(Equalization)

_LEVELS = 256
_LUMINANCE = (0.299, 0.587, 0.114)


def exposure_map(
  reconstructions: tf.Tensor,
  images: tf.Tensor,
  *,
  temperature: float = 20.0,
  equalization: Equalization = 'luminance',
) -> tf.Tensor:
  """Step 4: what the shadow reconstructs well is exposed, and gets most noise.

  e, the squared error, goes through a softmax over pixels and channels of e / temperature; its
  reciprocal is equalised and goes through the same softmax once more.

  Args:
    reconstructions: float32 [B, H, W, C], standardised.
    images: float32 [B, H, W, C], standardised.
    temperature: Of both softmaxes.
    equalization: See `equalize_histogram`; 'none' leaves it out.

  Returns:
    float32 [B, H, W, C], at least 0, sums to 1 over each image.
  """
  errors = tf.math.squared_difference(reconstructions, images)
  noise = 1.0 / softmax_over_image(errors, temperature)
  if equalization != 'none':
    noise = equalize_histogram(noise, scramble=equalization == 'released')
  return softmax_over_image(noise, temperature)


def softmax_over_image(values: tf.Tensor, temperature: float) -> tf.Tensor:
  """Softmax of `values` [B, H, W, C] over temperature, jointly over all but the first axis."""
  flat = tf.reshape(values, (tf.shape(values)[0], -1))
  return tf.reshape(tf.nn.softmax(flat / temperature, axis=-1), tf.shape(values))


def equalize_histogram(noise: tf.Tensor, *, scramble: bool = False) -> tf.Tensor:
  """Histogram equalisation of the luminance of a batch, 256 levels.

  The batch is equalised as one, as in the authors' code: scaled to [0, 255] between its own minimum
  and maximum, and each luminance replaced by the share of pixels at or below its level.

  Args:
    noise: float32 [B, H, W, C], C = 1 or 3.
    scramble: What the released code does and the paper does not say: its equalised pixels, repeated
      once per channel, are read back as if the channels were images of their own. So each channel
      shows a part of the map, every value C times side by side, and a map no longer lies over its
      image. Without effect for C = 1.

  Returns:
    float32 [B, H, W, C], whole numbers in 0..255; zeros where all of `noise` is equal, NaN if any
    of it is not finite.
  """
  channels = noise.shape[-1]
  # A histogram of NaN would end a round without naming it; the caller looks at the result.
  finite = tf.reduce_all(tf.math.is_finite(noise))
  noise = tf.where(finite, noise, 0.0)
  low, high = tf.reduce_min(noise), tf.reduce_max(noise)
  scaled = tf.math.divide_no_nan((noise - low) * 255.0, high - low)
  weights = tf.constant(_LUMINANCE if channels == 3 else (1.0,))
  luminance = tf.reduce_sum(scaled * weights, axis=-1)
  histogram = tf.histogram_fixed_width(luminance, (0.0, 255.0), _LEVELS, tf.int32)
  cumulative = tf.cast(tf.cumsum(histogram), tf.float32)
  first, last = cumulative[0], cumulative[-1]
  # The small offset keeps a share that is a whole level from being rounded down to the one below.
  levels = tf.floor(tf.math.divide_no_nan((cumulative - first) * 255.0, last - first) + 1e-3)
  # Rounding can put the brightest a hair above 255.
  index = tf.clip_by_value(tf.cast(luminance, tf.int32), 0, _LEVELS - 1)
  equalized = tf.where(finite, tf.gather(levels, index)[..., tf.newaxis], np.nan)
  shape = tf.shape(noise)
  if scramble:
    channels_first = tf.gather(shape, (0, 3, 1, 2))
    repeated = tf.repeat(tf.reshape(equalized, (-1,)), channels)
    return tf.transpose(tf.reshape(repeated, channels_first), (0, 2, 3, 1))
  return tf.broadcast_to(equalized, shape)


def averaged_map(old: tf.Tensor, new: tf.Tensor, momentum: float) -> tf.Tensor:
  """Step 5: momentum * old + (1 - momentum) * new."""
  return momentum * old + (1.0 - momentum) * new


def cam_weight(progress: float, lowest: float, highest: float) -> float:
  """Step 6: alpha = clip(t / T, lowest, highest) of a round t of T, counted from 0."""
  return min(highest, max(lowest, progress))


def subtract_cam(
  noise: tf.Tensor,
  cam: tf.Tensor,
  weight: float | tf.Tensor,
  *,
  top_fraction: float = 0.3,
  temperature: float = 20.0,
) -> tf.Tensor:
  """Step 6: less noise where the task looks.

  noise - weight * sign(noise) * softmax(cam / temperature), the softmax over pixels of the map of
  which only the top fraction is kept and the rest is 0. As `cam` is at most 1, this softmax varies
  by 5 % at the published temperature: nearly the same number is subtracted everywhere.

  Args:
    noise: float32 [B, H, W, C].
    cam: float32 [B, H, W, 1] in [0, 1], Grad-CAM++ of the global model.
    weight: alpha.
    top_fraction: In [0, 1].
    temperature: Of the softmax.

  Returns:
    float32 [B, H, W, C].
  """
  shape = tf.shape(cam)
  flat = tf.reshape(cam, (shape[0], -1))
  count = tf.cast(top_fraction * tf.cast(tf.shape(flat)[1], tf.float32) + 1e-3, tf.int32)
  # Ranks, so that exactly `count` pixels are kept where values are equal.
  ranks = tf.argsort(tf.argsort(flat, direction='DESCENDING', stable=True), stable=True)
  kept = tf.reshape(tf.where(ranks < count, flat, 0.0), shape)
  return noise - weight * tf.sign(noise) * softmax_over_image(kept, temperature)


def scaled_noise(
  noise: tf.Tensor, images: tf.Tensor, *, amplitude: float, progress: float | tf.Tensor
) -> tf.Tensor:
  """Step 7: |max(x) / max(noise) * amplitude * exp(progress)| * noise, per image.

  Args:
    noise: float32 [B, H, W, C].
    images: float32 [B, H, W, C], standardised.
    amplitude: 0.19 in the paper.
    progress: t / T of the round, counted from 0.

  Returns:
    float32 [B, H, W, C], to be added to `images`; zeros for a map whose maximum is 0.
  """
  peak, brightest = (tf.reduce_max(x, axis=(1, 2, 3), keepdims=True) for x in (noise, images))
  growth = amplitude * tf.exp(tf.cast(progress, tf.float32))
  return tf.abs(tf.math.divide_no_nan(brightest, peak) * growth) * noise


def white_noise_of_same_energy(noise: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
  """An ablation: independent Gaussian noise in all pixels, each image's with the norm of `noise`.

  Args:
    noise: float32 [B, H, W, C].
    keys: int32 [B, 2], one per image.

  Returns:
    float32 [B, H, W, C].
  """
  shape = tf.shape(noise)[1:]
  drawn = tf.map_fn(
    lambda key: tf.random.stateless_normal(shape, key, alg='philox'),
    keys,
    fn_output_signature=tf.float32,
  )
  norms = [
    tf.sqrt(tf.reduce_sum(tf.square(x), axis=(1, 2, 3), keepdims=True)) for x in (noise, drawn)
  ]
  return drawn * (norms[0] / norms[1])
