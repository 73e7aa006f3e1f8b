"""What several attacks on the same rounds need not make twice."""

import dataclasses
from collections.abc import Hashable, Sequence

from attacks.config import AttackConfig
from attacks.priors import reweighted
from attacks.simulator import ClientSimulator
from attacks.solver import Solver
from tff_shadow.observations import Observation

_DEFAULTS = AttackConfig()
# What the engine does around a solver. The number of lanes is in the kind of an attack.
_UNTRACED = ('start', 'orders', 'order_iterations', 'label_rule', 'restarts', 'combination', 'seed')


class SharedSolvers:
  """Simulators and solvers of rounds, whoever took part in them and whatever their updates are.

  Tracing a solver takes as long as hundreds of its steps on small images. Attacks share one that
  differ only in their targets, in what decides where restarts begin and which of them count, and in
  the weights of total variation and Gaussian prior.

  Attributes:
    simulators: Of the clients' local training, one per round.
    example_clip_norm: To which they clip the gradient of each image; None if they do not.
  """

  def __init__(
    self,
    observations: Sequence[Observation],
    dtype: str = 'float32',
    example_clip_norm: float | None = None,
  ):
    """Rebuilds the models.

    Args:
      observations: The rounds; other ones with the same global weights may be attacked.
      dtype: `AttackConfig.dtype` of the attacks.
      example_clip_norm: See `ClientSimulator`.

    Raises:
      UserError: If the observations cannot be attacked.
    """
    self._observations = list(observations)
    self._dtype = dtype
    self.example_clip_norm = example_clip_norm
    self.simulators = [ClientSimulator(seen, dtype, example_clip_norm) for seen in observations]
    self._solvers: dict[Hashable, Solver] = {}

  def fits(self, observations: Sequence[Observation], dtype: str = 'float32') -> bool:
    """Whether these are rounds of the same global weights and local training."""
    return (
      dtype == self._dtype
      and len(observations) == len(self._observations)
      and all(
        own.global_weights is other.global_weights
        and own.client_training == other.client_training
        and own.batch_norm_sharing == other.batch_norm_sharing
        for own, other in zip(self._observations, observations, strict=True)
      )
    )

  def get(self, config: AttackConfig, kind: Hashable) -> Solver | None:
    """The solver that was put there; None if there is none.

    Args:
      config: Of the attack.
      kind: What else the trace depends on.
    """
    return self._solvers.get(_key(config, kind))

  def put(self, config: AttackConfig, kind: Hashable, solver: Solver) -> None:
    """Keeps a solver."""
    self._solvers[_key(config, kind)] = solver


def _key(config: AttackConfig, kind: Hashable) -> Hashable:
  # Whether there is such a prior is traced, its weight is not.
  variation, gaussian = (
    prior and reweighted(prior, float(prior.weight > 0))
    for prior in (config.total_variation, config.gaussian_images)
  )
  same = {name: getattr(_DEFAULTS, name) for name in _UNTRACED}
  config = dataclasses.replace(config, total_variation=variation, gaussian_images=gaussian, **same)
  return config, kind
