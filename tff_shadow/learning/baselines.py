"""The field's usual defences, as settings of a run.

They are here to be compared with under the same seeds, observations and attacks. Isotropic noise of
an absolute scale is not among them: that is `ShadowDefense` with noise of the shape 'isotropic' and
the strength 'scale'.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tensorflow_privacy as tfp

from tff_shadow.aggregators import percentile_noise_factory, quantization_factory, top_k_factory
from tff_shadow.aggregators.client_side import Factory
from tff_shadow.aggregators.percentile_noise import percentile_noised
from tff_shadow.aggregators.quantization import quantized
from tff_shadow.aggregators.top_k import largest_entries
from tff_shadow.aggregators.update_transform import update_transform_factory
from tff_shadow.learning.client_work import BuildGradientFn, build_plain_gradient_fn
from tff_shadow.learning.dp_sgd import build_dp_sgd_gradient_fn
from tff_shadow.learning.soteria import build_soteria_gradient_fn

# Makes the server's part of an aggregation one that is observed, or leaves it as it is.
Tap = Callable[[Factory], Factory]


@dataclasses.dataclass(frozen=True)
class BaselineDefense:
  """A baseline defence; its fields are its parameters, all of them public.

  A defence of your own is a frozen dataclass like those below, with a name, a default for each
  parameter, and `gradients`, or `aggregator` and `sent`, overridden; it is entered in `BASELINES`.
  An attacker who knows it plays `gradients` and `sent`, so `sent` has to do what `aggregator` does
  to one update before the server sees it.
  """

  name: ClassVar[str]
  # Measurements of the aggregator that are figures of the round.
  figures: ClassVar[tuple[str, ...]] = ()

  def __init_subclass__(cls, **kwargs: Any):
    """Raises TypeError for a defence that clients and attacker would take for different ones.

    An attacker who plays less than is sent reconstructs less, and the audit would be too kind.
    """
    super().__init_subclass__(**kwargs)
    overridden = [
      name
      for name in ('aggregator', 'sent')
      if getattr(cls, name) is not getattr(BaselineDefense, name)
    ]
    if hasattr(cls, 'name') and len(overridden) == 1:
      raise TypeError(
        f'{cls.__name__} overrides {overridden[0]!r} alone; aggregator and sent must do the same to'
        ' an update, so override both or neither'
      )

  def public_settings(self) -> dict[str, Any]:
    """What an attacker may know: everything."""
    return {'name': self.name, **dataclasses.asdict(self)}

  def without_noise(self) -> 'BaselineDefense | None':
    """The same defence without what it draws at random, None if that is no defence at all.

    An attacker who learns from rounds that it plays itself takes the mean and covariance of what
    the rest changes for those of noise, which is right for noise alone. By default the defence as
    it is: of one that draws noise the attacker then learns from a single draw a client.
    """
    return self

  @property
  def example_clip_norm(self) -> float | None:
    """To what norm a local step clips the gradient of each image; None if it does not.

    Over all variables together, before it takes the mean of the batch. An attacker who knows the
    defence does so too with the gradients of the images that it tries.
    """
    return None

  def gradients(self, model: tf.keras.Model) -> BuildGradientFn:
    """How a client gets the gradients of a local step.

    Args:
      model: The task model; its architecture counts, not its weights.

    Raises:
      ValueError: If the defence cannot be used with the model.
    """
    return build_plain_gradient_fn

  def sent(self, update: list[tf.Tensor], key: tf.Tensor) -> list[tf.Tensor]:
    """What the server receives of a client's finished update, without a federation around it.

    Args:
      update: Finite, BatchNorm statistics included where they are shared.
      key: int32 [2], in place of the client's own entropy.

    Returns:
      As many tensors of the same shapes.
    """
    return update

  def aggregator(
    self, tap: Tap, clients_per_round: int
  ) -> tff.aggregators.WeightedAggregationFactory:
    """The aggregation of the clients' updates, with `tap` around what the server receives."""
    return tap(tff.aggregators.MeanFactory())

  def observed(self, measurements: Any) -> Any:
    """What the tap saw, from the measurements of the aggregator; see `observation_tap_factory`."""
    return measurements['observation']


@dataclasses.dataclass(frozen=True)
class UpdateTransform(BaselineDefense):
  """A defence that changes the finished update on the client; `on_client` and `sent` say how."""

  figures: ClassVar[tuple[str, ...]] = ('distortion',)

  def __post_init__(self):
    """Raises ValueError naming the field that is out of range."""
    self.on_client(None)

  def on_client(self, inner: Factory | None) -> Factory:
    """The factory that changes updates and hands them to `inner`."""
    raise NotImplementedError

  def aggregator(
    self, tap: Tap, clients_per_round: int
  ) -> tff.aggregators.WeightedAggregationFactory:
    """See `BaselineDefense`."""
    return self.on_client(super().aggregator(tap, clients_per_round))

  def observed(self, measurements: Any) -> Any:
    """See `BaselineDefense`."""
    return super().observed(measurements['inner'])


@dataclasses.dataclass(frozen=True)
class PercentileGaussian(UpdateTransform):
  """Noise in proportion to the update; the server sees noised updates.

  Attributes:
    sigma0: See `percentile_noise_factory`.
    percentile: See there.
  """

  name: ClassVar[str] = 'percentile_gaussian'
  sigma0: float = 0.1
  percentile: float = 95.0

  def without_noise(self) -> BaselineDefense | None:
    """See `BaselineDefense`."""
    return None

  def on_client(self, inner: Factory | None) -> Factory:
    """See `percentile_noise_factory`."""
    return percentile_noise_factory(self.sigma0, self.percentile, inner)

  def sent(self, update: list[tf.Tensor], key: tf.Tensor) -> list[tf.Tensor]:
    """See `BaselineDefense`."""
    return percentile_noised(update, key, self.sigma0, self.percentile)


@dataclasses.dataclass(frozen=True)
class TopK(UpdateTransform):
  """Gradient pruning; the server sees the largest entries of each update.

  Attributes:
    fraction: See `top_k_factory`.
  """

  name: ClassVar[str] = 'top_k'
  fraction: float = 0.1

  def on_client(self, inner: Factory | None) -> Factory:
    """See `top_k_factory`."""
    return top_k_factory(self.fraction, inner)

  def sent(self, update: list[tf.Tensor], key: tf.Tensor) -> list[tf.Tensor]:
    """See `BaselineDefense`."""
    return largest_entries(update, self.fraction)


@dataclasses.dataclass(frozen=True)
class Quantization(UpdateTransform):
  """Stochastic quantisation; the server sees updates of a few bits per entry.

  Attributes:
    bits: See `quantization_factory`.
  """

  name: ClassVar[str] = 'quantization'
  bits: int = 8

  def without_noise(self) -> BaselineDefense | None:
    """See `BaselineDefense`."""
    return None

  def on_client(self, inner: Factory | None) -> Factory:
    """See `quantization_factory`."""
    return quantization_factory(self.bits, inner)

  def sent(self, update: list[tf.Tensor], key: tf.Tensor) -> list[tf.Tensor]:
    """See `BaselineDefense`."""
    return quantized(update, key, self.bits)


@dataclasses.dataclass(frozen=True)
class DpFedAvg(BaselineDefense):
  """DP-FedAvg with a fixed clipping norm (McMahan et al. 2018), by TFF's own aggregator.

  Each client's update, BatchNorm statistics included, is clipped on the client. The *server* adds
  the noise to the sum and divides by the number of clients drawn for a round, all weighing the
  same. So a curious server sees every clipped update without noise, and that is what is observed:
  the noise protects clients from those who see the models that the server hands out, not from the
  server, unless something that it does not control (secure aggregation with noise shared out among
  the clients) adds up and noises.

  TFF draws the noise; it cannot be reproduced.

  Attributes:
    clip_norm: Of a client's update.
    noise_multiplier: Standard deviation of the noise on the sum over `clip_norm`.
  """

  name: ClassVar[str] = 'dp_fedavg'
  clip_norm: float = 1.0
  noise_multiplier: float = 1.0

  def __post_init__(self):
    """Raises ValueError naming the field that is out of range."""
    _check_clipping(self.clip_norm, self.noise_multiplier)

  @property
  def _sum_query(self) -> tfp.GaussianSumQuery:
    return tfp.GaussianSumQuery(self.clip_norm, self.clip_norm * self.noise_multiplier)

  def sent(self, update: list[tf.Tensor], key: tf.Tensor) -> list[tf.Tensor]:
    """See `BaselineDefense`; clipped, for the noise is the server's."""
    query = self._sum_query
    params = query.derive_sample_params(query.initial_global_state())
    return query.preprocess_record(params, update)

  def aggregator(
    self, tap: Tap, clients_per_round: int
  ) -> tff.aggregators.WeightedAggregationFactory:
    """See `BaselineDefense`."""
    # The query of DifferentiallyPrivateFactory.gaussian_fixed, which takes no inner factory.
    query = tfp.NormalizedQuery(self._sum_query, denominator=float(clients_per_round))
    # An update whose norm overflows is clipped to NaN; it is sent as zeros.
    records = update_transform_factory(lambda update: update, tap(tff.aggregators.SumFactory()))
    return tff.aggregators.as_weighted_aggregator(
      tff.aggregators.DifferentiallyPrivateFactory(query, record_aggregation_factory=records)
    )

  def observed(self, measurements: Any) -> Any:
    """See `BaselineDefense`; the aggregate is the mean before the noise, which the server knows."""
    seen = super().observed(measurements['dp']['inner'])
    num_clients = len(tf.nest.flatten(seen['updates'])[0])
    return {
      'updates': seen['updates'],
      'weights': np.ones(num_clients, np.float32),
      'aggregate': tf.nest.map_structure(lambda total: total / num_clients, seen['aggregate']),
    }


@dataclasses.dataclass(frozen=True)
class DpSgd(BaselineDefense):
  """DP-SGD in every local step, by tensorflow-privacy; see `build_dp_sgd_gradient_fn`.

  The server sees what was trained on clipped and noised gradients, and the number of examples.

  Attributes:
    clip_norm: Of one example's gradient.
    noise_multiplier: Standard deviation of the noise on a batch's sum over `clip_norm`.
  """

  name: ClassVar[str] = 'dp_sgd'
  clip_norm: float = 1.0
  noise_multiplier: float = 1.0

  def __post_init__(self):
    """Raises ValueError naming the field that is out of range."""
    _check_clipping(self.clip_norm, self.noise_multiplier)

  def without_noise(self) -> BaselineDefense | None:
    """See `BaselineDefense`; it still clips."""
    return dataclasses.replace(self, noise_multiplier=0.0)

  @property
  def example_clip_norm(self) -> float | None:
    """See `BaselineDefense`."""
    return self.clip_norm

  def gradients(self, model: tf.keras.Model) -> BuildGradientFn:
    """See `BaselineDefense`."""
    return build_dp_sgd_gradient_fn(model, self.clip_norm, self.noise_multiplier)


@dataclasses.dataclass(frozen=True)
class Soteria(BaselineDefense):
  """Pruned gradients of the last layer in every local step; see `build_soteria_gradient_fn`.

  The server sees what was trained on them.

  Attributes:
    percentile: Of the features whose gradients are pruned; the authors' example has 60.
  """

  name: ClassVar[str] = 'soteria'
  percentile: float = 60.0

  def __post_init__(self):
    """Raises ValueError naming the field that is out of range."""
    if not 0 <= self.percentile <= 100:
      raise ValueError(f'percentile must be from 0 to 100, found {self.percentile}')

  def gradients(self, model: tf.keras.Model) -> BuildGradientFn:
    """See `BaselineDefense`."""
    return build_soteria_gradient_fn(model, self.percentile)


def _check_clipping(clip_norm: float, noise_multiplier: float) -> None:
  if not (math.isfinite(clip_norm) and clip_norm > 0):
    raise ValueError(f'clip_norm must be finite and above 0, found {clip_norm}')
  if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
    raise ValueError(f'noise_multiplier must be finite and not negative, found {noise_multiplier}')


BASELINES: dict[str, type[BaselineDefense]] = {
  baseline.name: baseline
  for baseline in (PercentileGaussian, TopK, Quantization, DpFedAvg, DpSgd, Soteria)
}
