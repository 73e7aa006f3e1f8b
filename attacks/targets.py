"""What an attack on a round can aim at: single clients, or the mean of all of them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from attacks.batch_norm_statistics import (
  observed_statistics,
  unmatchable_layers,
  without_statistics,
)
from attacks.config import AttackConfig
from attacks.contrast import hides_contrast
from attacks.labels import LabelInference, Labels, known_labels, start_logits
from attacks.local_steps import LocalSteps, local_steps
from attacks.simulator import ClientSimulator
from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE, ClientObservation, Observation

_NOISY_GUESSES = 16

# Per BatchNorm layer mean and variance.
RoundStatistics = tuple[tuple[tf.Tensor, tf.Tensor], ...]


class Target(NamedTuple):
  """One target.

  Attributes:
    name: Client id, or `observations.AGGREGATE`.
    index: Among the clients of the first round; decides the seeds.
    num_images: Images sought.
    steps: Local steps in each observed round.
    clients: What was observed of it in each round.
    told: Labels that the attacker was told, or None.
    inferred: Labels that it has inferred by a rule of its own, or None.
  """

  name: str
  index: int
  num_images: int
  steps: tuple[LocalSteps, ...]
  clients: tuple[ClientObservation, ...]
  told: tuple[int, ...] | None
  inferred: tuple[int, ...] | None = None


class TargetFailed(Exception):
  """Why a target has no result."""


class Targets:
  """The targets of one round, or of several that are attacked jointly.

  Attributes:
    simulators: Of the local training, one per round.
    default_names: Ids of all clients.
    public_mean_image: [H, W, C].
  """

  def __init__(
    self,
    observations: Sequence[Observation],
    config: AttackConfig,
    simulators: Sequence[ClientSimulator] | None = None,
  ):
    """Rebuilds the models where they are not given.

    Args:
      observations: The rounds.
      config: Of the attack.
      simulators: Of the local training, one per round; made by default.

    Raises:
      UserError: If the observations cannot be attacked, or not jointly.
    """
    first = observations[0]
    for other in observations[1:]:
      if other.class_names != first.class_names or _shapes(other) != _shapes(first):
        raise UserError(f'--rounds: round {other.round_num} has another model or other classes')
    self._observations = list(observations)
    self._config = config
    self.simulators = list(
      simulators or [ClientSimulator(seen, config.dtype) for seen in observations]
    )
    self.default_names = [client.client_id for client in first.clients]
    self.public_mean_image = first.public_mean_image
    self._inferences: dict[int, LabelInference] = {}

  def find(
    self, name: str, told: Sequence[int] | None, inferred: Sequence[int] | None = None
  ) -> Target:
    """The target of that name; see `Target.told` and `Target.inferred`.

    Raises:
      UserError: If there is none, or the rounds do not show the same images of it.
    """
    first = self._observations[0]
    if name == AGGREGATE:
      clients = tuple(_aggregate(seen) for seen in self._observations)
      index = len(self.default_names)
    elif name in self.default_names:
      clients = tuple(self._client(seen, name) for seen in self._observations)
      index = self.default_names.index(name)
    else:
      raise UserError(
        f'--targets: no client {name!r} in this round; it has {", ".join(self.default_names)}'
      )
    steps = []
    for seen, client in zip(self._observations, clients, strict=True):
      if client.num_images != clients[0].num_images:
        raise UserError(
          f'--rounds: {name} trained on {clients[0].num_images} images in round {first.round_num}'
          f' and on {client.num_images} in round {seen.round_num}; only rounds on the same images'
          ' can be attacked jointly'
        )
      is_mean = name == AGGREGATE
      if is_mean:
        own = _whole_steps(client, self._config)
      else:
        own = local_steps(client, seen.client_training)
      steps.append(own)
    told = None if told is None else tuple(told)
    inferred = None if inferred is None else tuple(inferred)
    return Target(name, index, clients[0].num_images, tuple(steps), clients, told, inferred)

  def _client(self, observation: Observation, name: str) -> ClientObservation:
    try:
      return observation.client(name)
    except KeyError:
      raise UserError(f'--rounds: {name} took no part in round {observation.round_num}') from None

  @functools.cached_property
  def hidden_contrast(self) -> float | None:
    """Contrast of the public mean image if the model's gradient does not show any; else None."""
    center = self._config.box.center
    noise = tf.random.stateless_normal(self.public_mean_image.shape, (0, 1), alg='philox').numpy()
    image = np.clip(self.public_mean_image + 0.1 * noise, 0, 1)
    if not hides_contrast(self.simulators[0], image, center):
      return None
    return float(np.sqrt(np.mean(np.square(self.public_mean_image - center))))

  def check(self, target: Target) -> None:
    """Raises TargetFailed if its update cannot be attacked."""
    for client in target.clients:
      arrays = client.update.trainable
      if client.dropped:
        raise TargetFailed('the client dropped its update because it was not finite')
      if client.num_images < 1 or client.num_steps < 1:
        raise TargetFailed('the client did not train')
      if not all(np.isfinite(array).all() for array in arrays):
        raise TargetFailed('the update is not finite')
      if not any(array.any() for array in arrays):
        raise TargetFailed('the update is all zeros')

  def gradients(self, target: Target) -> list[list[tf.Tensor]]:
    """The observed mean gradient in each round."""
    return [
      simulator.observed_gradient(client)
      for simulator, client in zip(self.simulators, target.clients, strict=True)
    ]

  def labels(self, target: Target) -> Labels:
    """Its labels, told or inferred from all rounds.

    Raises:
      UserError: If given ones do not fit, or the model does not show any.
    """
    given = target.inferred if target.told is None else target.told
    if given is not None:
      classes = len(self._observations[0].class_names)
      own = known_labels(given, target.num_images, classes, f'labels of {target.name}')
      return own if target.told is not None else Labels(np.sort(own.values), 'inferred')
    inference = self.label_inference(target.num_images)
    gradients = self.gradients(target)
    return inference.labels([inference.shown(view, own) for view, own in enumerate(gradients)])

  def label_inference(self, num_images: int) -> LabelInference:
    """How labels of targets with so many images are inferred."""
    if num_images not in self._inferences:
      noise = tf.random.stateless_normal(
        (_NOISY_GUESSES, *self.public_mean_image.shape), (0, 0), alg='philox'
      ).numpy()
      self._inferences[num_images] = LabelInference(
        self.simulators,
        num_images,
        np.clip(self.public_mean_image + 0.1 * noise, 0, 1),
        self._config.label_rule,
      )
    return self._inferences[num_images]

  def start_logits(self, labels: Sequence[Labels]) -> list[np.ndarray]:
    """Where the joint optimisation of labels starts: [B, classes] for each target."""
    classes = len(self._observations[0].class_names)
    return [start_logits(np.bincount(own.values, minlength=classes)) for own in labels]

  def statistics(self, targets: Sequence[Target]) -> tuple[RoundStatistics, ...]:
    """Batch statistics that the targets shared in each round, per layer [T, channels] each.

    Those of a round are empty if they are not required and a target has none that can be matched.
    Empty altogether if there are no targets, no round has any, or the prior on them has no weight.

    Raises:
      UserError: If they are required, but a target shared none, took more than one step, or the
        model's layers do not tell them; or if the observation does not hold together.
    """
    if not targets or not self._config.batch_norm_statistics.weight:
      return ()
    found = tuple(
      self._round_statistics(seen, [target.clients[view] for target in targets])
      for view, seen in enumerate(self._observations)
    )
    return found if any(found) else ()

  def _round_statistics(
    self, seen: Observation, clients: Sequence[ClientObservation]
  ) -> RoundStatistics:
    for client in clients:
      reason = without_statistics(seen, client) or self._unmatchable_layers
      if reason and self._config.batch_norm_statistics.required:
        raise UserError(f'--bn_weight: {reason}')
      if reason:
        return ()
    found = [observed_statistics(seen, client) for client in clients]
    dtype = self.simulators[0].dtype
    return tuple(
      tuple(tf.constant(np.stack(part), dtype) for part in zip(*layers, strict=True))
      for layers in zip(*found, strict=True)
    )

  @functools.cached_property
  def _unmatchable_layers(self) -> str | None:
    return unmatchable_layers(self._observations[0])


def _shapes(observation: Observation) -> list[tuple[int, ...]]:
  return [array.shape for array in observation.global_weights.trainable]


def _whole_steps(client: ClientObservation, config: AttackConfig) -> LocalSteps:
  """Of the mean of all clients, whose observed gradient is the mean over their steps.

  One step on all images explains it, or as many as the clients took, between whose weights there
  is one gradient that is searched.
  """
  count = max(1, client.num_steps) if config.simulation == 'between' else 1
  return LocalSteps((tuple(range(client.num_images)),) * count)


def _aggregate(observation: Observation) -> ClientObservation:
  """The mean of all clients as if one client had sent it.

  Exact for clients that took one step on all their images and weigh as many as they have, without
  BatchNorm: the mean is then one step on the images of all.
  """
  clients = [client for client in observation.clients if not client.dropped]
  return ClientObservation(
    client_id=AGGREGATE,
    num_images=sum(client.num_images for client in clients),
    num_steps=max((client.num_steps for client in clients), default=0),
    weight=sum(client.weight for client in clients),
    update=observation.aggregate,
  )
