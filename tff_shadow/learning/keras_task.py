"""From a Keras model to what TFF wants, and back."""

import collections
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.learning.client_work import ModelFn
from tff_shadow.models import (
  classification_loss,
  freeze_batch_norm,
  model_from_config,
  model_to_config,
)
from tff_shadow.observations import BatchNormSharing


def input_spec(image_shape: tuple[int, int, int]) -> collections.OrderedDict:
  """Element type of a client's data: x float32 [B, H, W, C] in [0, 1], y int32 [B]."""
  return collections.OrderedDict(
    x=tf.TensorSpec((None, *image_shape), tf.float32), y=tf.TensorSpec((None,), tf.int32)
  )


def keras_model_fn(
  model: tf.keras.Model,
  image_shape: tuple[int, int, int],
  batch_norm_sharing: BatchNormSharing = 'aggregate',
) -> ModelFn:
  """The `model_fn` of TFF for the architecture of `model`; its weights are not captured."""
  return model_fn_of_config(model_to_config(model), image_shape, batch_norm_sharing)


def model_fn_of_config(
  config: Mapping[str, Any],
  image_shape: tuple[int, int, int],
  batch_norm_sharing: BatchNormSharing,
) -> ModelFn:
  """`keras_model_fn` for an architecture as `model_to_config` writes it."""
  spec = input_spec(image_shape)

  def model_fn() -> tff.learning.models.VariableModel:
    fresh = model_from_config(config)
    if batch_norm_sharing == 'frozen':
      freeze_batch_norm(fresh)
    return tff.learning.models.from_keras_model(
      fresh,
      loss=classification_loss(fresh),
      input_spec=spec,
      metrics=[tf.keras.metrics.SparseCategoricalAccuracy(name='accuracy')],
    )

  return model_fn


def model_weights(model: tf.keras.Model) -> tff.learning.models.ModelWeights:
  """The weights of `model` as arrays, for `LearningProcess.set_model_weights`."""
  return tff.learning.models.ModelWeights(
    [variable.numpy() for variable in model.trainable_variables],
    [variable.numpy() for variable in model.non_trainable_variables],
  )


def restore_eager_keras(model: tf.keras.Model) -> None:
  """Makes `model` callable again after TFF has built its architecture in a graph.

  Keras 2 changes the base of its model classes in place when one is made in a graph, as TFF does,
  and back when one is made outside; until then models made before raise "invalid state".
  """
  model_from_config(model_to_config(model))
