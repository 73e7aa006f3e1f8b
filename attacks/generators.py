"""Images drawn by a network: the optimiser moves its weights, its input, or both."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from attacks.parametrizations import AllActive

# (weights, inputs, training) -> outputs, as `attacks.functional_model.FunctionalModel`.
FunctionalGenerator = Callable[[Sequence[tf.Tensor], tf.Tensor, bool], tf.Tensor]

_NORM_EPSILON = 1e-5
_SLOPE = 0.2
_COARSEST = 8
_SKIP_CHANNELS = 4


@dataclasses.dataclass(frozen=True)
class DeepImagePrior(AllActive):
  """Weights of an untrained network that draws the images from fixed noise.

  Such a network fits natural structure sooner than noise (Ulyanov et al. 2018, "Deep image prior"),
  which makes it a prior for gradient inversion too (Zhang et al. 2023, "Generative gradient
  inversion via over-parameterized networks"). The hourglass of Ulyanov et al., smaller:
  convolutions of stride 2 down to about 8 px, back up with skip connections, a sigmoid at the end,
  so that images lie in (0, 1). Every lane has weights of its own; the images of its batch share
  them and differ by their noise, each normalised by itself. Adam's learning rate should be about
  0.01.

  Attributes:
    channels: Of every convolution.
    noise_channels: Of the noise that is drawn from.
    seed: Decides noise and start weights, with the lane's own.
  """

  channels: int = 32
  noise_channels: int = 16
  seed: int = 0
  invertible: ClassVar[bool] = False
  name: str = dataclasses.field(default='deep_image_prior', init=False)

  def __post_init__(self):
    """Raises `ValueError` for a network without channels."""
    for field in ('channels', 'noise_channels'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field} must be at least 1, found {getattr(self, field)}')

  def parameters(self, images: tf.Tensor, seeds: tf.Tensor | None = None) -> dict[str, Any]:
    """Start weights. No network is sought that draws the images: only their mean is taken over.

    Args:
      images: [R, B, H, W, C] in [0, 1]; H and W at least 8. Each image starts near the mean colour
        of its lane's.
      seeds: int32 [R], one per lane; lanes of the same seed start alike. 0..R-1 by default.

    Returns:
      Tensors with the leading axis R: the weights, and the noise, which never moves.

    Raises:
      ValueError: If the images are too small.
    """
    lanes, batch, height, width, image_channels = images.shape
    if min(height, width) < _COARSEST:
      raise ValueError(f'images must be at least {_COARSEST} px in size, found {height} x {width}')
    draw = _Draws(self.seed, lanes, seeds, images.dtype)
    scales = max(1, round(math.log2(min(height, width) / _COARSEST)))
    channels = self.channels
    inputs, down, skip = self.noise_channels, [], []
    for _ in range(scales):
      skip.append(_start_block(draw, 1, inputs, _SKIP_CHANNELS))
      down.append(
        [_start_block(draw, 3, inputs, channels), _start_block(draw, 3, channels, channels)]
      )
      inputs = channels
    up = [
      [
        _start_block(draw, 3, channels + _SKIP_CHANNELS, channels),
        _start_block(draw, 1, channels, channels),
      ]
      for _ in range(scales)
    ]
    # Small, so that the start is the mean colour with little of the network's own pattern.
    kernel = 0.1 * draw.normal((1, 1, channels, image_channels)) / math.sqrt(channels)
    mean = tf.clip_by_value(tf.reduce_mean(images, axis=(1, 2, 3)), 0.02, 0.98)
    return {
      'noise': draw.normal((batch, height, width, self.noise_channels)),
      'down': down,
      'skip': skip,
      'up': up,
      'output': {'kernel': kernel, 'bias': tf.math.log(mean) - tf.math.log1p(-mean)},
    }

  def images(self, parameters: dict[str, Any]) -> tf.Tensor:
    """Images [R, B, H, W, C] in (0, 1), of the lanes one by one."""
    # A loop: on a CPU as fast as one grouped convolution, and much faster where XLA compiles it.
    lanes = parameters['noise'].shape[0]
    return tf.stack([_hourglass(_lane(parameters, index)) for index in range(lanes)])

  def active(self, parameters: dict[str, Any], iteration: tf.Tensor, iterations: int) -> Any:
    """1 for all weights, 0 for the noise; see `AllActive`."""
    ones = super().active(parameters, iteration, iterations)
    return {**ones, 'noise': tf.zeros_like(parameters['noise'])}


@dataclasses.dataclass(frozen=True)
class GenerativePrior:
  """Latents of a pretrained generator, and then its weights too.

  Gradient inversion with a generative image prior (Jeon et al. 2021, GIAS): first the latent that
  explains the update best, then, a share of the iterations, the generator's weights, so that the
  images may leave what it was trained on; each lane has a copy. Jiang et al. 2025 take 5,000 and
  5,000 steps, the latents at learning rate 1e-2, the weights at 1e-4.

  Attributes:
    generator: Latents [N, ...] -> images [N, H, W, C] in [0, 1], as `models.load_generator` checks;
      is not changed.
    functional: Calls it with other weights; a `FunctionalModel` of it by default.
    source: Where it came from, for the record.
    weight_share: The share of the iterations, at the end, in which the weights move; 0 for never.
    latents_last: Whether the latents move with the weights; in Jeon et al. they stay.
    weight_scale: Steps of the weights over those of the latents.
    seed: Decides the start latents, with the lane's own.
  """

  generator: dataclasses.InitVar[tf.keras.Model]
  functional: dataclasses.InitVar[FunctionalGenerator | None] = None
  source: str = ''
  weight_share: float = 0.5
  latents_last: bool = True
  weight_scale: float = 0.01
  seed: int = 0
  invertible: ClassVar[bool] = False
  name: str = dataclasses.field(default='generative_prior', init=False)

  def __post_init__(self, generator: tf.keras.Model, functional: FunctionalGenerator | None):
    """Stores what is no setting, so that `dataclasses.asdict` gives plain values."""
    if not 0 <= self.weight_share <= 1:
      raise ValueError(f'weight_share must be in [0, 1], found {self.weight_share}')
    if functional is None and self.weight_share:
      from attacks.functional_model import FunctionalModel

      functional = FunctionalModel(generator)
    object.__setattr__(self, '_generator', generator)
    object.__setattr__(self, '_functional', functional)

  def parameters(self, images: tf.Tensor, seeds: tf.Tensor | None = None) -> dict[str, Any]:
    """Start latents ~ N(0, 1); no latent is sought that draws the images.

    Args:
      images: [R, B, H, W, C], of which only shape and type count.
      seeds: int32 [R], one per lane; lanes of the same seed start alike. 0..R-1 by default.

    Returns:
      'latents' [R, B, ...] and 'weights', one [R, ...] per trainable variable: its change over
      `weight_scale`, so 0; empty without a weight share.
    """
    lanes, batch = images.shape[:2]
    draw = _Draws(self.seed, lanes, seeds, images.dtype)
    variables = self._generator.trainable_variables if self.weight_share else ()
    return {
      'latents': draw.normal((batch, *self._generator.inputs[0].shape[1:])),
      'weights': [tf.zeros((lanes, *variable.shape), images.dtype) for variable in variables],
    }

  def images(self, parameters: dict[str, Any]) -> tf.Tensor:
    """Images [R, B, H, W, C], of the type of the latents."""
    latents = parameters['latents']
    inputs = tf.cast(latents, self._generator.inputs[0].dtype)
    if not parameters['weights']:
      flat = self._generator(tf.reshape(inputs, (-1, *inputs.shape[2:])), training=False)
      return tf.cast(tf.reshape(flat, (*inputs.shape[:2], *flat.shape[1:])), latents.dtype)
    images = []
    for index in range(inputs.shape[0]):
      weights = [
        variable + tf.cast(self.weight_scale * change[index], variable.dtype)
        for variable, change in zip(
          self._generator.trainable_variables, parameters['weights'], strict=True
        )
      ]
      images.append(self._functional(weights, inputs[index], False))
    return tf.cast(tf.stack(images), latents.dtype)

  def active(self, parameters: dict[str, Any], iteration: tf.Tensor, iterations: int) -> Any:
    """1 for what the phase moves; see `AllActive`."""
    last = tf.cast(iteration, tf.float32) >= (1 - self.weight_share) * iterations

    def filled(tensors, moves):
      return tf.nest.map_structure(lambda t: tf.ones_like(t) * tf.cast(moves, t.dtype), tensors)

    return {
      'latents': filled(parameters['latents'], tf.logical_or(self.latents_last, ~last)),
      'weights': filled(parameters['weights'], last),
    }


class _Draws:
  """Normal numbers with one stream per lane, so that a lane's do not depend on the others."""

  def __init__(self, seed: int, lanes: int, seeds: tf.Tensor | None, dtype: tf.DType):
    self._seed = seed
    self._lanes = tf.range(lanes) if seeds is None else tf.cast(seeds, tf.int32)
    if self._lanes.shape != (lanes,):
      raise ValueError(f'seeds must have the shape ({lanes},), found {self._lanes.shape}')
    self._dtype = dtype
    self._count = 0

  def normal(self, shape: Sequence[int]) -> tf.Tensor:
    """The next [R, *shape]."""
    self._count += 1
    drawn = []
    for lane in tf.unstack(self._lanes):
      key = tf.random.experimental.stateless_fold_in((self._seed, self._count), lane)
      drawn.append(tf.random.stateless_normal(shape, key, alg='philox'))
    return tf.cast(tf.stack(drawn), self._dtype)


def _start_block(draw: _Draws, size: int, inputs: int, outputs: int) -> dict[str, tf.Tensor]:
  """Weights of a convolution and the scale and offset after it."""
  kernel = draw.normal((size, size, inputs, outputs)) / math.sqrt(size * size * inputs)
  scale = tf.ones_like(kernel[:, 0, 0, 0])
  return {'kernel': kernel, 'scale': scale, 'offset': tf.zeros_like(scale)}


def _lane(parameters: Any, index: int) -> Any:
  return tf.nest.map_structure(lambda tensor: tensor[index], parameters)


def _hourglass(weights: dict[str, Any]) -> tf.Tensor:
  """Images [B, H, W, C] of one lane."""
  x = weights['noise']
  skipped = []
  for skip, (shrink, keep) in zip(weights['skip'], weights['down'], strict=True):
    skipped.append(_block(x, skip))
    x = _block(_block(x, shrink, stride=2), keep)
  for (widen, mix), skip in zip(reversed(weights['up']), reversed(skipped), strict=True):
    x = tf.concat([_upsample(x, skip.shape[1:3]), skip], axis=-1)
    x = _block(_block(x, widen), mix)
  logits = tf.nn.conv2d(x, weights['output']['kernel'], 1, 'SAME') + weights['output']['bias']
  return tf.sigmoid(logits)


def _block(x: tf.Tensor, weights: dict[str, tf.Tensor], stride: int = 1) -> tf.Tensor:
  """Convolution, normalisation of each image and channel, leaky rectifier."""
  x = tf.nn.conv2d(x, weights['kernel'], stride, 'SAME')
  x -= tf.reduce_mean(x, axis=(1, 2), keepdims=True)
  x *= tf.math.rsqrt(tf.reduce_mean(tf.square(x), axis=(1, 2), keepdims=True) + _NORM_EPSILON)
  return tf.nn.leaky_relu(x * weights['scale'] + weights['offset'], _SLOPE)


def _upsample(x: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
  """Bilinear, to twice the size or one less; in the type of x, unlike `tf.image.resize`."""
  rows, columns = (
    tf.constant(_interpolation(old, new), x.dtype)
    for old, new in zip(x.shape[1:3], size, strict=True)
  )
  return tf.einsum('ih,bhwc,jw->bijc', rows, x, columns)


def _interpolation(old: int, new: int) -> np.ndarray:
  """Linear interpolation at pixel centres as a matrix [new, old]."""
  positions = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(old)[None, :]))
