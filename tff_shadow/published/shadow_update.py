"""Steps 2 and 3 of the published defence: the client's own gradient, and a shadow that seeks it.

The gradient of the shadow's images is really differentiated, to second order; where the weights
never see it, as in the authors' attacks, matching it would do nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tff_shadow.models import (
  Statistics,
  collect_statistics,
  training_batch_norm_layers,
)
from tff_shadow.published.settings import PublishedSettings

# Keeps the norm differentiable at 0; torch's has a gradient of 0 there.
_TINY = 1e-20


class Target(NamedTuple):
  """What the pseudo step shows.

  Attributes:
    gradient: Of the mean cross-entropy on the clean batch, one tensor per trainable variable.
    statistics: (mean, variance) of the batch for each BatchNorm layer that trains.
  """

  gradient: list[tf.Tensor]
  statistics: Statistics


def recovered_statistic(old: tf.Tensor, new: tf.Tensor, momentum: float) -> tf.Tensor:
  """A batch's statistic from the running one before and after its step.

  Keras moves a running statistic to momentum * old + (1 - momentum) * batch, so the batch's is
  (new - momentum * old) / (1 - momentum); the paper's mu, 0.1, is 1 - momentum.
  """
  return (new - momentum * old) / (1.0 - momentum)


def pseudo_step(
  model: tf.keras.Model, images: tf.Tensor, labels: tf.Tensor, loss_fn: Any
) -> Target:
  """Step 2: gradient and batch statistics of one step that is then undone.

  Only the running statistics of BatchNorm move in a step before its gradient is applied, so they
  alone are put back.

  Args:
    model: At the client's current local weights.
    images: float32 [B, H, W, C] as the model takes them.
    labels: int32 [B].
    loss_fn: Of `tff_shadow.models.classification_loss`.

  Returns:
    A `Target`.
  """
  before = [tf.identity(variable) for variable in model.non_trainable_variables]
  with tf.GradientTape() as tape:
    loss = loss_fn(labels, model(images, training=True))
  gradient = tape.gradient(
    loss, model.trainable_variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
  )
  old = {id(v): value for v, value in zip(model.non_trainable_variables, before, strict=True)}
  statistics = []
  for layer in training_batch_norm_layers(model):
    statistics.append(
      tuple(
        recovered_statistic(old[id(variable)], tf.identity(variable), layer.momentum)
        for variable in (layer.moving_mean, layer.moving_variance)
      )
    )
  for variable, value in zip(model.non_trainable_variables, before, strict=True):
    variable.assign(value)
  return Target(gradient, statistics)


def total_variation(images: tf.Tensor) -> tf.Tensor:
  """The four norms, over the batch, of the differences right, down and along both diagonals."""
  differences = (
    images[:, :, :-1] - images[:, :, 1:],
    images[:, :-1] - images[:, 1:],
    images[:, 1:, :-1] - images[:, :-1, 1:],
    images[:, :-1, :-1] - images[:, 1:, 1:],
  )
  return tf.add_n([_norm(difference) for difference in differences])


def gradient_distance(first: Sequence[tf.Tensor], second: Sequence[tf.Tensor]) -> tf.Tensor:
  """Sum over the variables of the norm of the difference."""
  return tf.add_n([_norm(a - b) for a, b in zip(first, second, strict=True)])


def statistics_distance(first: Statistics, second: Statistics) -> tf.Tensor:
  """Sum over the layers of the norms of the differences of means and of variances."""
  total = tf.zeros(())
  for (mean, variance), (other_mean, other_variance) in zip(first, second, strict=True):
    total += _norm(mean - other_mean) + _norm(variance - other_variance)
  return total


def shadow_loss(
  reconstructions: tf.Tensor,
  images: tf.Tensor,
  gradient: Sequence[tf.Tensor],
  statistics: Statistics,
  target: Target,
  settings: PublishedSettings,
) -> tf.Tensor:
  """Step 3's loss.

  Args:
    reconstructions: float32 [B, H, W, C], of the shadow, standardised.
    images: float32 [B, H, W, C], standardised.
    gradient: Of the reconstructions at the global weights.
    statistics: Of the reconstructions there.
    target: Of the pseudo step.
    settings: Gives the weights.

  Returns:
    A scalar.
  """
  height, width = images.shape[1:3]
  return (
    settings.gradient_weight * gradient_distance(gradient, target.gradient)
    + settings.batch_norm_weight * statistics_distance(statistics, target.statistics)
    + settings.total_variation_weight * total_variation(reconstructions)
    + settings.norm_weight * _norm(reconstructions) / float(height * width) ** 2
    + settings.reconstruction_weight
    * tf.reduce_mean(tf.math.squared_difference(reconstructions, images))
  )


def gradient_of_images(
  model: tf.keras.Model, images: tf.Tensor, labels: tf.Tensor, loss_fn: Any
) -> tuple[list[tf.Tensor], Statistics]:
  """Gradient of the global model in inference mode, and what its BatchNorm layers see.

  Args:
    model: With the global weights.
    images: float32 [B, H, W, C] as the model takes them; both results are differentiable in them.
    labels: int32 [B].
    loss_fn: Of `tff_shadow.models.classification_loss`.
  """
  with collect_statistics(model) as statistics, tf.GradientTape() as tape:
    loss = loss_fn(labels, model(images, training=False))
  gradient = tape.gradient(
    loss, model.trainable_variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
  )
  return gradient, statistics


def averaged_weights(
  updated: Sequence[np.ndarray], before: Sequence[np.ndarray], share: float
) -> list[np.ndarray]:
  """The end of step 3: share * updated + (1 - share) * before, for each array."""
  return [share * new + (1.0 - share) * old for new, old in zip(updated, before, strict=True)]


def _norm(tensor: tf.Tensor) -> tf.Tensor:
  return tf.sqrt(tf.reduce_sum(tf.square(tensor)) + _TINY)
