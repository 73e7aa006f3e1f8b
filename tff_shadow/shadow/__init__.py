"""The shadow: what of an image would leak, and where."""

from tff_shadow.shadow.generator import build_generator, synthesis_variables
from tff_shadow.shadow.latents import FittedLatents, LatentFit, fit_latents
from tff_shadow.shadow.region_maps import (
  RegionMap,
  RegionMaps,
  add_region_maps,
  given_region_map,
  maps_from_scores,
  soft_top_fraction,
  uniform_region_map,
)
from tff_shadow.shadow.saliency import (
  KINDS,
  SaliencyConfig,
  build_region_map,
  build_score_fn,
)

__all__ = [
  'KINDS',
  'FittedLatents',
  'LatentFit',
  'RegionMap',
  'RegionMaps',
  'SaliencyConfig',
  'add_region_maps',
  'build_generator',
  'build_region_map',
  'build_score_fn',
  'fit_latents',
  'given_region_map',
  'maps_from_scores',
  'soft_top_fraction',
  'synthesis_variables',
  'uniform_region_map',
]
