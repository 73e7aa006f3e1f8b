"""What the optimiser moves: pixels, or coefficients that the pixels are made of.

A parametrization is called with the images of all lanes, [R, B, H, W, C], and gives a nest of
tensors with R as their first axis, from which it makes the images again. Those that draw a network
instead of images are in `attacks.generators`.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import scipy.fft
import tensorflow as tf


class AllActive:
  """Every parameter moves in every iteration; what a parametrization inherits that says no more."""

  def active(self, parameters: Any, iteration: tf.Tensor, iterations: int) -> Any:
    """Which parameters move in an iteration.

    A solver multiplies gradients and steps by these.

    Args:
      parameters: The nest that `parameters` gave.
      iteration: From 0, int32.
      iterations: Of the whole attack.

    Returns:
      A nest of the same structure, shapes and types: 1 where a parameter moves, else 0.
    """
    return tf.nest.map_structure(tf.ones_like, parameters)


@dataclasses.dataclass(frozen=True)
class PixelParametrization(AllActive):
  """The pixels themselves."""

  # Whether `parameters` inverts `images`, so that images can be projected after a step.
  invertible: ClassVar[bool] = True
  name: str = dataclasses.field(default='pixels', init=False)

  def images(self, parameters: tf.Tensor) -> tf.Tensor:
    """Parameters [..., H, W, C] -> images of the same shape."""
    return parameters

  def parameters(self, images: tf.Tensor, seeds: tf.Tensor | None = None) -> tf.Tensor:
    """The inverse of `images`; seeds are not used."""
    return images


@dataclasses.dataclass(frozen=True)
class SpectralParametrization(AllActive):
  """Coefficients of the cosine transform (DCT-II) over the image, damped with frequency.

  A coefficient c of frequency (u, v), in half periods per image, enters the image as
  c / (1 + |(u, v)|)^exponent. Adam's equal steps then follow the spectrum of natural images, whose
  amplitude falls as 1/f (Field 1987): coarse structure is found first.

  With `start_bandwidth` below 1 the search also goes from coarse to fine: at first only the
  frequencies u < b H and v < b W move, b the start bandwidth, which are those of an image b times
  as large; b grows by equal factors until all move. The others keep their start values, but where
  a solver projects onto the box, they follow the clipped images.

  Attributes:
    exponent: Of the damping; 0 for none.
    start_bandwidth: b at the first iteration, in (0, 1]; 1 for all frequencies from the start.
    full_bandwidth_at: The share of the iterations, in [0, 1], after which all frequencies move.
  """

  exponent: float = 1.0
  start_bandwidth: float = 1.0
  full_bandwidth_at: float = 0.5
  invertible: ClassVar[bool] = True
  name: str = dataclasses.field(default='spectral', init=False)

  def __post_init__(self):
    """Raises `ValueError` for shares that are none."""
    if not 0 < self.start_bandwidth <= 1:
      raise ValueError(f'start_bandwidth must be in (0, 1], found {self.start_bandwidth}')
    if not 0 <= self.full_bandwidth_at <= 1:
      raise ValueError(f'full_bandwidth_at must be in [0, 1], found {self.full_bandwidth_at}')

  def images(self, parameters: tf.Tensor) -> tf.Tensor:
    """Coefficients [..., H, W, C] -> images of the same shape."""
    rows, columns, damping = self._constants(parameters)
    return tf.einsum('ki,...klc,lj->...ijc', rows, parameters * damping, columns)

  def parameters(self, images: tf.Tensor, seeds: tf.Tensor | None = None) -> tf.Tensor:
    """The inverse of `images`; seeds are not used."""
    rows, columns, damping = self._constants(images)
    return tf.einsum('ki,...ijc,lj->...klc', rows, images, columns) / damping

  def active(self, parameters: tf.Tensor, iteration: tf.Tensor, iterations: int) -> tf.Tensor:
    """Mask of the coefficients that move, in the shape of `parameters`; see the class."""
    if self.start_bandwidth == 1 or self.full_bandwidth_at == 0:
      return super().active(parameters, iteration, iterations)
    height, width = parameters.shape[-3:-1]
    progress = tf.cast(iteration, tf.float32) / (self.full_bandwidth_at * iterations)
    # An exponent, so that each octave gets the same number of iterations.
    bandwidth = tf.cast(self.start_bandwidth, tf.float32) ** tf.maximum(1 - progress, 0.0)
    relative = np.maximum(np.arange(height)[:, None] / height, np.arange(width)[None, :] / width)
    mask = tf.cast(relative.astype(np.float32)[:, :, None] < bandwidth, parameters.dtype)
    return tf.broadcast_to(mask, tf.shape(parameters))

  def _constants(self, like: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    height, width = like.shape[-3:-1]
    frequency = np.hypot(np.arange(height)[:, None], np.arange(width)[None, :])
    damping = (1 + frequency)[:, :, None] ** -self.exponent
    return tuple(
      tf.constant(array, like.dtype) for array in (_dct_matrix(height), _dct_matrix(width), damping)
    )


Parametrization = PixelParametrization | SpectralParametrization
PARAMETRIZATIONS: dict[str, type[Parametrization]] = {
  'pixels': PixelParametrization,
  'spectral': SpectralParametrization,
}


def _dct_matrix(size: int) -> np.ndarray:
  """The orthonormal DCT-II as [frequency, position]."""
  return scipy.fft.dct(np.eye(size), axis=0, norm='ortho')
