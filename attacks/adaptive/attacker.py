"""An attacker who knows the defence and has public images of the modality."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attacks.adaptive.calibrated import (
  Trial,
  attack_calibrated,
  calibrate,
  candidates_for,
  informed_solvers,
)
from attacks.adaptive.denoiser import DenoiserSettings, RegionDenoiser
from attacks.adaptive.learned_inversion import (
  InversionSettings,
  LabelReader,
  LearnedInversion,
)
from attacks.adaptive.played_noise import has_public_covariance, played_covariance
from attacks.adaptive.players import AttackersShadow, Equipment, example_clip_norm
from attacks.adaptive.recognition import log_likelihoods
from attacks.adaptive.simulated_defense import simulate_round
from attacks.adaptive.simulated_updates import MAX_BASIS_ENTRIES, SimulatedClients
from attacks.config import AttackConfig
from attacks.local_steps import local_steps
from attacks.noise_covariance import NoiseCovariance
from attacks.priors import GaussianImages
from attacks.public_prior import fitted_prior
from attacks.results import TargetResult
from attacks.scoring.identification import likelihood_ranks, original_places
from attacks.shared_solvers import SharedSolvers
from attacks.targets import Targets
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning.decoys import decoy_pool
from tff_shadow.observations import ClientObservation, Observation, Truth, WeightArrays

# Of the noise, for its covariance.
_NOISE_DRAWS = 400
# Images of the clients that are played for the noise behind which known images are sought.
_MOST_PLAYED_IMAGES = 2**15
_LEAST_DRAWS = 16
# Settings are chosen for so many kinds of clients; each takes as long as the first.
_MAX_KINDS = 3

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


class Calibration(NamedTuple):
  """How clients of one kind are attacked: with as many images and steps.

  Attributes:
    trial: The settings that came closest on public images.
    num_played: Clients of public images on which they were tried.
    like: A client of the kind.
    others: Ids of clients of other kinds, attacked with these settings because no own were chosen.
    reads_labels: Whether labels are told apart by updates as a whole.
  """

  trial: Trial
  num_played: int
  like: ClientObservation
  others: tuple[str, ...] = ()
  reads_labels: bool = False

  def facts(self) -> list[str]:
    """What the attacker does with clients of the kind, in sentences."""
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
    labels = []
    if self.reads_labels:
      labels.append(
        'It infers labels by how updates of each differ, which was right more often on the clients'
        ' that it has played than the gradient of the last layer.'
      )
    return [
      f'It has played the round itself with {self.num_played} clients of public images, and'
      f' takes the settings that came closest there: {self.trial.candidate}.',
      denoised,
      learned,
      *labels,
    ]


class Recognition(NamedTuple):
  """How well updates pick images out of known ones; see `identification.identify_by_likelihood`.

  Attributes:
    ranks: int [N, K], place of each client's image by each client's update.
    owners: K clients.
    choices: Images to pick from.
  """

  ranks: np.ndarray
  owners: list[int]
  choices: int


class AdaptiveAttack(NamedTuple):
  """What one attacker made of the clients.

  Attributes:
    calibrations: One for each kind of clients that it has played.
    results: One for each attacked client.
  """

  calibrations: tuple[Calibration, ...]
  results: list[TargetResult]

  @property
  def uncalibrated(self) -> tuple[str, ...]:
    """Ids of clients for whose kind no settings were chosen."""
    return tuple(name for own in self.calibrations for name in own.others)

  def knows(self, observation: Observation) -> tuple[str, ...]:
    """What the attacker of `observation` is assumed to know, one fact a sentence."""
    regions = 'It is told the region maps of the clients.'
    if not self.calibrations[0].trial.knows_region:
      regions = 'It knows the mean region map of public images, and not those of the clients.'
    facts = []
    for own in self.calibrations:
      kind = _in_words(own.like)
      differ = len(self.calibrations) > 1 or own.others
      facts += [f'Clients of {kind}: {fact}' if differ else fact for fact in own.facts()]
      if own.others:
        facts.append(
          f'It has not played clients like {named(own.others)}: it attacks them with the best'
          f' settings for clients of {kind} that do without a network for updates.'
        )
    published = observation.defense['name'] == 'published'
    clip_norm = example_clip_norm(observation.defense)
    return (
      'It is an honest-but-curious server that knows the defence with all its settings, and not its'
      ' keys.',
      *facts,
      regions,
      *(
        [f'It clips the gradient of each image that it tries at {clip_norm}.'] if clip_norm else []
      ),
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
    batch_config: AttackConfig | None = None,
    shadow: AttackersShadow | None = None,
    watch: Watch = unwatched,
    directory: pathlib.Path | None = None,
  ):
    """Attacks nothing yet.

    Args:
      public: Images of the modality with labels and regions, of no attacked client.
      config: All settings that are not tried; the seed decides everything.
      effort: How much it makes of the public images.
      batch_config: Instead of `config` for clients with several images; of the same seed.
      shadow: With which the published defence is played. The decoys of decoy noise are those of
        the public images.
      watch: Shows progress.
      directory: Where trained networks are kept; None to keep none.
    """
    self._public = public
    order = np.random.default_rng(config.seed).permutation(len(public))
    self._played, self._learned = public.take(order[::2]), public.take(order[1::2])
    self._config = config
    self._batch_config = batch_config or config
    self._effort = effort
    self._equipment = Equipment(shadow, decoy_pool(public))
    self._watch = watch
    self._directory = directory
    self._denoiser: RegionDenoiser | None = None
    # Of the rounds that were attacked last, by the kind of their clients.
    self._noise_of: Sequence[Observation] = ()
    self._noise: dict[Hashable, list[NoiseCovariance]] = {}

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

    Settings are chosen for each kind of clients, those with as many images and steps; for the
    `_MAX_KINDS` commonest, where there are more. Others are attacked with those of the nearest one.

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
    shared = informed_solvers(observations, self._config.dtype, shared)
    groups = _groups(observations[0], clients, len(self._played))
    made = []
    for group in groups:
      own = name if len(groups) == 1 else f'{name}, {_in_words(group.like)}'
      made.append(self._attack_group(observations, group, told_maps, shared, own))
    together = []
    for parts in zip(*made, strict=True):
      results = {result.target: result for part in parts for result in part.results}
      calibrations = tuple(own for part in parts for own in part.calibrations)
      ordered = [results[client] for client in dict.fromkeys(clients)]
      together.append(AdaptiveAttack(calibrations, ordered))
    return together

  def _attack_group(
    self,
    observations: Sequence[Observation],
    group: '_Group',
    told_maps: Mapping[str, np.ndarray] | None,
    shared: SharedSolvers,
    name: str,
  ) -> list[AdaptiveAttack]:
    """See `attack`."""
    like = group.like
    config = self._config if like.num_images == 1 else self._batch_config
    config = dataclasses.replace(config, gaussian_images=self._prior)
    denoiser = self._trained_denoiser()
    count = min(self._effort.clients, len(self._played) // like.num_images)
    # The same clients in each round.
    simulated = [
      simulate_round(
        seen,
        like,
        self._played,
        num_clients=count,
        seed=config.seed,
        equipment=self._equipment,
        is_first=not view,
      )
      for view, seen in enumerate(observations)
    ]
    learned = self._trained_inversion(observations, like, name, shared)
    covariances = self._covariances(observations, like, name)
    candidates = candidates_for(observations[0], config)
    total = len(candidates)
    with self._watch(f'{name}: {total} settings on public images', total) as update:
      trials = calibrate(
        simulated,
        config,
        denoiser,
        learned,
        candidates,
        progress=lambda done, best: update(done, f'best {best.region_psnr:.1f} dB'),
        shared=shared,
        covariances=covariances,
      )
    everyone = (*group.clients, *group.others)
    maps_known = [dict.fromkeys(everyone, simulated[0].mean_map)]
    if told_maps is not None:
      maps_known.append({client: told_maps[client] for client in everyone})
    # Inversions of clients of the kind, and of others.
    earlier: tuple[dict, dict] = ({}, {})
    made = []
    with self._watch(name, len(maps_known)) as update:
      for told, maps in enumerate(maps_known):
        fitting = [trial for trial in trials if trial.knows_region == bool(told)]
        trial, results = fitting[0], []
        # What was learned of clients of one kind says nothing of another.
        unlearned = next(trial for trial in fitting if not trial.learned_share)
        for chosen, network, names, made_before in (
          (trial, learned, group.clients, earlier[0]),
          (unlearned, None, group.others, earlier[1]),
        ):
          if names:
            own = {client: maps[client] for client in names}
            results += attack_calibrated(
              observations,
              chosen,
              config,
              denoiser,
              own,
              network,
              made_before,
              shared,
              covariances,
            )
        reads_labels = learned is not None and learned.reads_labels
        calibration = Calibration(trial, count, like, group.others, reads_labels)
        made.append(AdaptiveAttack((calibration,), results))
        update(told + 1, str(trial.candidate))
    return made

  def recognize(
    self,
    observations: Sequence[Observation],
    clients: Sequence[str],
    truth: Mapping[str, Truth],
    *,
    name: str = 'known images',
  ) -> Recognition:
    """Picks the images of each client out of all of these and the public ones, by its update.

    Args:
      observations: The rounds, taken together; the clients trained on the same images in each.
      clients: Ids.
      truth: Of these clients: images that the attacker has, and does not know whose they are.
      name: What progress is shown under.

    Raises:
      UserError: If the defence cannot be played.
    """
    owners = [place for place, client in enumerate(clients) for _ in truth[client].labels]
    public = Truth(self._public.float_images(), self._public.labels, self._public.float_regions())
    everything = [*(truth[client] for client in clients), public]
    known = [own.alone(image) for own in everything for image in range(len(own.labels))]
    images = [one.images[0] for one in known]
    kept, own = original_places(images[: len(owners)], images[len(owners) :])
    likelihoods = self._log_likelihoods(observations, clients, [known[k] for k in kept], name)
    return Recognition(likelihood_ranks(likelihoods, own, owners), owners, len(kept))

  def _log_likelihoods(
    self,
    observations: Sequence[Observation],
    clients: Sequence[str],
    known: Sequence[Truth],
    name: str,
  ) -> np.ndarray:
    """[N, M], of what clients sent in all rounds, up to a constant of each client."""
    kinds: dict[Hashable, list[int]] = {}
    for place, client in enumerate(clients):
      own = observations[0].client(client)
      steps = local_steps(own, observations[0].client_training)
      kinds.setdefault((own.num_images, steps), []).append(place)
    found = np.zeros((len(clients), len(known)))
    with self._watch(name, len(kinds) * len(observations)) as update:
      for count, ((num_images, _), places) in enumerate(kinds.items()):
        like = observations[0].client(clients[places[0]])
        covariances = self._covariances(observations, like, name)
        draws = max(_LEAST_DRAWS, min(_NOISE_DRAWS, _MOST_PLAYED_IMAGES // num_images))
        played = SimulatedClients(
          self._learned, like, draws, self._effort.augmentations, self._config.seed
        )
        for view, seen in enumerate(observations):
          found[places] += log_likelihoods(
            seen,
            [seen.client(clients[place]) for place in places],
            known,
            played,
            self._equipment,
            covariances[view] if covariances else None,
            is_first=not view,
          )
          update(count * len(observations) + view + 1, '')
    return found

  @functools.cached_property
  def _prior(self) -> GaussianImages | None:
    return fitted_prior(self._learned.float_images(), self._effort.augmentations, self._config.seed)

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

  def _covariances(
    self, observations: Sequence[Observation], like: ClientObservation, name: str
  ) -> list[NoiseCovariance]:
    """Of the noise in each round; none where it is not the same for all clients."""
    if not has_public_covariance(observations[0]):
      return []
    if [*map(id, observations)] != [*map(id, self._noise_of)]:
      self._noise_of, self._noise = list(observations), {}
    kind = (like.num_images, local_steps(like, observations[0].client_training))
    if kind not in self._noise:
      self._noise[kind] = self._played_covariances(observations, like, name)
    return self._noise[kind]

  def _played_covariances(
    self, observations: Sequence[Observation], like: ClientObservation, name: str
  ) -> list[NoiseCovariance]:
    """See `_covariances`."""
    entries = sum(array.size for array in like.update.trainable) * len(observations)
    count = max(3, min(_NOISE_DRAWS, MAX_BASIS_ENTRIES // entries))
    clients = SimulatedClients(
      self._learned, like, count, self._effort.augmentations, self._config.seed
    )
    found = []
    with self._watch(f'{name}: covariance of the noise', len(observations)) as update:
      for view, seen in enumerate(observations):
        own = played_covariance(seen, like, clients, self._equipment, is_first=not view)
        if own is None:
          return []
        found.append(own)
        update(view + 1, f'{len(own.ratios)} directions')
    return found

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
    # The rule that the attacked clients' labels are inferred by, unless a better one is learned.
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


class _Group(NamedTuple):
  """Clients that are attacked with the same settings.

  Attributes:
    like: Whose kind the settings are chosen for.
    clients: Ids of all of this kind.
    others: Ids of clients of kinds near to it.
  """

  like: ClientObservation
  clients: tuple[str, ...]
  others: tuple[str, ...]


def _groups(observation: Observation, clients: Sequence[str], most_images: int) -> list[_Group]:
  """The commonest kinds of clients, and with each the clients whose own is none of them.

  Args:
    observation: The first round.
    clients: Ids.
    most_images: A kind with more cannot be played.

  Raises:
    UserError: If that is all of them.
  """
  kinds: dict[Hashable, list[str]] = {}
  for name in dict.fromkeys(clients):
    client = observation.client(name)
    kind = (client.num_images, local_steps(client, observation.client_training))
    kinds.setdefault(kind, []).append(name)
  playable = [own for (images, _), own in kinds.items() if images <= most_images]
  if not playable:
    raise UserError(
      f'{most_images} public images to play clients with are too few for any of them: they have'
      f' {min(images for images, _ in kinds)} or more'
    )
  chosen = sorted(playable, key=len, reverse=True)[:_MAX_KINDS]
  likes = [_typical(observation, own) for own in chosen]
  others: list[list[str]] = [[] for _ in chosen]
  for own in kinds.values():
    if own not in chosen:
      client = observation.client(own[0])
      nearest = min(range(len(likes)), key=lambda k, client=client: _distance(client, likes[k]))
      others[nearest] += own
  return [_Group(*own) for own in zip(likes, map(tuple, chosen), map(tuple, others), strict=True)]


def _distance(one: ClientObservation, other: ClientObservation) -> float:
  """By what factors the numbers of images and steps differ."""
  numbers = [(own.num_images, own.num_steps) for own in (one, other)]
  return float(np.abs(np.diff(np.log(np.maximum(numbers, 1)), axis=0)).sum())


def _in_words(client: ClientObservation) -> str:
  images = '1 image' if client.num_images == 1 else f'{client.num_images} images'
  return f'{images} in {client.num_steps} step{"s" * (client.num_steps != 1)}'


def named(clients: Sequence[str]) -> str:
  """The first three of them, and how many more there are."""
  shown = ', '.join(clients[:3])
  return shown if len(clients) <= 3 else f'{shown} and {len(clients) - 3} more clients'


def _typical(observation: Observation, clients: Sequence[str]) -> ClientObservation:
  """One of clients of a kind."""
  return observation.client(clients[len(clients) // 2])
