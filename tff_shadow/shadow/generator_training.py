"""Trains a generator as the decoder of a variational autoencoder (Kingma and Welling 2014).

The encoder is thrown away. The defence needs reconstructions of images that the generator has never
seen, from a search of latents; a likelihood of the images is a bound on just that error, which a
discriminator's opinion of samples is not. And the latents it is trained for are those of N(0, 1)
from which the search starts.
"""

import dataclasses
import math
import pathlib

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.shadow.augmentation import augment, check_augmentations
from tff_shadow.shadow.equalised_layers import EqualisedLayers
from tff_shadow.shadow.generator import build_generator, count_doublings

_KEPT_CHECKPOINTS = 2
# Beyond these a variance says no more, and its exponential overflows.
_LOG_VARIANCES = (-12.0, 4.0)
_LAST_RATE = 0.02


@dataclasses.dataclass(frozen=True)
class GeneratorSettings:
  """How a generator is built and trained.

  Attributes:
    latent_size: Numbers in a latent.
    channels: Of the generator's finest level.
    steps: Of Adam, in all.
    batch_size: Images a step.
    learning_rate: Of Adam; falls along half a cosine to 2 % of it.
    kl_weight: Of the divergence in nats over the number of pixel values, beside the mean squared
      error: twice the variance of the pixel noise that the autoencoder assumes.
    augmentations: Of `augmentation.AUGMENTATIONS`.
    seed: Decides weights, batches and noise.
  """

  latent_size: int = 128
  channels: int = 16
  steps: int = 2500
  batch_size: int = 16
  learning_rate: float = 1e-2
  kl_weight: float = 0.001
  augmentations: tuple[str, ...] = ()
  seed: int = 0

  def __post_init__(self):
    """Raises `UserError` for a setting out of range; the flags have the same names."""
    for name in ('latent_size', 'channels', 'steps', 'batch_size'):
      if getattr(self, name) < 1:
        raise UserError(f'--{name}={getattr(self, name)}: must be at least 1')
    if not 0 < self.learning_rate < math.inf:
      raise UserError(f'--learning_rate={self.learning_rate}: must be a positive number')
    if not 0 <= self.kl_weight < math.inf:
      raise UserError(f'--kl_weight={self.kl_weight}: must be at least 0')
    check_augmentations(self.augmentations)


class GeneratorTraining:
  """A generator in training, with its checkpoints.

  Everything a step does follows from the settings, its number and the state that is saved, so that
  a resumed training ends as an uninterrupted one: on a CPU with the same bits.

  Attributes:
    generator: Latents [B, latent_size] -> images [B, H, W, C] in [0, 1].
    step: Steps done.
  """

  def __init__(self, images: np.ndarray, settings: GeneratorSettings, directory: pathlib.Path):
    """Builds the networks.

    Args:
      images: uint8 [N, H, W, C] to train on.
      settings: How.
      directory: Of the checkpoints.

    Raises:
      UserError: If there is no generator for these images.
    """
    self._images = images
    self._settings = settings
    shape = images.shape[1:]
    self.generator = build_generator(
      shape,
      latent_size=settings.latent_size,
      channels=settings.channels,
      seed=settings.seed,
    )
    self._encoder = _build_encoder(shape, settings)
    self._variables = self.generator.trainable_variables + self._encoder.trainable_variables
    rate = tf.keras.optimizers.schedules.CosineDecay(
      settings.learning_rate, settings.steps, alpha=_LAST_RATE
    )
    self._optimizer = tf.keras.optimizers.Adam(rate, clipnorm=1.0, jit_compile=False)
    self._optimizer.build(self._variables)
    self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
    checkpoint = tf.train.Checkpoint(
      generator=self.generator,
      encoder=self._encoder,
      optimizer=self._optimizer,
      step=self._step,
    )
    self._manager = tf.train.CheckpointManager(
      checkpoint, str(directory), max_to_keep=_KEPT_CHECKPOINTS
    )
    self._graph = tf.function(self._train_step, autograph=False)

  @property
  def step(self) -> int:
    """Steps done."""
    return int(self._step)

  def restore(self) -> None:
    """Goes on from the newest checkpoint.

    Raises:
      UserError: If there is none, or it cannot be read.
    """
    newest = self._manager.latest_checkpoint
    if newest is None:
      raise UserError(f'{self._manager.directory}: no checkpoint to resume from; start a new run')
    try:
      self._manager.checkpoint.restore(newest).assert_consumed()
    except Exception as error:  # TensorFlow raises whatever the damaged part raises.
      first_line = (str(error).splitlines() or [''])[0]
      raise UserError(
        f'{newest}: damaged, or of other settings ({type(error).__name__}: {first_line})'
      ) from error

  def save(self) -> None:
    """Writes a checkpoint; the newest two are kept."""
    self._manager.save(checkpoint_number=self.step)

  def train(self) -> dict[str, float]:
    """One step.

    Returns:
      'loss', 'mse' (of the batch, over pixels and channels) and 'kl' (nats an image), before it.

    Raises:
      UserError: If the loss is not finite.
    """
    chosen = _batch(self.step, len(self._images), self._settings)
    figures = self._graph(tf.constant(self._images[chosen]))
    figures = {name: float(value) for name, value in figures.items()}
    if not math.isfinite(figures['loss']):
      raise UserError(
        f'training: the loss of step {self.step} is not finite; try a smaller --learning_rate'
      )
    return figures

  def reconstruct(self, images: np.ndarray) -> np.ndarray:
    """What the autoencoder makes of images [N, H, W, C] in [0, 1], at the mean latent."""
    means, _ = tf.split(self._encoder(images, training=False), 2, axis=1)
    return self.generator(means, training=False).numpy()

  def _train_step(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
    settings = self._settings
    seeds = tf.random.experimental.stateless_split(
      tf.stack([tf.constant(settings.seed, tf.int64), self._step.read_value()]), 2
    )
    images = augment(tf.cast(pixels, tf.float32) / 255, settings.augmentations, seeds[0])
    with tf.GradientTape() as tape:
      means, log_variances = tf.split(self._encoder(images, training=True), 2, axis=1)
      log_variances = tf.clip_by_value(log_variances, *_LOG_VARIANCES)
      noise = tf.random.stateless_normal(means.shape, seeds[1])
      drawn = self.generator(means + tf.exp(log_variances / 2) * noise, training=True)
      mse = tf.reduce_mean(tf.square(drawn - images))
      spread = tf.square(means) + tf.exp(log_variances) - log_variances - 1
      kl = tf.reduce_mean(tf.reduce_sum(spread, axis=1)) / 2
      loss = mse + settings.kl_weight * kl / math.prod(images.shape[1:])
    gradients = tape.gradient(loss, self._variables)
    self._optimizer.apply_gradients(zip(gradients, self._variables, strict=True))
    # Here, so that no signal comes between the weights and their number.
    self._step.assign_add(1)
    return {'loss': loss, 'mse': mse, 'kl': kl}


def _batch(step: int, count: int, settings: GeneratorSettings) -> np.ndarray:
  """Indices of the images of a step: permutations of all, one after another."""
  positions = step * settings.batch_size + np.arange(settings.batch_size)
  orders = {
    epoch: np.random.default_rng([settings.seed, epoch]).permutation(count)
    for epoch in np.unique(positions // count)
  }
  return np.array([orders[position // count][position % count] for position in positions])


def _build_encoder(shape: tuple[int, int, int], settings: GeneratorSettings) -> tf.keras.Model:
  """Images -> mean and logarithm of the variance of the latent, [B, 2 latent_size]."""
  layers = EqualisedLayers(settings.seed + 1)
  images = tf.keras.Input(shape, name='image')
  x = tf.keras.layers.Rescaling(4.0, -2.0, name='standardise')(images)
  for level in range(count_doublings(shape)):
    x = layers.convolution(
      x, settings.channels * min(4, 2 << level), f'encoder{level}', size=4, stride=2
    )
  x = layers.dense(
    tf.keras.layers.Flatten(name='flatten')(x), 2 * settings.latent_size, 'posterior'
  )
  return tf.keras.Model(images, x, name='encoder')
