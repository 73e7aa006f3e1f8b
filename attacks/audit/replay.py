"""Rounds as they would have been without the defence, at the same weights and on the same images.

An audit compares with these: what a defence takes from the attacker, and whether the attack works
at all. They are computed from the truth, which only scoring and this may open.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from attacks.adaptive.players import Player, build_player
from attacks.local_steps import local_steps
from tff_shadow.observations import ClientObservation, Observation, Truth, mean_update

_NO_KEY = (0, 0)


def without_defense(
  observation: Observation, truth: Mapping[str, Truth], clients: Sequence[str]
) -> Observation:
  """The round with what `clients` would have sent if nothing had been done to it.

  Of clients that went through their images several times one possible order is taken.
  """
  player = _player(observation)
  replayed = [
    _replayed(observation, player, observation.client(name), truth[name]) for name in clients
  ]
  return _round_of(observation, replayed)


def single_images(
  observation: Observation, truth: Mapping[str, Truth], clients: Sequence[str]
) -> tuple[Observation, dict[str, Truth]]:
  """The positive control: each client takes one undefended step on the first of its images.

  An attack that sees nothing here sees nothing anywhere, so that nothing follows from it.

  Returns:
    The round, and its truth.
  """
  player = _player(observation)
  replayed, shown = [], {}
  for name in clients:
    shown[name] = truth[name].alone(0)
    like = dataclasses.replace(
      observation.client(name), num_images=1, num_steps=1, batch_size=1, weight=1.0
    )
    replayed.append(_replayed(observation, player, like, shown[name]))
  return _round_of(observation, replayed), shown


def is_single_image_round(observation: Observation, clients: Sequence[str]) -> bool:
  """Whether all of `clients` sent one step on one image, so that the round is its own control."""
  return all(
    (client.num_images, client.num_steps) == (1, 1) for client in map(observation.client, clients)
  )


def _round_of(observation: Observation, clients: Sequence[ClientObservation]) -> Observation:
  return dataclasses.replace(
    observation,
    clients=tuple(clients),
    aggregate=mean_update(clients),
    defense={'name': 'none'},
  )


def _replayed(
  observation: Observation, player: Player, like: ClientObservation, own: Truth
) -> ClientObservation:
  steps = local_steps(like, observation.client_training)
  return dataclasses.replace(like, update=player.update(own, steps, _NO_KEY), dropped=False)


def _player(observation: Observation) -> Player:
  undefended = dataclasses.replace(observation, defense={'name': 'none'})
  shares = any(client.update.non_trainable for client in observation.clients)
  return build_player(undefended, shares)
