"""All settings of an attack, composed from those of its pieces."""

import dataclasses
from typing import Any, Literal

from attacks.initialization import MeanImageStart, Start
from attacks.matching import CosineMatching, Matching
from attacks.optimizers import Adam, CosineDecay, Schedule
from attacks.parametrizations import Parametrization, SpectralParametrization
from attacks.priors import Box, TotalVariation
from attacks.rectifiers import Rectifier, SurrogateRectifier
from tff_shadow.errors import UserError

Xla = Literal['auto', 'on', 'off']


@dataclasses.dataclass(frozen=True)
class AttackConfig:
  """Settings of one attack; the defaults are the best found for fresh convolutional nets.

  Attributes:
    matching: How updates are compared.
    total_variation: The prior.
    box: Range of pixel values.
    parametrization: What the optimiser moves.
    rectifier: How the switching of rectifiers is differentiated.
    optimizer: Moves the images.
    schedule: Of the optimiser's learning rate.
    start: Where it starts.
    iterations: Optimiser steps per restart.
    restarts: Starts per target; the one with the least matching loss is the result.
    seed: Decides all start images.
    xla: Whether the step is compiled by XLA; 'auto' measures.
    dtype: Floating point type of the attack.
  """

  matching: Matching = dataclasses.field(default_factory=lambda: CosineMatching(balance=0.5))
  total_variation: TotalVariation = dataclasses.field(
    default_factory=lambda: TotalVariation(weight=0.15, decay=0.1)
  )
  box: Box = dataclasses.field(default_factory=Box)
  parametrization: Parametrization = dataclasses.field(default_factory=SpectralParametrization)
  rectifier: Rectifier = dataclasses.field(default_factory=SurrogateRectifier)
  optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(learning_rate=0.5, signed=False))
  schedule: Schedule = dataclasses.field(default_factory=CosineDecay)
  start: Start = dataclasses.field(default_factory=MeanImageStart)
  iterations: int = 500
  restarts: int = 1
  seed: int = 0
  xla: Xla = 'auto'
  dtype: str = 'float32'

  def __post_init__(self):
    """Raises `UserError` for a value that no attack can run with."""
    for name in ('iterations', 'restarts'):
      if getattr(self, name) < 1:
        raise UserError(f'--{name}={getattr(self, name)}: must be at least 1')
    if self.total_variation.weight < 0:
      raise UserError(f'--tv_weight={self.total_variation.weight}: must not be negative')
    if not self.optimizer.learning_rate > 0:
      raise UserError(f'--learning_rate={self.optimizer.learning_rate}: must be above 0')

  def as_dict(self) -> dict[str, Any]:
    """All settings as plain JSON values."""
    return dataclasses.asdict(self)
