"""Example-level differentially private SGD as the local step of a client."""

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators.entropy import draw_key
from tff_shadow.aggregators.shadow_noise import stateless_normal_like
from tff_shadow.learning.client_work import BuildGradientFn, GradientFn
from tff_shadow.learning.clipping import build_clipped_gradient_fn


def build_dp_sgd_gradient_fn(
  model: tf.keras.Model, clip_norm: float, noise_multiplier: float
) -> BuildGradientFn:
  """Builds the gradients of DP-SGD (Abadi et al. 2016, algorithm 1).

  The gradient of each example is clipped to `clip_norm` over all variables together
  (`build_clipped_gradient_fn`), and N(0, (noise_multiplier clip_norm)^2 I) is added to the sum over
  the batch, which is then divided by the number of its examples. The noise is fresh in each step of
  each client, from the entropy of its machine (`draw_key`), and cannot be reproduced. That of
  tensorflow-privacy's queries would come from TensorFlow's generator, of which the server could try
  all seeds, and its optimisers are Keras ones, which TFF does not take.

  An example whose gradient is not finite makes the client's update not finite, and it is dropped.
  What may be stated of it: `tff_shadow.privacy.dp_sgd_guarantee`.

  Args:
    model: The task model; its architecture counts, not its weights.
    clip_norm: Above 0.
    noise_multiplier: Not negative.

  Raises:
    ValueError: See `build_clipped_gradient_fn`.
  """
  build_clipped = build_clipped_gradient_fn(model, clip_norm)

  def build_gradient_fn(local_model: tff.learning.models.VariableModel) -> GradientFn:
    clipped_fn = build_clipped(local_model)

    def gradient_fn(batch):
      num_examples, clipped = clipped_fn(batch)
      normal = stateless_normal_like(clipped, draw_key(), draw=0)
      deviation = clip_norm * noise_multiplier / tf.cast(num_examples, tf.float32)
      return num_examples, [
        gradient + deviation * n for gradient, n in zip(clipped, normal, strict=True)
      ]

    return gradient_fn

  return build_gradient_fn
