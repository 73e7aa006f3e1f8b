"""The field's usual defences, as settings of a run.

They are here to be compared with under the same seeds, observations and attacks. Isotropic noise of
an absolute scale is not among them: that is `ShadowDefense` with noise of the shape 'isotropic' and
the strength 'scale'.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import tensorflow_federated as tff

from tff_shadow.aggregators import percentile_noise_factory, quantization_factory, top_k_factory
from tff_shadow.aggregators.client_side import Factory

# Makes the server's part of an aggregation one that is observed, or leaves it as it is.
Tap = Callable[[Factory], Factory]


@dataclasses.dataclass(frozen=True)
class BaselineDefense:
  """A baseline defence; its fields are its parameters, all of them public."""

  name: ClassVar[str]
  # Where the tap's measurements lie among the aggregator's.
  tap_measurements: ClassVar[tuple[str, ...]] = ()
  # Measurements of the aggregator that are figures of the round.
  figures: ClassVar[tuple[str, ...]] = ()

  def public_settings(self) -> dict[str, Any]:
    """What an attacker may know: everything."""
    return {'name': self.name, **dataclasses.asdict(self)}

  def aggregator(self, tap: Tap) -> tff.aggregators.WeightedAggregationFactory:
    """The aggregation of the clients' updates, with `tap` around what the server receives."""
    return tap(tff.aggregators.MeanFactory())


@dataclasses.dataclass(frozen=True)
class _UpdateTransform(BaselineDefense):
  """A defence that changes the finished update on the client."""

  tap_measurements: ClassVar[tuple[str, ...]] = ('inner',)
  figures: ClassVar[tuple[str, ...]] = ('distortion',)

  def __post_init__(self):
    """Raises ValueError naming the field that is out of range."""
    self.on_client(None)

  def on_client(self, inner: Factory | None) -> Factory:
    """The factory that changes updates and hands them to `inner`."""
    raise NotImplementedError

  def aggregator(self, tap: Tap) -> tff.aggregators.WeightedAggregationFactory:
    """See `BaselineDefense`."""
    return self.on_client(super().aggregator(tap))


@dataclasses.dataclass(frozen=True)
class PercentileGaussian(_UpdateTransform):
  """Noise in proportion to the update; the server sees noised updates.

  Attributes:
    sigma0: See `percentile_noise_factory`.
    percentile: See there.
  """

  name: ClassVar[str] = 'percentile_gaussian'
  sigma0: float = 0.1
  percentile: float = 95.0

  def on_client(self, inner: Factory | None) -> Factory:
    """See `percentile_noise_factory`."""
    return percentile_noise_factory(self.sigma0, self.percentile, inner)


@dataclasses.dataclass(frozen=True)
class TopK(_UpdateTransform):
  """Gradient pruning; the server sees the largest entries of each update.

  Attributes:
    fraction: See `top_k_factory`.
  """

  name: ClassVar[str] = 'top_k'
  fraction: float = 0.1

  def on_client(self, inner: Factory | None) -> Factory:
    """See `top_k_factory`."""
    return top_k_factory(self.fraction, inner)


@dataclasses.dataclass(frozen=True)
class Quantization(_UpdateTransform):
  """Stochastic quantisation; the server sees updates of a few bits per entry.

  Attributes:
    bits: See `quantization_factory`.
  """

  name: ClassVar[str] = 'quantization'
  bits: int = 8

  def on_client(self, inner: Factory | None) -> Factory:
    """See `quantization_factory`."""
    return quantization_factory(self.bits, inner)


BASELINES: dict[str, type[BaselineDefense]] = {
  baseline.name: baseline for baseline in (PercentileGaussian, TopK, Quantization)
}
