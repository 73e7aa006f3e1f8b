"""All settings of an attack, composed from those of its pieces."""

import dataclasses
from typing import Any, Literal

from attacks.initialization import MeanImageStart, Start
from attacks.labels import LabelRule
from attacks.matching import CosineMatching, Matching, NoMatching
from attacks.optimizers import Adam, CosineDecay, Optimizer, Schedule
from attacks.parametrizations import Parametrization, SpectralParametrization
from attacks.priors import (
  BatchNormStatistics,
  Box,
  GaussianImages,
  GroupConsistency,
  ImageNorm,
  ImagePrior,
  TotalVariation,
)
from attacks.rectifiers import Rectifier, SurrogateRectifier
from tff_shadow.errors import UserError

Xla = Literal['auto', 'on', 'off']
Simulation = Literal['exact', 'between']
SIMULATIONS: tuple[Simulation, ...] = ('exact', 'between')
Combination = Literal['best', 'mean']
COMBINATIONS: tuple[Combination, ...] = ('best', 'mean')


@dataclasses.dataclass(frozen=True)
class AttackConfig:
  """Settings of one attack; the defaults are the best found for fresh convolutional nets.

  Attributes:
    matching: How updates are compared.
    total_variation: A prior.
    image_norm: A prior; weight 0 for none.
    group_consistency: A prior that ties the restarts of a target together; weight 0 for none.
    gaussian_images: A prior; None for none.
    batch_norm_statistics: A prior; weight 0 for none.
    box: Range of pixel values.
    hold_contrast: Whether the images keep the contrast of the public mean image where the update
      does not show it; see `attacks.contrast`. Shared BatchNorm statistics do.
    parametrization: What the optimiser moves.
    rectifier: How the switching of rectifiers is differentiated.
    optimizer: Moves the images.
    schedule: Of the optimiser's learning rate.
    langevin: Standard deviation of normal noise added to every step, times the schedule's factor,
      in units of the parameters.
    start: Where it starts.
    simulation: How several local steps are simulated: 'exact', one after another, or 'between', by
      one gradient on all images at a point between the old and the new weights that is optimised
      too, for clients whose steps are not known. In a joint attack those of later rounds are not,
      but where every step is on all images.
    orders: Where clients take several steps on parts of their images, so many orders in which they
      may have taken them are tried, and the attack is made under the one of least loss; with 1
      their images are taken to come in the same order in each epoch, and by labels in the first.
    order_iterations: Optimiser steps under each order that is tried.
    start_position: Where that point starts: 0 at the old weights, 1 at the new.
    label_rule: How labels are inferred; see `labels.infer_labels`.
    joint_labels: Whether labels are optimised with the images, from inferred ones.
    iterations: Optimiser steps per restart.
    restarts: Starts per target.
    combination: What the restarts make together: 'best', the one of least matching loss, or 'mean',
      the mean over all of them, once the images of each are put into the order of the best one's.
      What the update leaves open differs between restarts, and the mean errs by less.
    lanes: At most so many restarts and targets are attacked side by side.
    seed: Decides all start images.
    xla: Whether the step is compiled by XLA; 'auto' measures.
    dtype: Floating point type of the attack.
  """

  matching: Matching | NoMatching = dataclasses.field(
    default_factory=lambda: CosineMatching(balance=0.5)
  )
  total_variation: TotalVariation = dataclasses.field(
    default_factory=lambda: TotalVariation(weight=0.15, decay=0.1)
  )
  image_norm: ImageNorm = dataclasses.field(default_factory=lambda: ImageNorm(weight=0.0))
  group_consistency: GroupConsistency = dataclasses.field(
    default_factory=lambda: GroupConsistency(weight=0.0)
  )
  gaussian_images: GaussianImages | None = None
  batch_norm_statistics: BatchNormStatistics = dataclasses.field(
    default_factory=lambda: BatchNormStatistics(weight=1.0, kind='relative', required=False)
  )
  box: Box = dataclasses.field(default_factory=Box)
  hold_contrast: bool = True
  parametrization: Parametrization = dataclasses.field(default_factory=SpectralParametrization)
  rectifier: Rectifier = dataclasses.field(default_factory=SurrogateRectifier)
  optimizer: Optimizer = dataclasses.field(
    default_factory=lambda: Adam(learning_rate=0.5, signed=False)
  )
  schedule: Schedule = dataclasses.field(default_factory=CosineDecay)
  langevin: float = 0.0
  start: Start = dataclasses.field(default_factory=MeanImageStart)
  simulation: Simulation = 'exact'
  orders: int = 16
  order_iterations: int = 60
  start_position: float = 0.5
  label_rule: LabelRule = 'bias'
  joint_labels: bool = False
  iterations: int = 500
  restarts: int = 1
  combination: Combination = 'best'
  lanes: int = 16
  seed: int = 0
  xla: Xla = 'auto'
  dtype: str = 'float32'

  def __post_init__(self):
    """Raises `UserError` for a value that no attack can run with."""
    for name in ('iterations', 'restarts', 'lanes', 'orders', 'order_iterations'):
      if getattr(self, name) < 1:
        raise UserError(f'--{name}={getattr(self, name)}: must be at least 1')
    for name, prior in (
      ('tv_weight', self.total_variation),
      ('norm_weight', self.image_norm),
      ('group_weight', self.group_consistency),
      ('bn_weight', self.batch_norm_statistics),
    ):
      if not prior.weight >= 0:
        raise UserError(f'--{name}={prior.weight}: must not be negative')
    if self.group_consistency.weight and self.restarts > self.lanes:
      raise UserError(
        f'--group_weight: the restarts must run side by side, but --lanes={self.lanes} is less than'
        f' --restarts={self.restarts}'
      )
    if not self.langevin >= 0:
      raise UserError(f'--langevin={self.langevin}: must not be negative')
    if isinstance(self.optimizer, Adam) and not self.optimizer.learning_rate > 0:
      raise UserError(f'--learning_rate={self.optimizer.learning_rate}: must be above 0')

  @property
  def image_priors(self) -> tuple[ImagePrior, ...]:
    """Those with a weight."""
    priors = (
      self.total_variation,
      self.image_norm,
      self.gaussian_images,
      self.group_consistency,
    )
    return tuple(prior for prior in priors if prior is not None and prior.weight)

  @property
  def uses_order(self) -> bool:
    """Whether local steps are simulated one after another, on images of given labels."""
    is_matched = not isinstance(self.matching, NoMatching)
    return self.simulation == 'exact' and is_matched and not self.joint_labels

  @property
  def tries_orders(self) -> bool:
    """Whether `orders` are tried where clients took several steps on parts of their images."""
    return self.uses_order and self.orders > 1

  def as_dict(self) -> dict[str, Any]:
    """All settings as plain JSON values."""
    return dataclasses.asdict(self)
