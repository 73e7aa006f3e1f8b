"""A network that takes region noise out of reconstructions, learned on public images.

Noise that moves the update as the region does (correlated shapes, noise in the images) comes out of
an inversion as noise on the region of the image. What is left to an attacker is to guess the image
under it from what such images look like: the posterior mean, which a network trained to remove the
same noise from public images approaches (Zhang et al. 2018, "FFDNet", feeds it the noise's level as
a map as is done here).
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from attacks.sources import attacks_digest
from tff_shadow.errors import UserError
from tff_shadow.observations import load_tensors, save_tensors
from tff_shadow.shadow.augmentation import augment

_LEVELS = 3


@dataclasses.dataclass(frozen=True)
class DenoiserSettings:
  """How a denoiser is trained.

  Attributes:
    least_deviation: Least standard deviation of the noise where the region is 1, in image units.
    most_deviation: Largest one; drawn in between, evenly on a logarithmic scale.
    steps: Training steps.
    batch_size: Images a step.
    filters: Of the first level; each of the three levels has twice as many.
    learning_rate: Of Adam; falls along half a cosine.
    augmentations: Of `tff_shadow.shadow.augmentation.AUGMENTATIONS`, for image and region together.
    known_region_share: Share of the training images whose region the network is told; for the
      others it is told the mean public region, as it is where the attacker knows no better.
    seed: Decides weights, batches and noise.
  """

  least_deviation: float = 0.02
  most_deviation: float = 1.5
  steps: int = 1500
  batch_size: int = 32
  filters: int = 24
  learning_rate: float = 2e-3
  augmentations: tuple[str, ...] = ('mirror', 'turns')
  known_region_share: float = 0.5
  seed: int = 0

  def __post_init__(self):
    """Raises `ValueError` for settings that train nothing."""
    if not 0 < self.least_deviation <= self.most_deviation < float('inf'):
      raise ValueError(
        'deviations must be 0 < least <= most, found'
        f' {self.least_deviation} and {self.most_deviation}'
      )
    if not 0 <= self.known_region_share <= 1:
      raise ValueError(f'known_region_share must be in [0, 1], found {self.known_region_share}')
    for name in ('steps', 'batch_size', 'filters'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1, found {getattr(self, name)}')


class RegionDenoiser:
  """Trained on public images; called with reconstructions."""

  def __init__(
    self,
    images: np.ndarray,
    regions: np.ndarray,
    settings: DenoiserSettings,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    directory: pathlib.Path | None = None,
  ):
    """Trains the network, or takes it from where the same training left it.

    Args:
      images: Public images float32 [N, H, W, C] in [0, 1], of the attacked modality; H and W
        divisible by 4.
      regions: Their region maps float32 [N, H, W, 1] in [0, 1].
      settings: See there.
      progress: Called after every step with its number and its loss.
      directory: Where trained networks are kept, each in a file that is named by the digest of
        images, regions, settings and sources; None to keep none.

    Raises:
      UserError: If the sizes cannot be used, the training diverged, or a file is damaged.
    """
    height, width, channels = images.shape[1:]
    if height % 2 ** (_LEVELS - 1) or width % 2 ** (_LEVELS - 1):
      raise UserError(
        f'images of {height} x {width}: the denoiser needs sides that are divisible by'
        f' {2 ** (_LEVELS - 1)}'
      )
    tf.keras.utils.set_random_seed(settings.seed)
    self._network = _network((height, width, channels), settings.filters)
    both = np.concatenate([images, regions], axis=-1)
    path = directory / f'denoiser-{_digest(both, settings)}.safetensors' if directory else None
    if path is not None and path.exists():
      self._load(path)
      return
    self._train(both, settings, progress)
    if path is not None:
      save_tensors(path, {f'{k:04d}': array for k, array in enumerate(self._network.get_weights())})

  def __call__(self, images: np.ndarray, deviation: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The images without their noise.

    Args:
      images: Reconstructions float32 [B, H, W, C].
      deviation: [B], of the noise where the region is 1, in image units; those outside of the
        trained range are taken as its nearest end.
      regions: float32 [B, H, W, 1] in [0, 1]; for images whose own is not known the mean of those
        that it was trained on.

    Returns:
      float32 [B, H, W, C] in [0, 1].
    """
    level = np.asarray(deviation, np.float32).reshape(-1, 1, 1, 1) * regions
    outputs = self._network(tf.concat([images, _scaled(level)], axis=-1), training=False)
    return tf.clip_by_value(outputs, 0, 1).numpy()

  def _load(self, path: pathlib.Path) -> None:
    tensors = load_tensors(path)
    try:
      self._network.set_weights([tensors[name] for name in sorted(tensors)])
    except ValueError as error:
      raise UserError(f'{path}: damaged ({error}); delete it') from error

  def _train(self, both: np.ndarray, settings: DenoiserSettings, progress) -> None:
    channels = both.shape[-1] - 1
    schedule = tf.keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.steps)
    optimizer = tf.keras.optimizers.Adam(schedule)
    variables = self._network.trainable_variables
    optimizer.build(variables)
    mean_region = tf.constant(both[..., channels:].mean(axis=0, keepdims=True), tf.float32)
    low, high = np.log([settings.least_deviation, settings.most_deviation])

    @tf.function(autograph=False)
    def step(batch, seed):
      seeds = tf.random.experimental.stateless_split(seed, 4)
      batch = augment(batch, settings.augmentations, seeds[0])
      clean, region = batch[..., :channels], batch[..., channels:]
      column = [tf.shape(batch)[0], 1, 1, 1]
      deviation = tf.exp(tf.random.stateless_uniform(column, seeds[1], low, high))
      noise = deviation * region * tf.random.stateless_normal(tf.shape(clean), seeds[2])
      known = tf.random.stateless_uniform(column, seeds[3]) < settings.known_region_share
      level = deviation * tf.where(known, region, mean_region)
      # An inversion's images are clipped to the range of pixels.
      noised = tf.clip_by_value(clean + noise, 0, 1)
      with tf.GradientTape() as tape:
        outputs = self._network(tf.concat([noised, _scaled(level)], axis=-1), training=True)
        # Over the image, and once more over the region, which may be a small part of it.
        squares = tf.square(outputs - clean)
        loss = tf.reduce_mean(squares) + tf.reduce_sum(squares * region) / (
          channels * tf.reduce_sum(region) + 1.0
        )
      optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
      return loss

    rng = np.random.default_rng(settings.seed)
    size = min(settings.batch_size, len(both))
    for count in range(settings.steps):
      chosen = rng.choice(len(both), size, replace=False)
      loss = float(step(tf.constant(both[chosen]), tf.constant([settings.seed, count])))
      if not np.isfinite(loss):
        raise UserError(f'the denoiser diverged at step {count}; lower its learning rate')
      progress(count + 1, loss)


def _digest(both: np.ndarray, settings: DenoiserSettings) -> str:
  sha = hashlib.sha256(f'{attacks_digest()} {settings} {both.dtype} {both.shape}'.encode())
  sha.update(np.ascontiguousarray(both).tobytes())
  return sha.hexdigest()[:32]


def _scaled(level: tf.Tensor) -> tf.Tensor:
  """Deviations on a scale on which small ones differ too: 0 stays 0."""
  return tf.math.log1p(level / 0.05) / 2.0


def _network(image_shape: tuple[int, int, int], filters: int) -> tf.keras.Model:
  """A U-Net of three levels (Ronneberger et al. 2015) that outputs a change of the image."""
  height, width, channels = image_shape
  inputs = tf.keras.Input((height, width, channels + 1))
  x, skips = inputs, []
  for level in range(_LEVELS):
    if level:
      skips.append(x)
      x = tf.keras.layers.AveragePooling2D(2)(x)
    x = _block(x, filters * 2**level)
  for level in reversed(range(_LEVELS - 1)):
    x = tf.keras.layers.UpSampling2D(2, interpolation='bilinear')(x)
    x = _block(tf.keras.layers.Concatenate()([x, skips[level]]), filters * 2**level)
  change = tf.keras.layers.Conv2D(channels, 3, padding='same', kernel_initializer='zeros')(x)
  return tf.keras.Model(inputs, inputs[..., :channels] + change)


def _block(x: tf.Tensor, filters: int) -> tf.Tensor:
  for _ in range(2):
    x = tf.keras.layers.Conv2D(filters, 3, padding='same', activation='relu')(x)
  return x
