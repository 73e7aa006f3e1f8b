"""A rectifier whose derivative lets an optimiser see that a unit is about to switch.

The gradient of a ReLU network jumps wherever a unit switches, so the matching loss is a landscape
of plateaus and its exact gradient says nothing of the jumps: descent stalls at the first wall. Here
the loss stays what it is, and only the derivative of the unit's on/off mask, which is zero almost
everywhere, is replaced by that of a sigmoid (a surrogate gradient, as for spiking networks; Neftci
et al. 2019).
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class ExactRectifier:
  """The derivative as it is."""

  name: str = dataclasses.field(default='exact', init=False)


@dataclasses.dataclass(frozen=True)
class SurrogateRectifier:
  """The mask's derivative is that of sigmoid(sharpness z / std(z)).

  The sharpness grows geometrically over the iterations, from far sight to precision.

  Attributes:
    start: Sharpness at the first iteration.
    end: Sharpness after the last.
  """

  start: float = 3.0
  end: float = 30.0
  name: str = dataclasses.field(default='surrogate', init=False)

  def sharpness(self, iteration: tf.Tensor, iterations: int, dtype: tf.DType) -> tf.Tensor:
    """The sharpness at `iteration` (int, from 0) of `iterations`."""
    progress = tf.cast(iteration, dtype) / iterations
    return self.start * tf.cast(self.end / self.start, dtype) ** progress


Rectifier = ExactRectifier | SurrogateRectifier
RECTIFIERS: dict[str, type[Rectifier]] = {
  'exact': ExactRectifier,
  'surrogate': SurrogateRectifier,
}


def surrogate_relu(z: tf.Tensor, sharpness: tf.Tensor) -> tf.Tensor:
  """max(z, 0) with its exact first derivative and a smooth stand-in for the second.

  Args:
    z: Any shape.
    sharpness: A scalar; the larger, the closer to the exact derivative of the mask.

  Returns:
    The same values as `tf.nn.relu(z)`.
  """

  @tf.custom_gradient
  def mask(z):
    def backward(upstream):
      slope = sharpness / (tf.math.reduce_std(z) + 1e-6)
      sigmoid = tf.sigmoid(slope * z)
      return upstream * slope * sigmoid * (1 - sigmoid)

    return tf.cast(z > 0, z.dtype), backward

  @tf.custom_gradient
  def relu(z):
    def backward(upstream):
      return upstream * mask(z)

    return tf.nn.relu(z), backward

  return relu(z)


def replace_relus(model: tf.keras.Model, relu: Callable[[tf.Tensor], tf.Tensor]) -> int:
  """Makes every plain rectifier of `model` call `relu`; returns how many there were."""
  count = 0
  for layer in model._flatten_layers():
    if getattr(layer, 'activation', None) is tf.keras.activations.relu:
      layer.activation = relu
      count += 1
    elif (
      isinstance(layer, tf.keras.layers.ReLU)
      and layer.max_value is None
      and not layer.negative_slope
      and not layer.threshold
    ):
      layer.call = relu
      count += 1
  return count
