"""An attack whose settings were chosen on simulated rounds under the same defence.

Which matching loss, how strong a prior and how much denoising is best depends on the noise, and no
attacker has to guess it: with the defence simulated on public images, of which it knows the truth,
it tries them all and takes what brings it closest there, also in what share to mix a search for a
match with what a network has learned to make of an update. The truth of the attacked clients
decides nothing.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from attacks.adaptive.denoiser import RegionDenoiser
from attacks.adaptive.learned_inversion import LearnedInversion
from attacks.adaptive.players import example_clip_norm
from attacks.adaptive.simulated_defense import SimulatedRound
from attacks.adaptive.simulated_updates import flat
from attacks.adaptive.weightings import WEIGHTINGS, weights_of
from attacks.batch_norm_statistics import statistics_can_be_matched
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.matching import CosineMatching, Matching, SquaredMatching
from attacks.noise_covariance import NoiseCovariance
from attacks.priors import reweighted
from attacks.results import TargetResult
from attacks.scoring.assignment import in_order
from attacks.scoring.metrics import measure
from attacks.scoring.results import OTHER_UPDATE
from attacks.shared_solvers import SharedSolvers
from tff_shadow.observations import Observation

# Deviations of noise that the denoiser is told, in image units; 0 leaves the images as they are.
LEVELS = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5)
# Of the learned inversion's images in the mixture with those of a search.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of BatchNorm statistics that clients sent, beside the attack's own.
STATISTICS_WEIGHTS = (1.0, 0.1, 0.01, 0.0)
_UNWEIGHTED = 'none'


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings to try.

  Attributes:
    matching: How updates are compared.
    tv_weight: Of the total variation.
    gaussian_weight: Of the Gaussian prior of public images, times the number of weights. Beside the
      squared error of an update that is white noise for the most part, 1 is the weight of Bayes'
      rule; noise of ratio r to the update asks for r^2 / (1 + r^2).
    weighting: What is compared: 'none' for all entries alike, or one of `WEIGHTINGS`. What that
      has to guess follows from what the first candidate has reconstructed.
    knows_covariance: Whether updates are compared in units of the noise, whose covariance is the
      same for all clients.
    statistics_weight: Of the BatchNorm statistics that clients sent, times that of the attack by
      itself. Noise is on them as on all of an update, and the more there is, the less they should
      count: images that match them exactly follow it. None for the weight of the best candidate
      before.
  """

  matching: Matching
  tv_weight: float
  weighting: str = _UNWEIGHTED
  gaussian_weight: float = 0.0
  knows_covariance: bool = False
  statistics_weight: float | None = 1.0

  @property
  def needs_guess(self) -> bool:
    """Whether it builds on the first candidate's images, and on region maps."""
    return self.weighting != _UNWEIGHTED and WEIGHTINGS[self.weighting].needs_guess

  def __str__(self) -> str:
    parts = [self.matching.name]
    if self.tv_weight:
      parts.append(f'tv {self.tv_weight:g}')
    if self.gaussian_weight:
      parts.append(f'Gaussian prior {self.gaussian_weight:g}')
    if self.knows_covariance:
      parts.append('in units of the noise')
    if self.weighting != _UNWEIGHTED:
      parts.append(self.weighting)
    if self.statistics_weight != 1:
      parts.append(f'statistics {self.statistics_weight:g}')
    return ' '.join(parts)


_BALANCED = CosineMatching(balance=0.5)
# First the attack that knows of no noise; its total variation is far too weak against much noise.
# That of all is for `AttackConfig()`; other attacks take it in proportion to their own.
CANDIDATES = (
  Candidate(_BALANCED, 0.15),
  Candidate(_BALANCED, 0.5),
  Candidate(_BALANCED, 1.5),
  Candidate(_BALANCED, 4.0),
  Candidate(SquaredMatching(), 1.5),
  Candidate(SquaredMatching(), 5.0),
  Candidate(SquaredMatching(), 0.0, gaussian_weight=0.03),
  Candidate(SquaredMatching(), 0.0, gaussian_weight=0.2),
  Candidate(SquaredMatching(), 0.0, gaussian_weight=1.0),
)
# On which the weight of BatchNorm statistics is chosen.
_WEIGHED = CANDIDATES[2]
# What else is worth trying, by the name of the defence or the shape of its noise. White noise
# (percentile_gaussian, dp_sgd), rounding and clipping leave all entries alike.
MORE_CANDIDATES = {
  'diagonal': (
    Candidate(SquaredMatching(), 5.0, 'deviations'),
    Candidate(SquaredMatching(), 5.0, 'low_noise'),
  ),
  # The noise fills the directions in which images differ most.
  'decoy': (
    Candidate(SquaredMatching(), 1.5, knows_covariance=True),
    Candidate(SquaredMatching(), 0.0, gaussian_weight=0.2, knows_covariance=True),
    Candidate(SquaredMatching(), 0.0, gaussian_weight=1.0, knows_covariance=True),
  ),
  'top_k': (
    Candidate(_BALANCED, 0.15, 'nonzero'),
    Candidate(_BALANCED, 0.5, 'nonzero'),
    Candidate(_BALANCED, 1.5, 'nonzero'),
  ),
  'soteria': (
    Candidate(_BALANCED, 0.15, 'without_last_kernel'),
    Candidate(_BALANCED, 0.5, 'without_last_kernel'),
    # What is left of the kernel is as it was.
    Candidate(_BALANCED, 0.5, 'nonzero'),
  ),
}


def candidates_for(observation: Observation, config: AttackConfig) -> tuple[Candidate, ...]:
  """What is worth trying under the defence of `observation`, the first `config` as it is.

  Where clients sent BatchNorm statistics, their weight comes next, and all others after it.
  """
  defense = observation.defense
  known = CANDIDATES + MORE_CANDIDATES.get(defense.get('shape', defense['name']), ())
  if config.batch_norm_statistics.weight and statistics_can_be_matched(observation):
    weighed = [dataclasses.replace(_WEIGHED, statistics_weight=w) for w in STATISTICS_WEIGHTS]
    others = [dataclasses.replace(own, statistics_weight=None) for own in known if own != _WEIGHED]
    known = (known[0], *weighed, *others)
  return tuple(_in_proportion(candidate, config) for candidate in known)


def informed_solvers(
  observations: Sequence[Observation], dtype: str, shared: SharedSolvers | None = None
) -> SharedSolvers:
  """Solvers that do to gradients what the defence does besides noising them.

  Args:
    observations: The rounds, all under one defence.
    dtype: `AttackConfig.dtype`.
    shared: Solvers for these rounds, which are taken if they do so.
  """
  clip_norm = example_clip_norm(observations[0].defense)
  if shared is not None and shared.example_clip_norm == clip_norm:
    return shared
  return SharedSolvers(observations, dtype, clip_norm)


def _in_proportion(candidate: Candidate, config: AttackConfig) -> Candidate:
  """With as much more total variation as the attack of `config` has by itself, if it has any."""
  factor = config.total_variation.weight / CANDIDATES[0].tv_weight or 1.0
  return dataclasses.replace(candidate, tv_weight=candidate.tv_weight * factor)


@dataclasses.dataclass(frozen=True)
class Trial:
  """What settings reached on public images.

  Attributes:
    candidate: The settings of the inversion.
    level: What the denoiser is told; 0 if the images are left as they are.
    learned_share: Of the learned inversion's images in what comes out.
    knows_region: Whether the attack is told the clients' region maps, or only the mean public one.
    region_psnr: Mean over the public images, dB.
  """

  candidate: Candidate
  level: float
  learned_share: float
  knows_region: bool
  region_psnr: float


def calibrate(
  simulated: SimulatedRound | Sequence[SimulatedRound],
  config: AttackConfig,
  denoiser: RegionDenoiser | None,
  learned: LearnedInversion | None = None,
  candidates: Sequence[Candidate] | None = None,
  progress: Callable[[int, Trial], None] = lambda done, best: None,
  shared: SharedSolvers | None = None,
  covariances: Sequence[NoiseCovariance] = (),
) -> list[Trial]:
  """Tries all candidates, with all levels of denoising and all shares of the learned inversion.

  Args:
    simulated: The attacker's own clients; in several rounds to attack as many jointly.
    config: All other settings, `gaussian_images` among them, without which no candidate with a
      Gaussian prior is tried.
    denoiser: Takes out what noise is left in the images; None for none. It must not have been
      trained on images of `simulated`.
    learned: Gives images from updates, and labels where it reads them; None for none. As the
      denoiser.
    candidates: `candidates_for` the round by default.
    progress: Called after each candidate with their number and the best trial so far.
    shared: Solvers for these rounds.
    covariances: Of the noise, one per round, without which no candidate that knows it is tried.

  Returns:
    All trials, the best first.

  Raises:
    UserError: If the round cannot be attacked.
  """
  rounds = [simulated] if isinstance(simulated, SimulatedRound) else list(simulated)
  observations, simulated = [own.observation for own in rounds], rounds[0]
  shared = informed_solvers(observations, config.dtype, shared)
  # As it infers those of the clients that it attacks, not the truth.
  labels = _inferred_labels(observations, simulated.maps, learned)
  guesses: dict[str, np.ndarray] = {}
  trials: list[Trial] = []
  first: list[TargetResult] = []
  candidates = candidates or candidates_for(observations[0], config)
  if config.gaussian_images is None:
    candidates = [candidate for candidate in candidates if not candidate.gaussian_weight]
  if not covariances:
    candidates = [candidate for candidate in candidates if not candidate.knows_covariance]
  for done, candidate in enumerate(candidates):
    if candidate.statistics_weight is None:
      weight = next(t.candidate.statistics_weight for t in trials if not t.learned_share)
      candidate = dataclasses.replace(candidate, statistics_weight=weight)
    if any(candidate == trial.candidate for trial in trials):
      continue
    results: list[TargetResult] = []
    for knows_region in (False, True):
      maps = simulated.maps if knows_region else dict.fromkeys(simulated.maps, simulated.mean_map)
      if not results or candidate.needs_guess:
        results = _invert(
          observations, candidate, config, first, maps, shared, covariances, labels, controls=False
        )
        guesses = guesses or _learned_images(observations, results, learned)
      for level in LEVELS if denoiser else LEVELS[:1]:
        found = [_denoised(own, level, denoiser, maps[own.target]) for own in results]
        for share in SHARES if learned else SHARES[:1]:
          images = [
            _mixed(one, guesses.get(own.target), share)
            for one, own in zip(found, results, strict=True)
          ]
          closeness = _mean_region_psnr(results, images, simulated)
          trials.append(Trial(candidate, level, share, knows_region, closeness))
    first = first or results
    trials.sort(key=lambda trial: -trial.region_psnr)
    progress(done + 1, trials[0])
  return trials


def attack_calibrated(
  observation: Observation | Sequence[Observation],
  trial: Trial,
  config: AttackConfig,
  denoiser: RegionDenoiser | None,
  maps: Mapping[str, np.ndarray],
  learned: LearnedInversion | None = None,
  earlier: dict[Candidate, list[TargetResult]] | None = None,
  shared: SharedSolvers | None = None,
  covariances: Sequence[NoiseCovariance] = (),
) -> list[TargetResult]:
  """Attacks clients as `trial` did.

  Args:
    observation: The observed round, or several in which the clients trained on the same images;
      they are attacked jointly.
    trial: The best of `calibrate`.
    config: As it was there.
    denoiser: As it was there.
    maps: Of each client to attack, the region maps [B, H, W, 1] of its images, in the order in
      which they are reconstructed; `SimulatedRound.mean_map` of the public ones if the attack is
      not told them.
    learned: As it was there.
    earlier: Takes inversions that do not depend on the maps, and gives them to another call on the
      same round.
    shared: Solvers for these rounds.
    covariances: As there.

  Returns:
    One result per client in `maps`. One that is told the region maps has a control more than every
    attack, 'other_update': the same attack on the update of another client with this one's maps,
    which are all that it tells of this one. It is absent where no other client has as many images.
  """
  earlier = {} if earlier is None else earlier
  observations = [observation] if isinstance(observation, Observation) else list(observation)
  shared = informed_solvers(observations, config.dtype, shared)
  labels = _inferred_labels(observations, maps, learned)

  def invert(candidate: Candidate) -> list[TargetResult]:
    if candidate.needs_guess:
      first = invert(_in_proportion(CANDIDATES[0], config))
      return _invert(observations, candidate, config, first, maps, shared, covariances, labels)
    if candidate not in earlier:
      earlier[candidate] = _invert(
        observations, candidate, config, [], maps, shared, covariances, labels
      )
    return earlier[candidate]

  results = invert(trial.candidate)
  guesses = _learned_images(observations, results, learned if trial.learned_share else None)
  finished = []
  for place, result in enumerate(results):
    own = maps[result.target]
    made = {'attack': result}
    if trial.knows_region:
      made[OTHER_UPDATE] = _another(results, place)
    images = {
      name: _mixed(
        _denoised(used, trial.level, denoiser, own), guesses.get(used.target), trial.learned_share
      )
      for name, used in made.items()
      if used is not None and used.status == 'ok'
    }
    if result.status == 'ok':
      reconstructions = {**result.reconstructions, **images}
      result = dataclasses.replace(result, reconstructions=reconstructions)
    finished.append(result)
  return finished


def _another(results: Sequence[TargetResult], place: int) -> TargetResult | None:
  """The next client of as many images that was attacked successfully; None if there is none."""
  own = results[place]
  others = [*results[place + 1 :], *results[:place]]
  fitting = (o for o in others if o.status == 'ok' and o.images == own.images)
  return next(fitting, None)


def _invert(
  observations: Sequence[Observation],
  candidate: Candidate,
  config: AttackConfig,
  first: Sequence[TargetResult],
  maps: Mapping[str, np.ndarray],
  shared: SharedSolvers,
  covariances: Sequence[NoiseCovariance] = (),
  labels: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
  *,
  controls: bool = True,
) -> list[TargetResult]:
  """Inverts the updates of the clients in `maps`; `first` is of the first candidate."""
  config = dataclasses.replace(
    config,
    matching=candidate.matching,
    total_variation=dataclasses.replace(config.total_variation, weight=candidate.tv_weight),
  )
  if candidate.gaussian_weight:
    weights = sum(array.size for array in observations[0].global_weights.trainable)
    config = dataclasses.replace(
      config,
      gaussian_images=reweighted(config.gaussian_images, candidate.gaussian_weight / weights),
    )
  else:
    config = dataclasses.replace(config, gaussian_images=None)
  prior = config.batch_norm_statistics
  prior = dataclasses.replace(prior, weight=prior.weight * candidate.statistics_weight)
  config = dataclasses.replace(config, batch_norm_statistics=prior)
  weights = None
  if candidate.weighting != _UNWEIGHTED:
    rounds = [
      weights_of(seen, candidate.weighting, maps, first, simulator)
      for seen, simulator in zip(observations, shared.simulators, strict=True)
    ]
    weights = {target: [weights[target] for weights in rounds] for target in maps}
  return attack_observation(
    observations,
    config,
    list(maps),
    inferred=labels,
    weights=weights,
    covariances=covariances if candidate.knows_covariance else (),
    orders={own.target: own.order for own in first if own.order is not None},
    controls=controls,
    shared=shared,
  )


def _denoised(result, level, denoiser, region_map) -> np.ndarray | None:
  """The images of a result without their noise; None if there are none."""
  if result.status != 'ok':
    return None
  images = result.reconstructions['attack']
  if not level:
    return images
  regions = np.broadcast_to(region_map, (*images.shape[:3], 1))
  return denoiser(images, np.full(len(images), level, np.float32), regions)


def _inferred_labels(
  observations: Sequence[Observation], names: Iterable[str], learned: LearnedInversion | None
) -> dict[str, tuple[int, ...]]:
  """Labels of clients, as far as the learned inversion reads any."""
  if learned is None or not learned.reads_labels:
    return {}
  found = {}
  for name in names:
    own = [seen.client(name) for seen in observations]
    finite = all(np.isfinite(flat(one.update)).all() for one in own)
    if finite and all(map(learned.fits, own)):
      found[name] = learned.labels([one.update for one in own])
  return found


def _learned_images(
  observations: Sequence[Observation],
  results: Sequence[TargetResult],
  learned: LearnedInversion | None,
) -> dict[str, np.ndarray]:
  """What the learned inversion makes of clients, told the labels of `results`; none without it."""
  found = {}
  for result in results if learned else ():
    own = [seen.client(result.target) for seen in observations]
    if result.status == 'ok' and all(map(learned.fits, own)):
      found[result.target] = learned([client.update for client in own], result.labels)
  return found


def _mixed(found: np.ndarray | None, guess: np.ndarray | None, share: float) -> np.ndarray | None:
  """Images with a share of those that were learned, in the order of the images."""
  if not share or found is None or guess is None or not np.isfinite(guess).all():
    return found
  return (1 - share) * found + share * in_order(guess, found)


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
      values.append(measure(one, image, region).closeness)
  return float(np.mean(values))
