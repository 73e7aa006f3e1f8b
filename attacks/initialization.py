"""Where an attack starts."""

import dataclasses

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class MeanImageStart:
  """The public mean image, plus a little noise so that restarts and images of a batch differ.

  Attributes:
    noise: Standard deviation of the noise, in image units.
  """

  noise: float = 0.02
  name: str = dataclasses.field(default='mean_image', init=False)

  def __call__(self, mean_image: np.ndarray, num_images: int, seed: tuple[int, int]) -> np.ndarray:
    """Start images float32 [num_images, H, W, C] in [0, 1]; the same for the same seed."""
    noise = _normal((num_images, *mean_image.shape), seed)
    return _clip(mean_image[None] + self.noise * noise)


@dataclasses.dataclass(frozen=True)
class UniformStart:
  """Every pixel uniform in [0, 1]."""

  name: str = dataclasses.field(default='uniform', init=False)

  def __call__(self, mean_image: np.ndarray, num_images: int, seed: tuple[int, int]) -> np.ndarray:
    """Start images float32 [num_images, H, W, C] in [0, 1]; the same for the same seed."""
    shape = (num_images, *mean_image.shape)
    return tf.random.stateless_uniform(shape, seed, alg='philox').numpy()


@dataclasses.dataclass(frozen=True)
class NormalStart:
  """Every pixel normal around mid grey, clipped to [0, 1].

  Attributes:
    noise: Standard deviation, in image units.
  """

  noise: float = 0.1
  name: str = dataclasses.field(default='normal', init=False)

  def __call__(self, mean_image: np.ndarray, num_images: int, seed: tuple[int, int]) -> np.ndarray:
    """Start images float32 [num_images, H, W, C] in [0, 1]; the same for the same seed."""
    return _clip(0.5 + self.noise * _normal((num_images, *mean_image.shape), seed))


Start = MeanImageStart | UniformStart | NormalStart
STARTS: dict[str, type[Start]] = {
  'mean_image': MeanImageStart,
  'uniform': UniformStart,
  'normal': NormalStart,
}


def _normal(shape: tuple[int, ...], seed: tuple[int, int]) -> np.ndarray:
  return tf.random.stateless_normal(shape, seed, alg='philox').numpy()


def _clip(images: np.ndarray) -> np.ndarray:
  return np.clip(images, 0, 1).astype(np.float32)
