"""What of the sensitive region an update carries: directions J(m v) and the diagonal of J M² Jᵀ.

J is the derivative of a client's update with respect to its images, m the region map, v noise of
unit variance with a key per image. J(m v) is a sample of how the update moves when the region does.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import tensorflow as tf

Distribution = Literal['normal', 'rademacher']


def region_noise(
  maps: tf.Tensor,
  keys: tf.Tensor,
  channels: int,
  distribution: Distribution,
  draw: int | tf.Tensor = 0,
  draws: int = 1,
) -> tf.Tensor:
  """Draws m v: noise of unit variance in the region, zero outside.

  Args:
    maps: float32 [B, H, W, 1] in [0, 1].
    keys: int32 [B, 2]; the same key gives the same noise.
    channels: C of the images.
    distribution: Of v: standard normal, or Rademacher (+1 or -1, which gives the diagonal with the
      least variance; Hutchinson 1990).
    draw: Number of the draw, for several independent ones with the same keys.
    draws: How many there are.

  Returns:
    float32 [B, H, W, C].
  """
  shape = tf.concat([tf.shape(maps)[1:3], [channels]], axis=0)

  def one(key):
    # stateless_fold_in would keep 32 of the key's 64 bits, few enough to try them all.
    key = tf.random.experimental.stateless_split(key, draws)[draw]
    if distribution == 'normal':
      return tf.random.stateless_normal(shape, key)
    bits = tf.random.stateless_uniform(shape, key, 0, 2, tf.int32)
    return tf.cast(2 * bits - 1, tf.float32)

  noise = tf.map_fn(one, keys, fn_output_signature=tf.float32)
  return maps * tf.ensure_shape(noise, [None, *maps.shape[1:3], channels])


def gradient_and_derivatives(
  loss_fn: Callable[[tf.Tensor], tf.Tensor],
  variables: Sequence[tf.Variable],
  images: tf.Tensor,
  directions: Sequence[tf.Tensor],
) -> tuple[list[tf.Tensor], list[list[tf.Tensor]]]:
  """The gradient of a loss and how it moves along each direction in image space.

  Forward over backward: a JVP of the gradient, exact, at about the cost of another gradient.

  Args:
    loss_fn: Images [B, H, W, C] -> scalar.
    variables: What the gradient is with respect to.
    images: [B, H, W, C].
    directions: Each [B, H, W, C].

  Returns:
    The gradient, one tensor per variable, and one such list per direction.
  """

  def gradient():
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(variables)
      with _functions_inlined() if directions else contextlib.nullcontext():
        loss = loss_fn(images)
    return tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)

  if not directions:
    return gradient(), []
  derivatives = []
  for direction in directions:
    with tf.autodiff.ForwardAccumulator(images, direction) as accumulator:
      value = gradient()
      derivatives.append(accumulator.jvp(value, unconnected_gradients=tf.UnconnectedGradients.ZERO))
  return value, derivatives


@contextlib.contextmanager
def _functions_inlined() -> Iterator[None]:
  """Calls of a tf.function run its Python instead.

  A ForwardAccumulator loses, without an error, what passes through a fused BatchNorm inside of a
  nested tf.function (TF 2.14), and the forward pass of a TFF model is one.
  """
  before = tf.config.functions_run_eagerly()
  tf.config.run_functions_eagerly(True)
  try:
    yield
  finally:
    tf.config.run_functions_eagerly(before)
