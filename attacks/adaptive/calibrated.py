"""An attack whose settings were chosen on simulated rounds under the same defence.

Which matching loss, how strong a prior and how much denoising is best depends on the noise, and no
attacker has to guess it: with the defence simulated on public images, of which it knows the truth,
it tries them all and takes what brings it closest there. The truth of the attacked clients decides
nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from attacks.adaptive.denoiser import RegionDenoiser
from attacks.adaptive.simulated_defense import Sensitivity, SimulatedRound
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.matching import CosineMatching, Matching, SquaredMatching
from attacks.results import TargetResult
from attacks.scoring.assignment import in_order
from attacks.scoring.metrics import measure
from attacks.simulator import ClientSimulator
from tff_shadow.observations import Observation

Whitening = Literal['none', 'deviations', 'low_noise']
# Deviations of noise that the denoiser is told, in image units; 0 leaves the images as they are.
LEVELS = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5)
_LOW_NOISE_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings to try.

  Attributes:
    matching: How updates are compared.
    tv_weight: Of the total variation.
    whitening: What is compared. 'none': all entries alike. 'deviations': each in units of the
      deviation that diagonal noise is expected to have there, which with the squared error is the
      Gaussian likelihood, so that the image sought is the maximum a posteriori. 'low_noise': only
      the half of the entries where that is least. The expected deviations follow from what the
      first candidate has reconstructed.
  """

  matching: Matching
  tv_weight: float
  whitening: Whitening = 'none'

  def __str__(self) -> str:
    parts = [self.matching.name, f'tv {self.tv_weight:g}']
    return ' '.join(parts if self.whitening == 'none' else [*parts, self.whitening])


_BALANCED = CosineMatching(balance=0.5)
# First the attack that knows of no noise; its total variation is far too weak against much noise.
CANDIDATES = (
  Candidate(_BALANCED, 0.15),
  Candidate(_BALANCED, 0.5),
  Candidate(_BALANCED, 1.5),
  Candidate(_BALANCED, 4.0),
  Candidate(SquaredMatching(), 1.5),
  Candidate(SquaredMatching(), 5.0),
)
DIAGONAL_CANDIDATES = (
  Candidate(SquaredMatching(), 5.0, 'deviations'),
  Candidate(SquaredMatching(), 5.0, 'low_noise'),
)


def candidates_for(observation: Observation) -> tuple[Candidate, ...]:
  """What is worth trying under the defence of `observation`."""
  diagonal = observation.defense.get('shape') == 'diagonal'
  return CANDIDATES + (DIAGONAL_CANDIDATES if diagonal else ())


@dataclasses.dataclass(frozen=True)
class Trial:
  """What settings reached on public images.

  Attributes:
    candidate: The settings of the inversion.
    level: What the denoiser is told; 0 if the images are left as they are.
    knows_region: Whether the attack is told the clients' region maps, or only the mean public one.
    region_psnr: Mean over the public images, dB.
  """

  candidate: Candidate
  level: float
  knows_region: bool
  region_psnr: float


def calibrate(
  simulated: SimulatedRound,
  config: AttackConfig,
  denoiser: RegionDenoiser | None,
  candidates: Sequence[Candidate] | None = None,
  progress: Callable[[int, Trial], None] = lambda done, best: None,
) -> list[Trial]:
  """Tries all candidates, with all levels of denoising.

  Args:
    simulated: The attacker's own clients.
    config: All other settings.
    denoiser: Takes out what noise is left in the images; None for none. It must not have been
      trained on images of `simulated`.
    candidates: `candidates_for` the round by default.
    progress: Called after each candidate with their number and the best trial so far.

  Returns:
    All trials, the best first.

  Raises:
    UserError: If the round cannot be attacked.
  """
  trials: list[Trial] = []
  first: list[TargetResult] = []
  for done, candidate in enumerate(candidates or candidates_for(simulated.observation)):
    results: list[TargetResult] = []
    for knows_region in (False, True):
      maps = simulated.maps if knows_region else dict.fromkeys(simulated.maps, simulated.mean_map)
      if not results or candidate.whitening != 'none':
        results = _invert(simulated.observation, candidate, config, first, maps)
      for level in LEVELS if denoiser else LEVELS[:1]:
        images = [_denoised(result, level, denoiser, maps) for result in results]
        own = _mean_region_psnr(results, images, simulated)
        trials.append(Trial(candidate, level, knows_region, own))
    first = first or results
    trials.sort(key=lambda trial: -trial.region_psnr)
    progress(done + 1, trials[0])
  return trials


def attack_calibrated(
  observation: Observation,
  trial: Trial,
  config: AttackConfig,
  denoiser: RegionDenoiser | None,
  maps: Mapping[str, np.ndarray],
  earlier: dict[Candidate, list[TargetResult]] | None = None,
) -> list[TargetResult]:
  """Attacks clients as `trial` did.

  Args:
    observation: The observed round.
    trial: The best of `calibrate`.
    config: As it was there.
    denoiser: As it was there.
    maps: Of each client to attack, the region maps [B, H, W, 1] of its images, in the order in
      which they are reconstructed; `SimulatedRound.mean_map` of the public ones if the attack is
      not told them.
    earlier: Takes inversions that do not depend on the maps, and gives them to another call on the
      same round.

  Returns:
    One result per client in `maps`.
  """
  earlier = {} if earlier is None else earlier

  def invert(candidate: Candidate) -> list[TargetResult]:
    if candidate.whitening != 'none':
      return _invert(observation, candidate, config, invert(CANDIDATES[0]), maps)
    if candidate not in earlier:
      earlier[candidate] = _invert(observation, candidate, config, [], maps)
    return earlier[candidate]

  results = invert(trial.candidate)
  return [
    dataclasses.replace(
      result,
      reconstructions={
        **result.reconstructions,
        'attack': _denoised(result, trial.level, denoiser, maps),
      },
    )
    if result.status == 'ok'
    else result
    for result in results
  ]


def _invert(
  observation: Observation,
  candidate: Candidate,
  config: AttackConfig,
  first: Sequence[TargetResult],
  maps: Mapping[str, np.ndarray],
) -> list[TargetResult]:
  """Inverts the updates of the clients in `maps`; `first` is of the first candidate."""
  config = dataclasses.replace(
    config,
    matching=candidate.matching,
    total_variation=dataclasses.replace(config.total_variation, weight=candidate.tv_weight),
  )
  weights = None
  if candidate.whitening != 'none':
    weights = _weights(observation, candidate.whitening, first, maps)
  return attack_observation(observation, config, list(maps), weights=weights)


def _weights(observation, whitening, first, maps) -> dict[str, list[list[np.ndarray]]]:
  """By what the entries of each client's gradient are multiplied."""
  simulator = ClientSimulator(observation)
  sensitivity = Sensitivity(simulator)
  weights = {}
  for result in first:
    if result.status != 'ok':
      # It fails again for the same reason, and no weight is used.
      weights[result.target] = [[np.ones(v.shape) for v in simulator.model.trainable_variables]]
      continue
    guess = result.reconstructions['attack']
    own = np.broadcast_to(maps[result.target], (*guess.shape[:3], 1))
    deviations = sensitivity.relative_deviations(
      observation.defense, guess, np.array(result.labels, np.int32), own
    )
    if whitening == 'deviations':
      weights[result.target] = [[1 / array for array in deviations]]
    else:
      everything = np.concatenate([array.ravel() for array in deviations])
      limit = np.quantile(everything, _LOW_NOISE_SHARE)
      weights[result.target] = [[(array <= limit).astype(np.float32) for array in deviations]]
  return weights


def _denoised(result, level, denoiser, maps) -> np.ndarray | None:
  """The images of a result without their noise; None if there are none."""
  if result.status != 'ok':
    return None
  images = result.reconstructions['attack']
  if not level:
    return images
  regions = np.broadcast_to(maps[result.target], (*images.shape[:3], 1))
  return denoiser(images, np.full(len(images), level, np.float32), regions)


def _mean_region_psnr(results, images, simulated: SimulatedRound) -> float:
  """Over all public images; a client without a result counts as the mean image."""
  values = []
  for result, found in zip(results, images, strict=True):
    truth = simulated.truth[result.target]
    if found is None:
      found = np.repeat(simulated.observation.public_mean_image[None], len(truth.images), axis=0)
    for one, image, region in zip(
      in_order(found, truth.images), truth.images, truth.regions, strict=True
    ):
      quality = measure(one, image, region)
      values.append(quality.psnr if quality.region_psnr is None else quality.region_psnr)
  return float(np.mean(values))
