"""Gradients of single examples, clipped, as the local step of a client."""

import tensorflow as tf
import tensorflow_federated as tff
from tensorflow_privacy.privacy.optimizers import clip_and_aggregate_gradients

from tff_shadow.learning.client_work import BuildGradientFn, GradientFn
from tff_shadow.models import classification_loss
from tff_shadow.models.batch_norm import training_batch_norm_layers


def build_clipped_gradient_fn(model: tf.keras.Model, clip_norm: float) -> BuildGradientFn:
  """Builds the mean of the gradients of examples, each clipped to `clip_norm` over all variables.

  By tensorflow-privacy's `clip_and_aggregate_gradients`. Only the loss of the examples counts;
  regularisation losses of the model are left out. An example whose gradient is not finite makes the
  mean not finite.

  Args:
    model: The task model; its architecture counts, not its weights.
    clip_norm: Above 0.

  Raises:
    ValueError: If the model has BatchNorm layers that train: the loss of an example then depends on
      the others, and clipping bounds no example's influence.
  """
  layers = training_batch_norm_layers(model)
  if layers:
    raise ValueError(
      f'BatchNorm layer {layers[0].name!r} mixes the examples of a batch, so their gradients cannot'
      ' be clipped one by one; use --norm=group or none, or --batch_norm_sharing=frozen'
    )
  loss = classification_loss(model)

  def build_gradient_fn(local_model: tff.learning.models.VariableModel) -> GradientFn:
    def gradient_fn(batch):
      with tf.GradientTape(persistent=True) as tape:
        output = local_model.forward_pass(batch, training=True)
        losses = loss.call(batch['y'], output.predictions)
      clipped = clip_and_aggregate_gradients.clip_and_aggregate_gradients(
        tape,
        losses,
        list(local_model.trainable_variables),
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
        l2_norm_clip=clip_norm,
        aggregate_method='sum',
      )
      num_examples = tf.cast(output.num_examples, tf.float32)
      return output.num_examples, [gradient / num_examples for gradient in clipped]

    return gradient_fn

  return build_gradient_fn
