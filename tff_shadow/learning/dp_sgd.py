"""Example-level differentially private SGD as the local step of a client."""

import tensorflow as tf
import tensorflow_federated as tff
from tensorflow_privacy.privacy.optimizers import clip_and_aggregate_gradients

from tff_shadow.aggregators.entropy import draw_key
from tff_shadow.aggregators.shadow_noise import stateless_normal_like
from tff_shadow.learning.client_work import BuildGradientFn, GradientFn
from tff_shadow.models import classification_loss
from tff_shadow.models.batch_norm import training_batch_norm_layers


def build_dp_sgd_gradient_fn(
  model: tf.keras.Model, clip_norm: float, noise_multiplier: float
) -> BuildGradientFn:
  """Builds the gradients of DP-SGD (Abadi et al. 2016, algorithm 1).

  The gradient of each example is clipped to `clip_norm` over all variables together, and N(0,
  (noise_multiplier clip_norm)^2 I) is added to the sum over the batch, which is then divided by the
  number of its examples. Clipping is tensorflow-privacy's `clip_and_aggregate_gradients`; the noise
  is fresh in each step of each client, from the entropy of its machine (`draw_key`), and cannot be
  reproduced. That of the library's queries would come from TensorFlow's generator, of which the
  server could try all seeds, and its optimisers are Keras ones, which TFF does not take.

  Only the loss of the examples counts; regularisation losses of the model are left out. An example
  whose gradient is not finite makes the client's update not finite, and it is dropped. What may be
  stated of it: `tff_shadow.privacy.dp_sgd_guarantee`.

  Args:
    model: The task model; its architecture counts, not its weights.
    clip_norm: Above 0.
    noise_multiplier: Not negative.

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
      normal = stateless_normal_like(clipped, draw_key(), draw=0)
      deviation = clip_norm * noise_multiplier
      num_examples = tf.cast(output.num_examples, tf.float32)
      return output.num_examples, [
        (gradient + deviation * n) / num_examples
        for gradient, n in zip(clipped, normal, strict=True)
      ]

    return gradient_fn

  return build_gradient_fn
