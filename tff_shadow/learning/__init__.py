"""Federated learning processes and the program that runs them."""

from tff_shadow.learning.baselines import (
  BASELINES,
  BaselineDefense,
  DpFedAvg,
  DpSgd,
  PercentileGaussian,
  Quantization,
  Soteria,
  TopK,
  UpdateTransform,
)
from tff_shadow.learning.client_work import build_client_work
from tff_shadow.learning.evaluation import estimate_batch_norm_statistics, evaluate
from tff_shadow.learning.fed_avg import build_weighted_fed_avg
from tff_shadow.learning.keras_task import input_spec, keras_model_fn, model_weights
from tff_shadow.learning.noise_settings import PROPAGATIONS, ShadowNoise, shadow_input_spec
from tff_shadow.learning.observed_round import Participant, observation_of
from tff_shadow.learning.recorded_round import record_round
from tff_shadow.learning.round_sampler import RoundSampler
from tff_shadow.learning.settings import ShadowDefense, TrainingSettings
from tff_shadow.learning.shadow_fed_avg import build_shadow_fed_avg
from tff_shadow.learning.training import (
  RoundReport,
  TrainingRun,
)

__all__ = [
  'BASELINES',
  'PROPAGATIONS',
  'BaselineDefense',
  'DpFedAvg',
  'DpSgd',
  'Participant',
  'PercentileGaussian',
  'Quantization',
  'RoundReport',
  'RoundSampler',
  'ShadowDefense',
  'ShadowNoise',
  'Soteria',
  'TopK',
  'TrainingRun',
  'TrainingSettings',
  'UpdateTransform',
  'build_client_work',
  'build_shadow_fed_avg',
  'build_weighted_fed_avg',
  'estimate_batch_norm_statistics',
  'evaluate',
  'input_spec',
  'keras_model_fn',
  'model_weights',
  'observation_of',
  'record_round',
  'shadow_input_spec',
]
