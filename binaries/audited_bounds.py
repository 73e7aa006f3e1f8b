"""Bounds of the region error beside an audit's measurement, where they can be computed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attacks.adaptive.attacker import Watch
from attacks.audit.replay import is_single_image_round
from binaries.linearised_release import LinearisedRelease
from tff_shadow.data import Examples
from tff_shadow.learning import ShadowNoise
from tff_shadow.learning.decoys import decoy_batches, decoy_pool
from tff_shadow.models import batch_norm_layers, model_from_config
from tff_shadow.observations import Observation, Truth
from tff_shadow.privacy import region_psnr

# About 2 GB of derivatives.
_MAX_JACOBIAN_ENTRIES = 5e8


def bounds_of(
  observation: Observation,
  truth: Mapping[str, Truth],
  clients: Sequence[str],
  public: Examples,
  watch: Watch,
) -> list[dict[str, Any]]:
  """The bounds of `attacks.audit.summary.RoundEvidence`, averaged over `clients`.

  There are some for single images on small models without BatchNorm, under shadow noise that needs
  no region or is given it; none otherwise.

  Args:
    observation: The round.
    truth: Of its clients.
    clients: Ids; there are no bounds for none.
    public: At least three images; decoys are made of them as the clients do.
    watch: Shows progress, where there is something to compute.
  """
  strength = _linearised_strength(observation.defense)
  if not clients or strength is None or not is_single_image_round(observation, clients):
    return []
  model = model_from_config(observation.model_config)
  entries = math.prod(observation.image_shape) * model.count_params()
  if batch_norm_layers(model) or entries > _MAX_JACOBIAN_ENTRIES:
    return []
  for variable, array in zip(
    model.trainable_variables, observation.global_weights.trainable, strict=True
  ):
    variable.assign(array)
  # Without any region there is no error of it to bound.
  clients = [name for name in clients if truth[name].regions.any()]
  if not clients:
    return []
  attacked = [truth[name] for name in clients]
  with watch('bounds', 1) as update:
    noise = ShadowNoise.from_public_settings(observation.defense)
    decoys = decoy_batches(noise, decoy_pool(public), model) if noise.needs_decoys else None
    release = LinearisedRelease(
      model,
      attacked,
      public.float_images(),
      [noise.shape],
      floor=noise.floor,
      decoys=decoys,
    )
    errors = release.errors(noise.shape, strength)
    update(1, '')
  unbiased, prior = map(region_psnr, errors)
  bounds = [
    {
      'name': 'Best linear estimate',
      'region_psnr': prior,
      'holds_here': noise.strength.kind == 'scale',
      'clients': list(clients),
      'rests_on': 'van Trees with a Gaussian prior fitted to public images, an ESTIMATE: attackers'
      ' who know the mean and covariance of images. Those who know more may exceed it, most on'
      ' smooth images.'
      + (' Of decoy noise its covariance counts, from varied public images.' if decoys else '')
      + (
        ''
        if noise.strength.kind == 'scale'
        else ' How loud the noise is tells of the update that it is relative to; that is not'
        ' counted, so that the attacks above may exceed it.'
      ),
    },
    {
      'name': 'Without bias',
      'region_psnr': unbiased,
      'holds_here': False,
      'clients': list(clients),
      'rests_on': 'Cramer-Rao: attackers who know nothing of what images look like. The attacks'
      ' above do, so that they may exceed it.',
    },
  ]
  # A region that the update does not identify has no finite bound without a prior.
  return [bound for bound in bounds if np.isfinite(bound['region_psnr'])]


def _linearised_strength(defense: Mapping[str, Any]) -> str | None:
  """As `LinearisedRelease` takes it; None if it knows no such defence."""
  if defense['name'] != 'shadow':
    return None
  noise = ShadowNoise.from_public_settings(defense)
  kind, value = noise.strength.kind, noise.strength.value
  if not value:
    return None  # What is sent without noise has no bound.
  # Of another shadow the bounds would need its maps; noise without one is the same for any.
  if noise.needs_shadow and noise.saliency.kind != 'given':
    return None
  if noise.in_images and kind == 'scale':
    return f'images:{value}'
  # Of one image in one step both ratios are the same.
  relative = kind in ('ratio', 'image_ratio')
  if noise.shape == 'decoy':
    return str(value) if relative else f'scale:{value}'
  if noise.needs_shadow and noise.propagation != 'per_step':
    return None
  return str(value) if relative else None
