"""Soteria: pruned gradients of the last layer, as the local step of a client."""

import tensorflow as tf
import tensorflow_federated as tff
import tensorflow_probability as tfp

from tff_shadow.learning.client_work import (
  BuildGradientFn,
  GradientFn,
  build_plain_gradient_fn,
)
from tff_shadow.models import model_from_config, model_to_config

# The authors' code adds it to r, in their defence against inverting gradients.
_OFFSET = 0.1


def build_soteria_gradient_fn(model: tf.keras.Model, percentile: float) -> BuildGradientFn:
  """Builds the gradients of Soteria (Sun et al. 2021, CVPR; arXiv 2012.06043, section 4).

  The paper perturbs the representation r = f(x) that enters the defended layer, the last dense one:
  within a budget of entries (its case of the l0 norm) it sets to zero those r_i of the largest
  ||r_i (df_i/dx)^-1||, which move what an attacker reconstructs the most and the layer's gradient
  the least. As the authors' code (`jeremy313/Soteria`, `GS_attack`), we take
  |r_i| / ||df_i/dx|| for it: the sum over the batch of

    ||df_i/dx||_2 / (|r_i| + 0.1)

  is computed for every feature i, and where it is below the given percentile of all features,
  row i of the kernel's gradient is set to zero. That is done in every local step. Everything else
  is sent as it is, the layer's bias too. Features are those of inference (BatchNorm with running
  statistics), at the weights of the step.

  Exact derivatives take a backward pass for each feature in each step: 1,024 for `conv_small` at 32
  px, where a step takes some hundred times as long as a plain one. Features that are 0 on the whole
  batch score 0 and use up the percentile; if they are more than it, nothing is pruned. An attacker
  who leaves the defended layer out of the matching is not hindered (Balunovic et al. 2022,
  "Bayesian framework for gradient leakage").

  Args:
    model: The task model; its architecture counts, not its weights.
    percentile: Of the features that are pruned, from 0 to 100.

  Raises:
    ValueError: If the model does not end with a dense layer on a vector of features.
  """
  _dense_layer(model)
  config = model_to_config(model)

  def build_gradient_fn(local_model: tff.learning.models.VariableModel) -> GradientFn:
    plain_gradient_fn = build_plain_gradient_fn(local_model)
    # TFF's model shows predictions only, so a copy with its weights shows the features.
    copy = model_from_config(config)
    dense = _dense_layer(copy)
    features = tf.keras.Model(copy.inputs, dense.input)
    defended = [variable is dense.kernel for variable in copy.trainable_variables].index(True)

    def gradient_fn(batch):
      for copies, variables in (
        (copy.trainable_variables, local_model.trainable_variables),
        (copy.non_trainable_variables, local_model.non_trainable_variables),
      ):
        for copied, variable in zip(copies, variables, strict=True):
          copied.assign(variable)
      scores = feature_scores(features, batch['x'])
      threshold = tfp.stats.percentile(scores, percentile, interpolation='linear')
      num_examples, gradients = plain_gradient_fn(batch)
      kept = tf.cast(scores >= threshold, tf.float32)
      gradients[defended] *= kept[:, tf.newaxis]
      return num_examples, gradients

    return gradient_fn

  return build_gradient_fn


def feature_scores(features: tf.keras.Model, images: tf.Tensor) -> tf.Tensor:
  """The sum over a batch of ||df_i/dx|| / (|r_i| + 0.1).

  Args:
    features: Images -> r [B, F]; of an image alone, whatever else is in the batch.
    images: [B, H, W, C].

  Returns:
    float32 [F].
  """
  with tf.GradientTape(persistent=True) as tape:
    tape.watch(images)
    representation = features(images, training=False)
  num_features = representation.shape[1]

  def norms_of(index):
    one_hot = tf.one_hot(index, num_features) * tf.ones_like(representation)
    gradient = tape.gradient(
      representation, images, one_hot, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    return tf.norm(tf.reshape(gradient, [tf.shape(images)[0], -1]), axis=1)

  norms = tf.map_fn(norms_of, tf.range(num_features), fn_output_signature=tf.float32)
  return tf.reduce_sum(tf.transpose(norms) / (tf.abs(representation) + _OFFSET), axis=0)


def _dense_layer(model: tf.keras.Model) -> tf.keras.layers.Dense:
  """The layer with weights that gives the outputs; ValueError if it is no dense one on vectors."""
  layer = model.outputs[0]._keras_history.layer
  while not layer.weights and isinstance(layer.input, tf.keras.__internal__.KerasTensor):
    if isinstance(layer, tf.keras.layers.InputLayer):
      break
    layer = layer.input._keras_history.layer
  if not isinstance(layer, tf.keras.layers.Dense) or len(layer.input.shape) != 2:
    raise ValueError(
      'needs a model whose outputs come from a Dense layer on a vector of features, in the model'
      f' itself; here they come from {layer.name!r}'
    )
  if not layer.trainable:
    raise ValueError(f'the last layer {layer.name!r} is frozen, so there is nothing to prune')
  return layer
