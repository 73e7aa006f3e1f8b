"""Runs the attacks of an audit, each resumable, and keeps what they reconstruct."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from attacks.adaptive.attacker import AdaptiveAttacker, Effort, Watch, named
from attacks.adaptive.players import AttackersShadow
from attacks.adaptive.simulated_defense import region_map_of
from attacks.audit.budget import Budget
from attacks.config import AttackConfig
from attacks.engine import AttackProgress, attack_observation, planned_steps
from attacks.presets import PRESETS
from attacks.priors import GaussianImages, reweighted
from attacks.public_prior import fitted_prior
from attacks.report.page import write_whole
from attacks.results import TargetResult, read_results, write_results
from attacks.scoring.identification import Identification, identify_by_likelihood
from attacks.scoring.results import read_json
from attacks.shared_solvers import SharedSolvers
from attacks.threat_model import threat_model
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.observations import Observation, Truth

_CHECKPOINT = 'checkpoint.safetensors'
_KNOWS = 'knows.json'
_UNCALIBRATED = 'uncalibrated.json'
_RECOGNIZED = 'recognized.json'
ADAPTIVE, ADAPTIVE_REGION = 'adaptive', 'adaptive_region'


@dataclasses.dataclass(frozen=True)
class Attacked:
  """One attack of the suite on one round.

  Attributes:
    name: A preset, `ADAPTIVE` (knows the defence, and of the regions only what public images show)
      or `ADAPTIVE_REGION` (told the clients' regions too).
    results: One per client; empty if the attack could not be made.
    knows: What the attacker is assumed to know, in sentences.
    problem: Why the attack could not be made; None if it was.
  """

  name: str
  results: tuple[TargetResult, ...]
  knows: tuple[str, ...]
  problem: str | None = None


class Suite:
  """The attacks of one audit."""

  def __init__(
    self,
    budget: Budget,
    directory: pathlib.Path,
    *,
    public: Examples,
    augmentations: Sequence[str],
    seed: int,
    lanes: int,
    watch: Watch,
    shadow: AttackersShadow | None = None,
    cache_directory: pathlib.Path | None = None,
  ):
    """Attacks nothing yet.

    Args:
      budget: What is made.
      directory: Where results are kept; those in it are not made again.
      public: Images of the modality, with labels and regions, that no client trains on.
      augmentations: Of `Effort`, that leave an image of the modality one.
      seed: Decides everything.
      lanes: See `AttackConfig`.
      watch: Shows progress.
      shadow: With which the published defence is played; None for no such attacker.
      cache_directory: Where the denoiser is kept; `directory` by default.
    """
    self._budget = budget
    self._directory = directory
    settings = {'iterations': budget.iterations, 'lanes': lanes, 'seed': seed}
    effort = Effort(
      budget.calibration_clients,
      budget.denoiser_steps,
      budget.inversion_clients,
      tuple(augmentations),
    )
    self._attacker = AdaptiveAttacker(
      public,
      AttackConfig(**settings),
      effort,
      # As the attackers of batches that know of no defence.
      batch_config=dataclasses.replace(PRESETS['best_batch'].build(), **settings),
      shadow=shadow,
      watch=watch,
      directory=cache_directory or directory,
    )
    self._public, self._augmentations = public, tuple(augmentations)
    self._seed = seed
    self._lanes = lanes
    self.watch = watch
    self._shared: SharedSolvers | None = None

  @functools.cached_property
  def _public_prior(self) -> GaussianImages | None:
    images = self._public.float_images()
    return fitted_prior(images, self._augmentations, self._seed, value_weight=1.0)

  def unaware(
    self, place: str, observations: Sequence[Observation], clients: Sequence[str]
  ) -> list[Attacked]:
    """The attacks that know of no defence, on one round or several jointly.

    Args:
      place: Names the directory of the results.
      observations: The rounds.
      clients: Ids.
    """
    several = any(observations[0].client(name).num_images > 1 for name in clients)
    presets = list(self._budget.presets)
    if several and 'best' in presets:
      # Which weight of the prior is better depends on the modality.
      informed = ['best_public', 'best_public_strong'] if self._public_prior else []
      presets[1:1] = ['best_batch', *informed]
    attacked = []
    for preset in presets:
      prior, factor = None, PRESETS[preset].public_prior
      if factor:
        prior = reweighted(self._public_prior, factor * self._public_prior.weight)
      config = dataclasses.replace(
        PRESETS[preset].build(),
        iterations=self._budget.iterations,
        lanes=self._lanes,
        seed=self._seed,
        gaussian_images=prior,
      )
      knows = threat_model(
        observations[0], config, labels_known=False, num_rounds=len(observations)
      )
      try:
        results = self._invert(f'{place}/{preset}', observations, config, clients)
      except (UserError, tf.errors.OpError) as error:
        attacked.append(Attacked(preset, (), tuple(knows), str(error)))
      else:
        attacked.append(Attacked(preset, tuple(results), tuple(knows)))
    return attacked

  def adaptive(
    self,
    place: str,
    observations: Sequence[Observation],
    truth: Mapping[str, Truth],
    clients: Sequence[str],
  ) -> list[Attacked]:
    """The attacks that know the defence, with the clients' regions unknown and known.

    Args:
      place: Names the directory of the results.
      observations: The rounds, attacked jointly.
      truth: Decides the region maps that one of the attackers is told, and nothing else.
      clients: Ids.

    Returns:
      These; and with a problem the one that was not made on some of the clients, where there are
      too many kinds of them for each to have its own settings.
    """
    if not self._budget.calibration_clients:
      return []
    names = [ADAPTIVE]
    if all(observations[0].client(name).num_images == 1 for name in clients):
      # Of several images nobody knows in which order they come out.
      names.append(ADAPTIVE_REGION)
    saved = [self._saved(f'{place}/{name}') for name in names]
    if None not in saved:
      return [*saved, *self._uncalibrated(place)]
    told = None
    try:
      if ADAPTIVE_REGION in names:
        region_map = region_map_of(observations[0])
        told = {name: region_map(truth[name]) for name in clients}
      found = self._attacker.attack(
        observations, clients, told, shared=self._solvers(observations), name=f'{place}/{ADAPTIVE}'
      )
    except (UserError, tf.errors.OpError) as error:
      return [Attacked(ADAPTIVE, (), (), str(error))]
    made = [
      Attacked(name, tuple(own.results), own.knows(observations[0]))
      for name, own in zip(names, found, strict=True)
    ]
    for attacked, own in zip(made, found, strict=True):
      directory = self._directory / place / attacked.name
      directory.mkdir(parents=True, exist_ok=True)
      (directory / _UNCALIBRATED).write_text(json.dumps(own.uncalibrated))
      (directory / _KNOWS).write_text(json.dumps(attacked.knows))
      write_results(directory, attacked.results)
    return [*made, *self._uncalibrated(place)]

  def recognized(
    self,
    place: str,
    observations: Sequence[Observation],
    truth: Mapping[str, Truth],
    clients: Sequence[str],
  ) -> Identification | None:
    """Images of clients that the updates pick out of all of these and public ones.

    Args:
      place: Names the directory of the results.
      observations: The rounds, taken together.
      truth: The images that the server is assumed to have, among others.
      clients: Ids.

    Returns:
      None where the budget has no attacker who knows the defence.

    Raises:
      UserError: If the defence cannot be played.
    """
    if not self._budget.calibration_clients:
      return None
    path = self._directory / place / _RECOGNIZED
    if not path.exists():
      found = self._attacker.recognize(observations, clients, truth, name=f'{place}/known images')
      made = {**found._asdict(), 'ranks': found.ranks.tolist()}
      write_whole(path.parent, {path.name: json.dumps(made)})
    saved = read_json(path)
    return identify_by_likelihood(np.array(saved['ranks']), saved['owners'], saved['choices'])

  def _uncalibrated(self, place: str) -> list[Attacked]:
    """An attack that was not made: that with settings chosen for clients like some of these."""
    path = self._directory / place / ADAPTIVE / _UNCALIBRATED
    clients = json.loads(path.read_text()) if path.exists() else []
    if not clients:
      return []
    problem = (
      'their numbers of images and steps are too rare among the clients, or more than there are'
      ' public images to play them with; the settings of the nearest kind were taken'
    )
    return [Attacked(f'{ADAPTIVE} calibrated for {named(clients)}', (), (), problem)]

  def _saved(self, place: str) -> Attacked | None:
    directory = self._directory / place
    results = read_results(directory)
    if not results:
      return None
    knows = json.loads((directory / _KNOWS).read_text())
    return Attacked(directory.name, tuple(results), tuple(knows))

  def _invert(self, place, observations, config, clients) -> list[TargetResult]:
    directory = self._directory / place
    directory.mkdir(parents=True, exist_ok=True)
    finished = read_results(directory)
    total = planned_steps(observations[0], config, clients)
    with self.watch(place, total) as update:

      def show(at: AttackProgress) -> None:
        update(at.done, str(at))

      return attack_observation(
        list(observations),
        config,
        list(clients),
        finished=finished,
        on_result=lambda done: write_results(directory, done),
        progress=show,
        checkpoint_path=directory / _CHECKPOINT,
        shared=self._solvers(observations, config.dtype),
      )

  def _solvers(self, observations: Sequence[Observation], dtype: str = 'float32') -> SharedSolvers:
    """Those for these rounds; of earlier ones they are given up."""
    if self._shared is None or not self._shared.fits(observations, dtype):
      self._shared = SharedSolvers(observations, dtype)
    return self._shared
