"""Which guarantee a run's defence has, from what is public of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tff_shadow.privacy.accounting import (
  Guarantee,
  Unproven,
  dp_fed_avg_guarantee,
  dp_sgd_guarantee,
  no_guarantee,
)


class Participation(NamedTuple):
  """How often data is used in a run.

  Attributes:
    rounds: Of training.
    clients_per_round: Drawn in each.
    num_clients: To draw from.
    uses: Local steps of a round that one image is in, at most; see `example_uses`.
  """

  rounds: int
  clients_per_round: int
  num_clients: int
  uses: int


def guarantee_of(
  defense: Mapping[str, Any], participation: Participation, delta: float
) -> Guarantee:
  """What may be stated formally of a run.

  Args:
    defense: `Observation.defense`.
    participation: How often its images are used.
    delta: In (0, 1).

  Raises:
    ValueError: If `delta` is out of range.
  """
  name = defense['name']
  multiplier = defense.get('noise_multiplier')
  if name == 'dp_fedavg' and multiplier:
    return dp_fed_avg_guarantee(
      multiplier,
      participation.clients_per_round,
      participation.num_clients,
      participation.rounds,
      delta,
    )
  if name == 'dp_sgd' and multiplier:
    return dp_sgd_guarantee(multiplier, participation.uses * participation.rounds, delta)
  return no_guarantee(_unproven(defense))


def _unproven(defense: Mapping[str, Any]) -> Unproven:
  name = defense['name']
  if name in ('none', 'published'):
    return name
  if name != 'shadow':
    return 'no clipping'
  # Noise in proportion to the update tells its norm; of a public shape and an absolute scale it
  # lacks the clipping that would bound what one update can change.
  if defense['shape'] in ('isotropic', 'decoy') and defense['strength']['kind'] == 'scale':
    return 'no clipping'
  if defense['saliency']['kind'] not in ('given', 'uniform'):
    return 'private region'
  return 'image noise' if defense['propagation'] == 'images' else 'private noise shape'
