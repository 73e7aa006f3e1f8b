"""An attacker who knows the defence and has public images of the modality."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from attacks.adaptive.calibrated import Trial, attack_calibrated, calibrate, candidates_for
from attacks.adaptive.denoiser import DenoiserSettings, RegionDenoiser
from attacks.adaptive.learned_inversion import (
  InversionSettings,
  LabelReader,
  LearnedInversion,
)
from attacks.adaptive.players import AttackersShadow, Equipment
from attacks.adaptive.simulated_defense import simulate_round
from attacks.config import AttackConfig
from attacks.priors import GaussianImages
from attacks.results import TargetResult
from attacks.shared_solvers import SharedSolvers
from attacks.targets import Targets
from tff_shadow.data import Examples
from tff_shadow.learning.decoys import decoy_pool
from tff_shadow.observations import ClientObservation, Observation, WeightArrays
from tff_shadow.privacy import fit_gaussian_prior
from tff_shadow.shadow.augmentation import augment

# Without them the covariance of a hundred images is mostly shrinkage.
_PRIOR_DRAWS = 2000

# From what is being done, and its number of steps, to a context that is told how far it is.
Watch = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int, str], None]]]


@contextlib.contextmanager
def unwatched(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
  """Shows nothing."""
  yield lambda done, detail: None


@dataclasses.dataclass(frozen=True)
class Effort:
  """How much an attacker makes of public images.

  Attributes:
    clients: To play, fewer where the images do not suffice; settings are chosen on these.
    denoiser_steps: Of the training of a network that takes out noise; 0 for no such network.
    inversion_clients: To simulate for a network that gives images back from updates; 0 for none.
    augmentations: Of `tff_shadow.shadow.augmentation.AUGMENTATIONS`: what leaves an image of the
      modality one.
  """

  clients: int
  denoiser_steps: int
  inversion_clients: int
  augmentations: tuple[str, ...] = ()

  def denoiser(self, seed: int) -> DenoiserSettings | None:
    """None for no denoiser."""
    if not self.denoiser_steps:
      return None
    return DenoiserSettings(steps=self.denoiser_steps, augmentations=self.augmentations, seed=seed)

  def inversion(self, seed: int) -> InversionSettings | None:
    """None for no learned inversion."""
    if not self.inversion_clients:
      return None
    return InversionSettings(
      clients=self.inversion_clients, augmentations=self.augmentations, seed=seed
    )


class AdaptiveAttack(NamedTuple):
  """What one attacker made of the clients.

  Attributes:
    trial: The settings that came closest on public images.
    num_played: Clients of public images on which they were tried.
    results: One for each attacked client.
  """

  trial: Trial
  num_played: int
  results: list[TargetResult]

  def knows(self, observation: Observation) -> tuple[str, ...]:
    """What the attacker of `observation` is assumed to know, one fact a sentence."""
    regions = 'It is told the region maps of the clients.'
    if not self.trial.knows_region:
      regions = 'It knows the mean region map of public images, and not those of the clients.'
    denoised = 'It leaves noise in the images as it is.'
    if self.trial.level:
      denoised = (
        'It takes noise out of the images by a network trained on public images (deviation'
        f' {self.trial.level:g}).'
      )
    learned = 'It has learned nothing from simulated updates.'
    if self.trial.learned_share:
      learned = (
        f'It mixes in {self.trial.learned_share:.0%} of what a network makes of the update that was'
        ' trained on simulated updates of varied public images.'
      )
    published = observation.defense['name'] == 'published'
    return (
      'It is an honest-but-curious server that knows the defence with all its settings, and not its'
      ' keys.',
      f'It has played the round itself with {self.num_played} clients of public images, and'
      f' takes the settings that came closest there: {self.trial.candidate}.',
      denoised,
      learned,
      regions,
      *(['It plays their shadows with a generator that it has.'] if published else []),
    )


class AdaptiveAttacker:
  """Plays rounds under the defence, and attacks with what worked best there.

  On one half of the public images it plays clients; on the other it learns to take out what noise
  is left in reconstructions, and to give images back from updates.
  """

  def __init__(
    self,
    public: Examples,
    config: AttackConfig,
    effort: Effort,
    *,
    shadow: AttackersShadow | None = None,
    watch: Watch = unwatched,
    directory: pathlib.Path | None = None,
  ):
    """Attacks nothing yet.

    Args:
      public: Images of the modality with labels and regions, of no attacked client.
      config: All settings that are not tried; the seed decides everything.
      effort: How much it makes of the public images.
      shadow: With which the published defence is played. The decoys of decoy noise are those of
        the public images.
      watch: Shows progress.
      directory: Where trained networks are kept; None to keep none.
    """
    order = np.random.default_rng(config.seed).permutation(len(public))
    self._played, self._learned = public.take(order[::2]), public.take(order[1::2])
    self._config = config
    self._effort = effort
    self._equipment = Equipment(shadow, decoy_pool(public))
    self._watch = watch
    self._directory = directory
    self._denoiser: RegionDenoiser | None = None

  def attack(
    self,
    observations: Sequence[Observation],
    clients: Sequence[str],
    told_maps: Mapping[str, np.ndarray] | None = None,
    *,
    shared: SharedSolvers | None = None,
    name: str = 'adaptive',
  ) -> list[AdaptiveAttack]:
    """Attacks clients in one round, or in several jointly.

    Args:
      observations: The rounds; the clients trained on the same images in each.
      clients: Ids.
      told_maps: Region maps [B, H, W, 1] of each client, in the order in which images come out;
        None if no attacker is told them.
      shared: Solvers for these rounds.
      name: What progress is shown under.

    Returns:
      The attack that knows of the clients' regions only what public images show; then, if
      `told_maps` are given, the one that is told them.

    Raises:
      UserError: If the defence cannot be played, or the rounds not attacked.
    """
    config = dataclasses.replace(self._config, gaussian_images=self._prior)
    denoiser = self._trained_denoiser()
    shared = shared or SharedSolvers(observations, config.dtype)
    like = _typical(observations[0], clients)
    count = min(self._effort.clients, len(self._played) // like.num_images)
    # The same clients in each round.
    simulated = [
      simulate_round(
        seen, like, self._played, num_clients=count, seed=config.seed, equipment=self._equipment
      )
      for seen in observations
    ]
    learned = self._trained_inversion(observations, like, name, shared)
    total = len(candidates_for(observations[0]))
    with self._watch(f'{name}: {total} settings on public images', total) as update:
      trials = calibrate(
        simulated,
        config,
        denoiser,
        learned,
        progress=lambda done, best: update(done, f'best {best.region_psnr:.1f} dB'),
        shared=shared,
      )
    maps_known = [dict.fromkeys(clients, simulated[0].mean_map)]
    if told_maps is not None:
      maps_known.append({client: told_maps[client] for client in clients})
    earlier: dict = {}
    made = []
    with self._watch(name, len(maps_known)) as update:
      for told, maps in enumerate(maps_known):
        trial = next(trial for trial in trials if trial.knows_region == bool(told))
        results = attack_calibrated(
          observations, trial, config, denoiser, maps, learned, earlier, shared
        )
        made.append(AdaptiveAttack(trial, count, results))
        update(told + 1, str(trial.candidate))
    return made

  @functools.cached_property
  def _prior(self) -> GaussianImages | None:
    return _fitted_prior(
      self._learned.float_images(), self._effort.augmentations, self._config.seed
    )

  def _trained_denoiser(self) -> RegionDenoiser | None:
    settings = self._effort.denoiser(self._config.seed)
    if self._denoiser is None and settings is not None:
      with self._watch('denoiser', settings.steps) as update:
        self._denoiser = RegionDenoiser(
          self._learned.float_images(),
          self._learned.float_regions(),
          settings,
          lambda step, loss: update(step, f'loss {loss:.5f}'),
          self._directory,
        )
    return self._denoiser

  def _trained_inversion(
    self,
    observations: Sequence[Observation],
    like: ClientObservation,
    name: str,
    shared: SharedSolvers,
  ) -> LearnedInversion | None:
    settings = self._effort.inversion(self._config.seed)
    if settings is None:
      return None
    targets = Targets(observations, self._config, shared.simulators)
    # The rule that the attacked clients' labels are inferred by.
    inference = targets.label_inference(like.num_images)

    def shown(view: int, update: WeightArrays) -> np.ndarray:
      client = dataclasses.replace(like, update=update)
      gradient = targets.simulators[view].observed_gradient(client)
      return inference.shown(view, gradient).numpy()

    def labels(shown: Sequence[np.ndarray]) -> np.ndarray:
      return inference.labels(shown).values

    with self._watch(f'{name}: learned inversion', settings.clients) as update:
      return LearnedInversion(
        observations,
        like,
        self._learned,
        settings,
        reader=LabelReader(shown, labels),
        equipment=self._equipment,
        progress=update,
      )


def _fitted_prior(
  images: np.ndarray, augmentations: Sequence[str], seed: int
) -> GaussianImages | None:
  """Of varied images, as there are few; None where there are too few, or they are all the same."""
  if len(np.unique(images, axis=0)) < 3:
    return None
  if augmentations:
    drawn = np.random.default_rng(seed).integers(0, len(images), _PRIOR_DRAWS)
    images = augment(tf.constant(images[drawn]), augmentations, tf.constant([seed, 0])).numpy()
  source = hashlib.sha256(images.tobytes()).hexdigest()[:16]
  return GaussianImages(fit_gaussian_prior(images), weight=1.0, source=source)


def _typical(observation: Observation, clients: Sequence[str]) -> ClientObservation:
  """The client of the middle number of images."""
  ranked = sorted(map(observation.client, clients), key=lambda client: client.num_images)
  return ranked[len(ranked) // 2]
