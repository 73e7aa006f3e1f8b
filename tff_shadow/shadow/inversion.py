"""How well a generator reconstructs images by a search of its latents, and a few of its weights."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tff_shadow.shadow.generator import synthesis_variables
from tff_shadow.shadow.latents import LatentFit, fit_latents

# Published: 5 Adam steps of this rate for batches of 4.
_WEIGHT_STEPS, _WEIGHT_RATE, _WEIGHT_BATCH = 5, 1e-3, 4


class Inversion(NamedTuple):
  """Mean squared errors of images [N], and the images of the last.

  Attributes:
    latent_mse: float32 [N], after the search of the latents.
    weights_mse: float32 [N], after the steps of the synthesis weights, latents standing still.
    images: float32 [N, H, W, C], of these weights.
  """

  latent_mse: np.ndarray
  weights_mse: np.ndarray
  images: np.ndarray


def invert(
  generator: tf.keras.Model, images: np.ndarray, settings: LatentFit, *, seed: int
) -> Inversion:
  """Fits latents, then for every four images 5 Adam steps of the synthesis weights, on plain MSE.

  The weights start anew for every four images, and are at the end what they were.

  Args:
    generator: Latents -> images in [0, 1].
    images: float32 [N, H, W, C] in [0, 1].
    settings: Of the latents.
    seed: Decides the start latents.

  Returns:
    Errors and images.

  Raises:
    UserError: As `fit_latents`.
  """
  fitted = fit_latents(generator, images, settings, seed=seed)
  variables = synthesis_variables(generator)
  before = [variable.numpy() for variable in variables]
  drawn = []
  try:
    for begin in range(0, len(images), _WEIGHT_BATCH):
      for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
      chosen = slice(begin, begin + _WEIGHT_BATCH)
      drawn.append(_moved(generator, variables, fitted.latents[chosen], images[chosen]))
  finally:
    for variable, value in zip(variables, before, strict=True):
      variable.assign(value)
  drawn = np.concatenate(drawn)
  return Inversion(fitted.mse, np.mean((drawn - images) ** 2, axis=(1, 2, 3)), drawn)


def _moved(
  generator: tf.keras.Model, variables: list[tf.Variable], latents: np.ndarray, images: np.ndarray
) -> np.ndarray:
  optimizer = tf.keras.optimizers.Adam(_WEIGHT_RATE, jit_compile=False)
  for _ in range(_WEIGHT_STEPS):
    with tf.GradientTape() as tape:
      loss = tf.reduce_mean(tf.square(generator(latents, training=False) - images))
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
  return generator(latents, training=False).numpy()
