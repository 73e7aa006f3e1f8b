"""Which of the images that a server already has a client trained on.

Nothing is reconstructed. Each known image is tried as the client's own: what it would have sent is
computed without noise, and the observed update is the likelier the nearer that comes to it, in
units of the noise. For normal noise whose covariance is known no other test tells two images apart
more often (Neyman and Pearson 1933). It needs far less of an update than a picture does: a few
nats, where a reconstruction still looks like the mean image.

How much noise there is follows from the update itself. Where noise is as loud as an update is long,
how loud it is tells the candidates apart too.
"""

import dataclasses
from collections.abc import Callable, Sequence

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
from tff_shadow.observations import ClientObservation, Observation, Truth

# Known images whose updates are computed at a time; fewer for large models.
_CHUNK = 64
# Of the squared distance of an update that fits exactly, in units of its squared norm.
_ROUNDING = 1e-14


def log_likelihoods(
  observation: Observation,
  clients: Sequence[ClientObservation],
  known: Sequence[Truth],
  played: SimulatedClients,
  equipment: Equipment,
  covariance: NoiseCovariance | None = None,
  *,
  is_first: bool = True,
  progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
  """Of what clients sent in a round, for each known image as their only one.

  Args:
    observation: The round.
    clients: Of one image each, which took the same local steps on it.
    known: M images with their labels and regions, one each.
    played: Clients like these, of public images, from which the noise is known; fewer are played
      for large models.
    equipment: With which the defence is played.
    covariance: Of the noise on the weights, where that is the same for all clients.
    is_first: See `simulated_defense.simulate_round`.
    progress: Called with how many of `known` are done.

  Returns:
    float64 [clients, M], up to a constant of each client; NaN for one whose update is not finite.

  Raises:
    UserError: If the defence cannot be played.
  """
  like = clients[0]
  noiseless = dataclasses.replace(observation, defense=without_noise(observation.defense))
  player = build_player(noiseless, bool(like.update.non_trainable))
  sent = np.concatenate([flat(own.update) for own in clients])
  entries = sent.shape[1]
  noises, norms = np.zeros((0, entries), np.float32), np.zeros(0)
  if noiseless.defense != observation.defense:
    noises, norms = _played_noise(observation, like, player, played, equipment, is_first)
  whiten = _whitening(noises, covariance)
  sent = whiten(sent).astype(np.float64)
  squares = np.sum(np.square(sent), axis=1)[:, None]
  distances, known_norms = [], []
  chunk = min(_CHUNK, max(1, MAX_BASIS_ENTRIES // 8 // entries))
  steps = simulated_steps(observation, like, 0, 0, is_first)
  for first in range(0, len(known), chunk):
    some = {str(first + k): own for k, own in enumerate(known[first : first + chunk])}
    keys = {name: noise_key(observation, 0, int(name)) for name in some}
    updates = player.updates(some, dict.fromkeys(some, steps), keys)
    rows = np.concatenate([flat(update) for update in updates.values()])
    known_norms.append(log_norms(rows))
    rows = whiten(rows).astype(np.float64)
    distances.append(squares - 2 * sent @ rows.T + np.sum(np.square(rows), axis=1))
    progress(min(first + chunk, len(known)))
  found = np.log(np.maximum(np.concatenate(distances, axis=1), _ROUNDING * squares))
  # By the deviation of the noise that explains the rest best the density is a power of that.
  likelihoods = -entries / 2 * found
  if noises.any():
    deviations = (found - np.log(entries)) / 2
    likelihoods -= _unlikely(deviations, noises, norms, np.concatenate(known_norms), whiten)
  return likelihoods


def _played_noise(observation, like, player, played, equipment, is_first):
  """Of clients that are played: the noise on each [N, d], and the logarithms [N] of the norms."""
  defended = build_player(observation, bool(like.update.non_trainable), equipment)
  entries = flat(like.update).shape[1]
  count = min(len(played), max(3, MAX_BASIS_ENTRIES // entries))
  noises, norms = [], []
  for some in played.in_round(observation, like, count, is_first):
    clean, noised = player.updates(*some), defended.updates(*some)
    for name, update in noised.items():
      own = flat(clean[name])
      noises.append(flat(update) - own)
      norms.append(log_norms(own))
  return np.concatenate(noises), np.concatenate(norms)


def _whitening(
  noises: np.ndarray, covariance: NoiseCovariance | None
) -> Callable[[np.ndarray], np.ndarray]:
  """From rows [N, d] to these in units in which the noise is as strong in all directions."""
  if covariance is not None:
    directions, shares = covariance.directions, 1 - covariance.ratios**-0.5
    weights = len(directions)

    def whiten(rows: np.ndarray) -> np.ndarray:
      # Statistics come after the weights.
      own = rows[:, :weights]
      own = own - (own @ directions * shares) @ directions.T
      return np.concatenate([own, rows[:, weights:]], axis=1)

    return whiten
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
