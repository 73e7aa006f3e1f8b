"""Keras models: task models built here or a user's own, and a user's own generator."""

from tff_shadow.models.batch_norm import (
  Statistics,
  check_running_statistics,
  collect_statistics,
  inputs_of_layers,
  sent_statistics,
  training_batch_norm_layers,
)
from tff_shadow.models.generator_files import load_generator
from tff_shadow.models.graphs import graph_function
from tff_shadow.models.keras_files import (
  batch_norm_layers,
  check_model,
  classification_loss,
  freeze_batch_norm,
  load_keras_file,
  model_digest,
  model_from_config,
  model_to_config,
  random_layers,
  read_keras_file,
)
from tff_shadow.models.output_layers import (
  is_functional,
  layers_from_output,
  output_layer,
  outputs_logits,
)
from tff_shadow.models.zoo import MODELS, NORMS, Norm, build_model

__all__ = [
  'MODELS',
  'NORMS',
  'Norm',
  'Statistics',
  'batch_norm_layers',
  'build_model',
  'check_model',
  'check_running_statistics',
  'classification_loss',
  'collect_statistics',
  'freeze_batch_norm',
  'graph_function',
  'inputs_of_layers',
  'is_functional',
  'layers_from_output',
  'load_generator',
  'load_keras_file',
  'model_digest',
  'model_from_config',
  'model_to_config',
  'output_layer',
  'outputs_logits',
  'random_layers',
  'read_keras_file',
  'sent_statistics',
  'training_batch_norm_layers',
]
