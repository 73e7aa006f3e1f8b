"""The defence as the attacker repeats it on public images: its one simulation in the attacks.

An adaptive attacker knows the defence with all its settings, and not its keys (Kerckhoffs 1883). So
it can play the observed round with public images in place of the client's and noise of its own, and
try on these what works best.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attacks.adaptive.players import NO_EQUIPMENT, Equipment, build_player
from attacks.local_steps import LocalSteps, local_steps
from attacks.simulator import ClientSimulator
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning import ShadowNoise, estimate_batch_norm_statistics
from tff_shadow.models import graph_function
from tff_shadow.observations import ClientObservation, Observation, Truth, mean_update
from tff_shadow.shadow import build_region_map
from tff_shadow.shadow.sensitivity import gradient_and_derivatives, region_noise

_PROBES = 16


class SimulatedRound(NamedTuple):
  """A round that the attacker played itself.

  Attributes:
    observation: As the observed one, with other clients.
    truth: Per client.
    maps: Per client the region maps [B, H, W, 1] of the defence, which need not be those of the
      truth.
  """

  observation: Observation
  truth: dict[str, Truth]
  maps: dict[str, np.ndarray]

  @property
  def mean_map(self) -> np.ndarray:
    """[1, H, W, 1], what is known of the maps of other clients."""
    return np.mean(np.concatenate(list(self.maps.values())), axis=0, keepdims=True)


def simulate_round(
  observation: Observation,
  like: ClientObservation,
  public: Examples,
  *,
  num_clients: int,
  seed: int,
  equipment: Equipment = NO_EQUIPMENT,
  is_first: bool = True,
) -> SimulatedRound:
  """Plays the round of `observation` with clients like one of it, on public images.

  The clients are played exactly, all local steps, noise and what they send of BatchNorm. Several
  rounds played with the same seed have the same clients, with the same noise if the defence keeps
  it.

  Args:
    observation: The round.
    like: Whose numbers of images and steps the clients have, and whose weight.
    public: Images of the modality with labels and regions, none of them of an attacked client.
    num_clients: How many to play.
    seed: Decides images and noise, but for that of DP-SGD, which takes no key.
    equipment: With which it is played.
    is_first: Whether the clients first use their images in the order of `SimulatedRound.truth`; in
      later epochs, and in later ones of several rounds, each has an order of its own.

  Raises:
    UserError: If the defence is none that this attacker knows, or there are too few images.
  """
  player = build_player(observation, bool(like.update.non_trainable), equipment)
  needed = num_clients * like.num_images
  if len(public) < needed:
    raise UserError(f'{len(public)} public images are too few: {needed} are needed')
  chosen = np.random.default_rng(seed).permutation(len(public))[:needed]
  region_map = region_map_of(observation)
  truth, maps, keys, steps = {}, {}, {}, {}
  for index in range(num_clients):
    name = f'public_{index:02d}'
    own = public.take(chosen[index * like.num_images : (index + 1) * like.num_images])
    truth[name] = Truth(own.float_images(), own.labels, own.float_regions())
    maps[name] = region_map(truth[name])
    keys[name] = noise_key(observation, seed, index)
    steps[name] = simulated_steps(observation, like, seed, index, is_first)
  clients = [
    dataclasses.replace(like, client_id=name, update=update, dropped=False)
    for name, update in player.updates(truth, steps, keys).items()
  ]
  played = dataclasses.replace(observation, clients=tuple(clients), aggregate=mean_update(clients))
  return SimulatedRound(played, truth, maps)


def simulated_steps(
  observation: Observation, like: ClientObservation, seed: int, index: int, is_first: bool
) -> LocalSteps:
  """The local steps of a simulated client; see `simulate_round`."""
  rng = np.random.default_rng([seed, index, observation.round_num])
  return local_steps(like, observation.client_training).drawn(rng, keeps_first=is_first)


def noise_key(observation: Observation, seed: int, index: int) -> tuple[int, int]:
  """The key of the noise of a simulated client, the same in all rounds if the defence keeps it."""
  fresh = 0 if observation.defense.get('frozen') else observation.round_num
  state = np.random.SeedSequence([seed, index, fresh]).generate_state(2)
  return tuple(map(int, state.astype(np.int32)))


def region_map_of(observation: Observation) -> Callable[[Truth], np.ndarray]:
  """Gives the region maps [B, H, W, 1] of a client: of the defence, or the regions as they are.

  Raises:
    UserError: If the model has none of the defence's kind.
  """
  if observation.defense['name'] != 'shadow':
    return lambda truth: truth.regions
  noise = ShadowNoise.from_public_settings(observation.defense)
  if not noise.needs_shadow:
    return lambda truth: truth.regions
  model = ClientSimulator(observation).model
  keeps_statistics = observation.batch_norm_sharing == 'local'
  of_defense = build_region_map(noise.saliency, model)

  def maps_of(truth: Truth) -> np.ndarray:
    if keeps_statistics:
      # The client's shadow has those of its own images.
      estimate_batch_norm_statistics(model, truth.images)
    maps, _ = of_defense(*map(tf.constant, (truth.images, truth.labels, truth.regions)))
    return maps.numpy()

  return maps_of


class Sensitivity:
  """How much of the region each entry of a client's gradient carries, at the old weights."""

  def __init__(self, simulator: ClientSimulator):
    """Takes the model that is differentiated; traced once for each size of the images."""
    self._simulator = simulator
    self._squared = graph_function(self._sum_of_probes, simulator.model)

  def derivative(
    self, images: tf.Tensor, labels: tf.Tensor, direction: tf.Tensor
  ) -> list[tf.Tensor]:
    """How the gradient moves as the images [B, H, W, C] move along `direction`."""
    _, (derivative,) = gradient_and_derivatives(
      lambda x: self._simulator.loss(x, labels),
      self._simulator.model.trainable_variables,
      images,
      [direction],
    )
    return derivative

  def squared(
    self, images: np.ndarray, labels: np.ndarray, maps: np.ndarray, seed: int
  ) -> list[tf.Tensor]:
    """S_j^2 by Rademacher probes, as the defence estimates it.

    Args:
      images: [B, H, W, C].
      labels: int32 [B].
      maps: Region maps [B, H, W, 1].
      seed: Of the probes.

    Returns:
      One tensor per trainable variable.
    """
    keys = tf.random.experimental.stateless_split(tf.constant([seed, 1]), len(images))
    floats = (tf.constant(array, tf.float32) for array in (images, maps))
    return self._squared(*floats, tf.constant(labels), keys)

  def relative_deviations(
    self,
    defense: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray,
    *,
    seed: int = 0,
  ) -> list[np.ndarray]:
    """How the standard deviation of diagonal noise differs between the entries of a gradient.

    Args:
      defense: `Observation.defense`, of diagonal shape.
      images: [B, H, W, C], guesses of the client's.
      labels: int32 [B].
      maps: [B, H, W, 1], guesses of its region maps.
      seed: Of the probes.

    Returns:
      One array per trainable variable; their root mean square over all entries is 1.
    """
    squared = self.squared(images, labels, maps, seed)
    # As in the aggregator: variances in proportion to S_j, and a floor of equal ones.
    variances = [np.sqrt(tensor.numpy().astype(np.float64)) for tensor in squared]
    mean = np.mean(np.concatenate([array.ravel() for array in variances]))
    floor = defense['floor']
    if not mean > 0:
      return [np.ones(array.shape, np.float32) for array in variances]
    return [np.sqrt((1 - floor) * array / mean + floor).astype(np.float32) for array in variances]

  def _sum_of_probes(self, images, maps, labels, keys):
    def body(draw, *total):
      direction = region_noise(maps, keys, images.shape[-1], 'rademacher', draw, _PROBES)
      derivative = self.derivative(images, labels, direction)
      return draw + 1, *(a + tf.square(b) / _PROBES for a, b in zip(total, derivative, strict=True))

    zeros = [tf.zeros_like(variable) for variable in self._simulator.model.trainable_variables]
    _, *total = tf.while_loop(lambda draw, *_: draw < _PROBES, body, [tf.constant(0), *zeros])
    return total
