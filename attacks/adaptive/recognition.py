"""Which of the images that a server already has a client trained on.

Nothing is reconstructed. Each known image is tried as the client's own: what it would have sent is
computed without noise, and the observed update is the likelier the nearer that comes to it, in
units of the noise. For normal noise whose covariance is known no other test tells two images apart
more often (Neyman and Pearson 1933). It needs far less of an update than a picture does: a few
nats, where a reconstruction still looks like the mean image.

How much noise there is follows from the update itself. Where noise is as loud as an update is long,
how loud it is tells the candidates apart too.

Of a client of several images the others are noise with a covariance of its own: that of what public
images add, and of what the known ones add, for the others may be among those. (So an image is not
taken for another that adds alike: without noise, in one step, this is the least-squares solution.)
What one image adds is taken to be what it adds to the first step, beside public images, as often as
it is used. That is exact for one step without BatchNorm; the rest, as played clients show it, is
noise too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from attacks.adaptive.players import Equipment, build_player, without_noise
from attacks.adaptive.simulated_defense import noise_key, simulated_steps
from attacks.adaptive.simulated_updates import (
  MAX_BASIS_ENTRIES,
  SimulatedClients,
  explained,
  flat,
  inverse_deviations,
  log_norms,
)
from attacks.noise_covariance import NoiseCovariance
from tff_shadow.models import model_from_config, training_batch_norm_layers
from tff_shadow.observations import ClientObservation, Observation, Truth

# Known images whose updates are computed at a time; fewer for large models.
_CHUNK = 64
# Other images of public clients beside which an image is tried in a step that normalises them
# together; fewer in large batches.
_COMPANIES = 4
_MOST_TRIED_IMAGES = 2**16
# Of the squared distance of an update that fits exactly, in units of its squared norm.
_ROUNDING = 1e-14
# Of what other images add, in the directions in which they are not told from noise.
_LEAST_VARIANCE = 1e-3


def log_likelihoods(
  observation: Observation,
  clients: Sequence[ClientObservation],
  known: Sequence[Truth],
  played: SimulatedClients,
  equipment: Equipment,
  covariance: NoiseCovariance | None = None,
  *,
  is_first: bool = True,
) -> np.ndarray:
  """Of what clients sent in a round, for each known image as one of theirs.

  Args:
    observation: The round.
    clients: Which took the same local steps on as many images.
    known: M images with their labels and regions, one each.
    played: Clients like these, of public images, from which the noise is known; fewer are played
      for large models.
    equipment: With which the defence is played.
    covariance: Of the noise on the weights, where that is the same for all clients.
    is_first: See `simulated_defense.simulate_round`.

  Returns:
    float64 [clients, M], up to a constant of each client; NaN for one whose update is not finite.

  Raises:
    UserError: If the defence cannot be played.
  """
  sent = np.concatenate([flat(own.update) for own in clients])
  entries = sent.shape[1]
  single = _Single(observation, clients[0], played, is_first, len(known))
  noises, others, norms = single.played(equipment)
  added: Iterable[np.ndarray] = single.added(known)
  mean = np.zeros(entries, np.float32)
  if covariance is not None:
    # Statistics come after the weights.
    missing = entries - len(covariance.directions)
    directions = np.pad(covariance.directions, ((0, missing), (0, 0)))
    covariance = covariance._replace(directions=directions)
  if clients[0].num_images > 1:
    mean = others.mean(axis=0)
    among = others[:0]
    if len(known) * entries <= MAX_BASIS_ENTRIES:
      added = [np.concatenate([*added])]
      # A client has each of them as often.
      share = (clients[0].num_images - 1) / len(known)
      among = np.sqrt(np.float32(share)) * (added[0] - added[0].mean(axis=0))
    covariance = _among_others(others - mean, among, noises, covariance)
  whiten = _whitening(noises, covariance)
  sent = whiten(sent - mean).astype(np.float64)
  squares = np.sum(np.square(sent), axis=1)[:, None]
  distances, known_norms = [], []
  for rows in added:
    known_norms.append(log_norms(rows))
    rows = whiten(rows).astype(np.float64)
    distances.append(squares - 2 * sent @ rows.T + np.sum(np.square(rows), axis=1))
  found = np.log(np.maximum(np.concatenate(distances, axis=1), _ROUNDING * squares))
  # By the deviation of the noise that explains the rest best the density is a power of that.
  likelihoods = -entries / 2 * found
  if noises.any() and clients[0].num_images == 1:
    deviations = (found - np.log(entries)) / 2
    likelihoods -= _unlikely(deviations, noises, norms, np.concatenate(known_norms), whiten)
  return likelihoods


class _Single:
  """What single images add to what clients of a kind send, beside others in a step."""

  def __init__(
    self,
    observation: Observation,
    like: ClientObservation,
    played: SimulatedClients,
    is_first: bool,
    count: int,
  ):
    """Of clients like one of the round; `count` images are to be tried."""
    self._observation, self._like, self._played = observation, like, played
    self._is_first = is_first
    noiseless = dataclasses.replace(observation, defense=without_noise(observation.defense))
    self._has_noise = noiseless.defense != observation.defense
    self._player = build_player(noiseless, bool(like.update.non_trainable))
    self._entries = flat(like.update).shape[1]
    size = min(like.images_per_step(observation.client_training), like.num_images)
    batch = like
    if like.num_images > 1:
      # As often as an image is used.
      steps = max(1, round(like.num_steps * size / like.num_images))
      batch = dataclasses.replace(
        like, num_images=size, num_steps=steps, batch_size=size, weight=float(size)
      )
    self._steps = simulated_steps(observation, batch, 0, 0, is_first)
    most = 1  # Without BatchNorm an image adds the same beside any others.
    if size > 1 and training_batch_norm_layers(model_from_config(observation.model_config)):
      most = _COMPANIES
    companies = max(1, min(most, _MOST_TRIED_IMAGES // (size * count)))
    self._companies = [
      own.some(slice(1, size)) for some in played.chunks(companies) for own in some.values()
    ]

  def added(self, known: Sequence[Truth]) -> Iterator[np.ndarray]:
    """Rows [n, d] for one known image after another, up to a constant."""
    chunk = min(_CHUNK, max(1, MAX_BASIS_ENTRIES // 8 // self._entries))
    for first in range(0, len(known), chunk):
      images = known[first : first + chunk]
      yield np.mean([self._batches(images, company) for company in self._companies], axis=0)

  def _batches(self, images: Sequence[Truth], company: Truth) -> np.ndarray:
    """What clients send that have an image each and the same others: rows [n, d]."""
    clients = {str(k): own.beside(company) for k, own in enumerate(images)}
    keys = {name: noise_key(self._observation, 0, int(name)) for name in clients}
    updates = self._player.updates(clients, dict.fromkeys(clients, self._steps), keys)
    return np.concatenate([flat(update) for update in updates.values()])

  def played(self, equipment: Equipment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of played clients the noise, what all images but the first add, and norms without noise.

    Returns:
      [N, d], [N, d] and the logarithms [N]; of no clients where nothing is drawn, and no rows of
      others where there are none.
    """
    noises = np.zeros((0, self._entries), np.float32)
    has_others = self._like.num_images > 1
    if not (self._has_noise or has_others):
      return noises, noises, np.zeros(0)
    defended = None
    if self._has_noise:
      shares = bool(self._like.update.non_trainable)
      defended = build_player(self._observation, shares, equipment)
    count = min(len(self._played), max(3, MAX_BASIS_ENTRIES // self._entries))
    noises, others, norms = [noises], [noises], []
    for some in self._played.in_round(self._observation, self._like, count, self._is_first):
      clean = {name: flat(update) for name, update in self._player.updates(*some).items()}
      norms += [log_norms(own) for own in clean.values()]
      if defended is not None:
        noised = defended.updates(*some)
        noises += [flat(noised[name]) - own for name, own in clean.items()]
      if has_others:
        truths, *_ = some
        first = [own.alone(0) for own in truths.values()]
        added = np.concatenate(list(self.added(first)))
        others.append(np.concatenate(list(clean.values())) - added)
    return np.concatenate(noises), np.concatenate(others), np.concatenate(norms)


def _among_others(
  others: np.ndarray, among: np.ndarray, noises: np.ndarray, covariance: NoiseCovariance | None
) -> NoiseCovariance:
  """Of noise and what other images of a client add together.

  Args:
    others: [N, d], of played clients, of mean zero.
    among: [M, d], what one known image adds, by the square root of how often a client has it; M may
      be 0.
    noises: [n, d]; n may be 0.
    covariance: Of the noise, where that is known.
  """
  variance = _LEAST_VARIANCE * float(np.mean(np.square(others)))
  shaped = others[:0]
  if noises.any():
    variance += float(np.mean(np.square(_whitening(noises, covariance)(noises))))
  if covariance is not None:
    shaped = (covariance.directions * np.sqrt(variance * (covariance.ratios - 1))).T
  parts = [others / np.float32(np.sqrt(len(others))), among, shaped]
  draws = np.concatenate(parts)
  # The mean of their squares is what counts.
  draws *= np.float32(np.sqrt(len(draws)))
  return NoiseCovariance.fitted(draws, variance, most=len(draws))


def _whitening(
  noises: np.ndarray, covariance: NoiseCovariance | None
) -> Callable[[np.ndarray], np.ndarray]:
  """From rows [N, d] to these in units in which the noise is as strong in all directions."""
  if covariance is not None:
    directions, shares = covariance.directions, 1 - covariance.ratios**-0.5
    return lambda rows: rows - (rows @ directions * shares) @ directions.T
  scale = np.ones(noises.shape[1], np.float32)
  if noises.any():
    scale = inverse_deviations(noises, log_norms(noises))
  return lambda rows: rows * scale


def _unlikely(deviations, noises, norms, known_norms, whiten) -> np.ndarray | float:
  """By how much [clients, M] a client's noise would be louder or softer than an image makes it.

  Args:
    deviations: [clients, M], logarithms of what the noise would be.
    noises: [N, d], played.
    norms: [N], logarithms of the norms of the updates without it.
    known_norms: [M], likewise of what the known images give.
    whiten: See `_whitening`.
  """
  loudness = log_norms(whiten(noises)) - np.log(noises.shape[1]) / 2
  expected, errors = explained(np.concatenate([norms, known_norms]), loudness)
  if not expected.shape[1]:
    return 0.0
  variance = max(float(np.mean(np.square(errors))), 1 / (2 * noises.shape[1]))
  return np.square(deviations - expected[len(norms) :, 0]) / (2 * variance)
