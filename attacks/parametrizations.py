"""What the optimiser moves: pixels, or coefficients that the pixels are made of."""

import dataclasses

import numpy as np
import scipy.fft
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class PixelParametrization:
  """The pixels themselves."""

  name: str = dataclasses.field(default='pixels', init=False)

  def images(self, parameters: tf.Tensor) -> tf.Tensor:
    """Parameters [B, H, W, C] -> images of the same shape."""
    return parameters

  def parameters(self, images: tf.Tensor) -> tf.Tensor:
    """The inverse of `images`."""
    return images


@dataclasses.dataclass(frozen=True)
class SpectralParametrization:
  """Coefficients of the cosine transform (DCT-II) over the image, damped with frequency.

  A coefficient c of frequency (u, v), in half periods per image, enters the image as
  c / (1 + |(u, v)|)^exponent. Adam's equal steps then follow the spectrum of natural images, whose
  amplitude falls as 1/f (Field 1987): coarse structure is found first.

  Attributes:
    exponent: Of the damping; 0 for none.
  """

  exponent: float = 1.0
  name: str = dataclasses.field(default='spectral', init=False)

  def images(self, parameters: tf.Tensor) -> tf.Tensor:
    """Coefficients [B, H, W, C] -> images of the same shape."""
    rows, columns, damping = self._constants(parameters)
    return tf.einsum('ki,bklc,lj->bijc', rows, parameters * damping, columns)

  def parameters(self, images: tf.Tensor) -> tf.Tensor:
    """The inverse of `images`."""
    rows, columns, damping = self._constants(images)
    return tf.einsum('ki,bijc,lj->bklc', rows, images, columns) / damping

  def _constants(self, like: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    height, width = like.shape[1:3]
    frequency = np.hypot(np.arange(height)[:, None], np.arange(width)[None, :])
    damping = (1 + frequency)[None, :, :, None] ** -self.exponent
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
