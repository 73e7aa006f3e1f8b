"""Tracing what calls Keras models."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def graph_function(function: Callable[..., Any], *models: tf.keras.Model, **settings: Any) -> Any:
  """`tf.function` without AutoGraph, unless a model has layers of code that is not Keras's.

  AutoGraph rewrites all Python that is traced, which takes longer than to trace it. Ours and
  Keras's has no use for that; a user's own layer may branch on tensors.

  Args:
    function: To be traced.
    models: That it calls.
    **settings: Of `tf.function`.
  """
  own = (layer for model in models for layer in model._flatten_layers())
  autograph = any(not type(layer).__module__.startswith('keras.') for layer in own)
  return tf.function(function, autograph=autograph, **settings)
