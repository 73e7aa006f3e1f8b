"""`tff.aggregators` factories."""

from tff_shadow.aggregators.noise_strength import (
  NOISE_SHAPES,
  STRENGTH_KINDS,
  NoiseShape,
  NoiseStrength,
)
from tff_shadow.aggregators.observation_tap import (
  build_collect_from_clients,
  observation_tap_factory,
)
from tff_shadow.aggregators.percentile_noise import percentile_noise_factory
from tff_shadow.aggregators.public_shadow_noise import public_shadow_noise_factory
from tff_shadow.aggregators.quantization import quantization_factory
from tff_shadow.aggregators.shadow_noise import shadow_noise_factory, shaped_update_type
from tff_shadow.aggregators.top_k import top_k_factory
from tff_shadow.aggregators.update_transform import update_transform_factory

__all__ = [
  'NOISE_SHAPES',
  'STRENGTH_KINDS',
  'NoiseShape',
  'NoiseStrength',
  'build_collect_from_clients',
  'observation_tap_factory',
  'percentile_noise_factory',
  'public_shadow_noise_factory',
  'quantization_factory',
  'shadow_noise_factory',
  'shaped_update_type',
  'top_k_factory',
  'update_transform_factory',
]
