"""Which entries of an update are worth comparing under a defence, and how much each counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attacks.adaptive.simulated_defense import Sensitivity
from attacks.results import TargetResult
from attacks.simulator import ClientSimulator
from tff_shadow.observations import AGGREGATE, Observation, WeightArrays

_LOW_NOISE_SHARE = 0.5


class Sent(NamedTuple):
  """What is known of one client.

  Attributes:
    update: As received.
    simulator: Of its local training.
    deviations: Gives the relative deviations that diagonal noise is expected to have, one array per
      trainable variable.
  """

  update: WeightArrays
  simulator: ClientSimulator
  deviations: Callable[[], list[np.ndarray]]


class Weighting(NamedTuple):
  """How the entries of a gradient are weighted.

  Attributes:
    weights: By what they are multiplied, one array per trainable variable.
    needs_guess: Whether that follows from what a first attack reconstructed.
  """

  weights: Callable[[Sent], list[np.ndarray]]
  needs_guess: bool = False


def inverse_deviations(sent: Sent) -> list[np.ndarray]:
  """Each entry in units of its noise, which with the squared error is the Gaussian likelihood."""
  return [1 / array for array in sent.deviations()]


def low_noise(sent: Sent) -> list[np.ndarray]:
  """Only the half of the entries with the least noise."""
  deviations = sent.deviations()
  limit = np.quantile(np.concatenate([array.ravel() for array in deviations]), _LOW_NOISE_SHARE)
  return [(array <= limit).astype(np.float32) for array in deviations]


def nonzero(sent: Sent) -> list[np.ndarray]:
  """Only entries that are not zero: where a defence sends some alone, zeros say nothing."""
  return [(array != 0).astype(np.float32) for array in sent.update.trainable]


def without_last_kernel(sent: Sent) -> list[np.ndarray]:
  """All entries but those of the last dense layer's kernel, which Soteria has pruned.

  What it does not defend is enough for an attack (Balunovic et al. 2022, "Bayesian framework for
  gradient leakage").
  """
  variables = sent.simulator.model.trainable_variables
  kernel, _ = sent.simulator.logits_layer_gradient(variables)
  return [np.full(v.shape, v is not kernel, np.float32) for v in variables]


WEIGHTINGS: dict[str, Weighting] = {
  'deviations': Weighting(inverse_deviations, needs_guess=True),
  'low_noise': Weighting(low_noise, needs_guess=True),
  'nonzero': Weighting(nonzero),
  'without_last_kernel': Weighting(without_last_kernel),
}


def weights_of(
  observation: Observation,
  name: str,
  maps: Mapping[str, np.ndarray],
  first: Sequence[TargetResult],
  simulator: ClientSimulator,
) -> dict[str, list[np.ndarray]]:
  """By what the entries of each client's gradient are multiplied in one round.

  Args:
    observation: The round.
    name: Of `WEIGHTINGS`.
    maps: Region maps [B, H, W, 1] or [1, H, W, 1] of each client that is attacked.
    first: What a first attack on them gave, where the weighting needs it.
    simulator: Of local training in that round.

  Returns:
    One array per trainable variable for each client in `maps`.
  """
  weighting = WEIGHTINGS[name]
  sensitivity = Sensitivity(simulator)
  guesses = {result.target: result for result in first}
  weights = {}
  for target, own_maps in maps.items():
    guess = guesses.get(target)
    if weighting.needs_guess and guess.status != 'ok':
      # It fails again for the same reason, and no weight is used.
      weights[target] = [np.ones(v.shape) for v in simulator.model.trainable_variables]
      continue

    def deviations(guess=guess, own_maps=own_maps):
      images = guess.reconstructions['attack']
      own = np.broadcast_to(own_maps, (*images.shape[:3], 1))
      labels = np.array(guess.labels, np.int32)
      return sensitivity.relative_deviations(observation.defense, images, labels, own)

    update = observation.aggregate if target == AGGREGATE else observation.client(target).update
    weights[target] = weighting.weights(Sent(update, simulator, deviations))
  return weights
