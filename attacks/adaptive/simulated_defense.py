"""The defence as the attacker repeats it on public images: its one simulation in the attacks.

An adaptive attacker knows the defence with all its settings, and not its keys (Kerckhoffs 1883). So
it can play the observed round with public images in place of the client's and noise of its own, and
try on these what works best.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attacks.local_steps import LocalSteps, local_steps
from attacks.simulator import ClientSimulator
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.aggregators.shadow_noise import noised_update
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.observations import ClientObservation, Observation, Truth, WeightArrays
from tff_shadow.shadow import SaliencyConfig, build_region_map
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
) -> SimulatedRound:
  """Plays the round of `observation` with clients like one of it, on public images.

  Local trainings of several steps are simulated exactly; what noise through them would be is taken
  at the old weights.

  Args:
    observation: The round.
    like: Whose numbers of images and steps the clients have.
    public: Images of the modality with labels and regions, none of them of an attacked client.
    num_clients: How many to play.
    seed: Decides images and noise.

  Raises:
    UserError: If the defence is none that this attacker knows, the clients share BatchNorm
      statistics, or there are too few images.
  """
  defense = observation.defense
  if defense['name'] not in ('none', 'shadow'):
    raise UserError(f'observation: there is no simulation of the defence {defense["name"]!r}')
  if like.update.non_trainable:
    raise UserError('observation: clients that share BatchNorm statistics cannot be simulated')
  needed = num_clients * like.num_images
  if len(public) < needed:
    raise UserError(f'{len(public)} public images are too few: {needed} are needed')
  chosen = np.random.default_rng(seed).permutation(len(public))[:needed]
  simulator = ClientSimulator(observation)
  sensitivity = Sensitivity(simulator)
  steps = local_steps(like, observation.client_training)
  clients, truth, maps = [], {}, {}
  for index in range(num_clients):
    name = f'public_{index:02d}'
    own = public.take(chosen[index * like.num_images : (index + 1) * like.num_images])
    truth[name] = Truth(own.float_images(), own.labels, own.float_regions())
    play = _Play(simulator, sensitivity, defense, truth[name], (seed, index))
    maps[name] = play.maps
    update = play.update(steps, like.num_steps)
    clients.append(
      dataclasses.replace(like, client_id=name, update=WeightArrays(tuple(update)), dropped=False)
    )
  updates = (client.update.trainable for client in clients)
  mean = [np.mean(arrays, axis=0) for arrays in zip(*updates, strict=True)]
  played = dataclasses.replace(
    observation, clients=tuple(clients), aggregate=WeightArrays(tuple(mean))
  )
  return SimulatedRound(played, truth, maps)


class Sensitivity:
  """How much of the region each entry of a client's gradient carries, at the old weights."""

  def __init__(self, simulator: ClientSimulator):
    """Takes the model that is differentiated; traced once for each size of the images."""
    self._simulator = simulator
    self._squared = tf.function(self._sum_of_probes)

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


class _Play:
  """One client of a simulated round."""

  def __init__(self, simulator, sensitivity, defense, truth, key: tuple[int, int]):
    self._simulator = simulator
    self._sensitivity = sensitivity
    self._defense = defense
    self._truth = truth
    self._key = tf.constant(key, tf.int32)
    self.maps = self._region_maps()

  def update(self, steps: LocalSteps, num_steps: int) -> list[np.ndarray]:
    """What the client sends: trained minus initial weights."""
    defense, images = self._defense, tf.constant(self._truth.images)
    in_images = defense.get('propagation') == 'images'
    if in_images:
      images += self._noise_in_images()
    scale = self._simulator.update_over_gradient(num_steps)
    gradient = self._simulator.mean_gradient(images, tf.constant(self._truth.labels), steps)
    # The aggregator gets initial minus trained weights.
    update = [scale * tensor for tensor in gradient]
    if defense['name'] == 'shadow' and not in_images:
      update = self._noised(update, images, scale)
    return [-tensor.numpy() for tensor in update]

  def _region_maps(self) -> np.ndarray:
    if self._defense['name'] == 'none':
      return self._truth.regions
    config = SaliencyConfig(**self._defense['saliency'])
    region_map = build_region_map(config, self._simulator.model)
    maps, _ = region_map(
      tf.constant(self._truth.images),
      tf.constant(self._truth.labels),
      tf.constant(self._truth.regions),
    )
    return maps.numpy()

  def _keys(self) -> tf.Tensor:
    return tf.random.experimental.stateless_split(self._key, len(self._truth.images))

  def _noise_in_images(self) -> tf.Tensor:
    channels = self._truth.images.shape[-1]
    noise = region_noise(tf.constant(self.maps), self._keys(), channels, 'normal')
    sums = [tf.reduce_sum(self.maps**power, (1, 2, 3), keepdims=True) for power in (2, 4)]
    zero = tf.zeros(())
    squared = NoiseStrength(**self._defense['strength']).squared_scale(
      'correlated',
      update_energy=zero,
      shape_energy=zero,
      sensitivity_energy=zero,
      region_energy=sums[0],
      region_fourth_moment=sums[1],
      num_weights=0,
    )
    return tf.sqrt(squared) * noise

  def _noised(self, update, images, scale) -> list[tf.Tensor]:
    shape, strength = self._defense['shape'], NoiseStrength(**self._defense['strength'])
    channels = images.shape[-1]
    value = collections.OrderedDict(
      update=update,
      noise_key=self._key,
      region_energy=channels * tf.reduce_sum(self.maps**2),
      region_fourth_moment=channels * tf.reduce_sum(self.maps**4),
      sensitivity_energy=tf.zeros(()),
      shape=[],
    )
    labels = self._truth.labels
    if shape == 'correlated':
      direction = region_noise(tf.constant(self.maps), self._keys(), channels, 'normal')
      moved = self._sensitivity.derivative(images, tf.constant(labels), direction)
      value['shape'] = [scale * tensor for tensor in moved]
    elif shape == 'diagonal' or strength.kind == 'region_psnr':
      squared = self._sensitivity.squared(images, labels, self.maps, int(self._key[1]))
      squared = [scale**2 * tensor for tensor in squared]
      value['sensitivity_energy'] = tf.add_n([tf.reduce_sum(tensor) for tensor in squared])
      value['shape'] = squared if shape == 'diagonal' else []
    noised, _ = noised_update(value, shape, strength, self._defense['floor'])
    return noised
