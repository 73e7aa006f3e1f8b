"""The derivative of a Keras client's one-step gradient with respect to its images."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tff_shadow.models import classification_loss, graph_function
from tff_shadow.shadow.sensitivity import gradient_and_derivatives


def gradient_jacobian(model: tf.keras.Model, images: tf.Tensor, labels: tf.Tensor) -> np.ndarray:
  """J of the gradient of the mean cross-entropy at the model's weights: [N, d].

  One column per pixel value, each a forward-over-backward derivative at about the cost of two
  gradients: about 10 s and 275 MB for `conv_small` at 32 px in grey, 40 s and 830 MB in colour (one
  busy core). Multiply by the
  learning rate for the update of one SGD step. For ReLU networks it is the derivative almost
  everywhere.

  Args:
    model: Functional, with the weights that the round starts from; left as it was.
    images: [B, H, W, C] in [0, 1]; d = B H W C in this order.
    labels: int32 [B].

  Returns:
    Array of the model's type, N the number of trainable weights in the order of
    `model.trainable_variables`.

  Raises:
    ValueError: If images and labels do not fit each other.
  """
  images, loss_fn, variables = _one_step(model, images, labels)
  num_pixels = int(tf.size(images))

  def column(pixel):
    direction = tf.reshape(tf.one_hot(pixel, num_pixels, dtype=images.dtype), images.shape)
    _, (derivative,) = gradient_and_derivatives(loss_fn, variables, images, [direction])
    return _flat(derivative)

  column = graph_function(column, model)
  num_weights = sum(variable.shape.num_elements() for variable in variables)
  jacobian = np.empty((num_weights, num_pixels), images.dtype.as_numpy_dtype, order='F')
  with _non_trainable_kept(model):
    for pixel in tf.range(num_pixels):
      jacobian[:, int(pixel)] = column(pixel)
  return jacobian


def image_gradients(model: tf.keras.Model, images: tf.Tensor, labels: tf.Tensor) -> np.ndarray:
  """The gradient of each image alone: [B, N].

  Args:
    model: As for `gradient_jacobian`.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].

  Raises:
    ValueError: If images and labels do not fit each other.
  """
  images, labels = _checked(model, images, labels)
  loss, variables = classification_loss(model), model.trainable_variables

  def of_one(image, label):
    gradient, _ = gradient_and_derivatives(
      lambda x: loss(label[None], model(x, training=True)), variables, image[None], []
    )
    return _flat(gradient)

  of_one = graph_function(of_one, model)
  with _non_trainable_kept(model):
    return np.stack(
      [of_one(image, label).numpy() for image, label in zip(images, labels, strict=True)]
    )


def gradient_information(
  model: tf.keras.Model, images: tf.Tensor, labels: tf.Tensor, variances: float | np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """The map v -> J^T Sigma^-1 J v of the gradient, without ever holding J: about four gradients.

  Args:
    model: As for `gradient_jacobian`.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    variances: Of the noise on the gradient: one for all weights, or [N].

  Returns:
    A function of float64 [d] to float64 [d].

  Raises:
    ValueError: If images and labels do not fit each other or a variance is not above 0.
  """
  images, loss_fn, variables = _one_step(model, images, labels)
  if not (np.isfinite(variances).all() and (np.asarray(variances) > 0).all()):
    raise ValueError('variances must be finite and above 0')
  precision = tf.constant(1.0 / np.asarray(variances, np.float64), images.dtype)

  def multiply(direction):
    _, (derivative,) = gradient_and_derivatives(loss_fn, variables, images, [direction])
    weighted = precision * _flat(derivative)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(images)
      gradient, _ = gradient_and_derivatives(loss_fn, variables, images, [])
      product = tf.reduce_sum(weighted * _flat(gradient))
    return tape.gradient(product, images)

  multiply = graph_function(multiply, model)

  def matvec(vector: np.ndarray) -> np.ndarray:
    direction = tf.reshape(tf.cast(vector, images.dtype), images.shape)
    with _non_trainable_kept(model):
      return multiply(direction).numpy().astype(np.float64).reshape(-1)

  return matvec


def _one_step(model, images, labels):
  images, labels = _checked(model, images, labels)
  loss = classification_loss(model)
  return images, lambda x: loss(labels, model(x, training=True)), model.trainable_variables


def _checked(model, images, labels):
  images = tf.cast(images, model.inputs[0].dtype)
  labels = tf.cast(labels, tf.int32)
  if images.shape.rank != 4 or labels.shape != images.shape[:1]:
    raise ValueError(
      f'images must be [B, H, W, C] and labels [B], found {images.shape} and {labels.shape}'
    )
  return images, labels


def _flat(tensors: list[tf.Tensor]) -> tf.Tensor:
  return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)


@contextlib.contextmanager
def _non_trainable_kept(model: tf.keras.Model) -> Iterator[None]:
  """BatchNorm moves its running statistics whenever it is called as in training."""
  before = [variable.numpy() for variable in model.non_trainable_variables]
  try:
    yield
  finally:
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
      variable.assign(value)
