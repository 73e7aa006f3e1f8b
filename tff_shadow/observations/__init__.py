"""The logged rounds: what the server saw, and apart from it the truth for scoring."""

from tff_shadow.observations.files import (
  load_tensors,
  read_observation,
  save_json,
  save_tensors,
  write_observation,
)
from tff_shadow.observations.rounds import (
  observation_path,
  observed_rounds,
  read_round,
  round_directory_name,
  truth_path,
  write_round,
)
from tff_shadow.observations.schema import (
  AGGREGATE,
  BATCH_NORM_SHARING,
  BatchNormSharing,
  ClientObservation,
  ClientTraining,
  Observation,
  WeightArrays,
  mean_update,
)
from tff_shadow.observations.truth import Truth, read_truth, write_truth

__all__ = [
  'AGGREGATE',
  'BATCH_NORM_SHARING',
  'BatchNormSharing',
  'ClientObservation',
  'ClientTraining',
  'Observation',
  'Truth',
  'WeightArrays',
  'load_tensors',
  'mean_update',
  'observation_path',
  'observed_rounds',
  'read_observation',
  'read_round',
  'read_truth',
  'round_directory_name',
  'save_json',
  'save_tensors',
  'truth_path',
  'write_observation',
  'write_round',
  'write_truth',
]
