"""The covariance of noise that is the same whoever sends it, from clients that are played."""

import dataclasses

import numpy as np

from attacks.adaptive.players import Equipment, build_player
from attacks.adaptive.simulated_updates import SimulatedClients, flat
from attacks.noise_covariance import NoiseCovariance
from tff_shadow.observations import ClientObservation, Observation

# Of the energy, in place of what the defence has: the draws are then of its shaped part alone.
_NO_FLOOR = 1e-6


def has_public_covariance(observation: Observation) -> bool:
  """Whether whoever plays the defence knows the covariance of the noise on every update.

  Decoy noise is made of public images. That of diagonal and correlated noise depends on the
  client's own, and white noise has none that a squared error does not know.
  """
  return observation.defense.get('shape') == 'decoy'


def played_covariance(
  observation: Observation,
  like: ClientObservation,
  clients: SimulatedClients,
  equipment: Equipment,
  *,
  is_first: bool,
) -> NoiseCovariance | None:
  """Of the noise on the trainable entries of what a client sends.

  Args:
    observation: A round under a defence that `has_public_covariance`.
    like: Whose steps the clients take.
    clients: On each of them noise is drawn once, and all draws are kept in memory.
    equipment: With which the defence is played.
    is_first: See `simulate_round`.

  Returns:
    None if no noise was drawn.

  Raises:
    UserError: If the defence cannot be played.
  """
  floor = observation.defense['floor']
  shares_statistics = bool(like.update.non_trainable)
  clean, noised = (
    build_player(dataclasses.replace(observation, defense=defense), shares_statistics, equipment)
    for defense in ({'name': 'none'}, {**observation.defense, 'floor': _NO_FLOOR})
  )
  entries = sum(array.size for array in like.update.trainable)
  draws, variances = [], []
  for some in clients.in_round(observation, like, len(clients), is_first):
    plain = clean.updates(*some)
    for name, update in noised.updates(*some).items():
      noise = flat(update) - flat(plain[name])
      draws.append(noise[:, :entries])
      # Statistics have their share of the floor.
      variances.append(np.mean(np.square(noise, dtype=np.float64)))
  variance = floor / (1 - floor) * float(np.mean(variances))
  return NoiseCovariance.fitted(np.concatenate(draws), variance) if variance > 0 else None
