"""Federated averaging whose clients put noise on what their shadow finds would leak."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators import shadow_noise_factory, shaped_update_type
from tff_shadow.data import Examples
from tff_shadow.learning.client_work import (
  ModelFn,
  check_client_weighting,
  default_metrics_aggregator,
  hparams_computation,
  wire_client_work,
)
from tff_shadow.learning.decoys import decoy_batches
from tff_shadow.learning.fed_avg import ButAggregation, but_aggregation, initial_weights
from tff_shadow.learning.noise_settings import ShadowNoise, shadow_input_spec
from tff_shadow.learning.shadow_work import ShadowWork
from tff_shadow.models import graph_function, random_layers
from tff_shadow.observations import BatchNormSharing


def build_shadow_fed_avg(
  model_fn: ModelFn,
  client_optimizer_fn: tff.learning.optimizers.Optimizer,
  server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
  *,
  noise: ShadowNoise,
  shadow_model_fn: Callable[[], tf.keras.Model],
  client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
  model_distributor: tff.learning.templates.DistributionProcess | None = None,
  model_aggregator: tff.aggregators.WeightedAggregationFactory | None = None,
  metrics_aggregator: Callable[..., Any] | None = None,
  batch_norm_sharing: BatchNormSharing = 'aggregate',
  decoys: Examples | None = None,
  secure_measurements: bool = False,
) -> tff.learning.templates.LearningProcess:
  """Builds FedAvg with shadow noise: `build_weighted_fed_avg` plus `noise` and `shadow_model_fn`.

  A client's data are batches of `shadow_input_spec`: as for FedAvg, with 'noise_key' for every
  image (`tff_shadow.shadow.noise_keys`), and 'region' where the saliency is 'given'. 'x' is in
  [0, 1], which noise, regions and decoys are made for; a round ends with an error otherwise. Keys
  that stay the same make the noise frozen. `ShadowNoise.why_not_frozen` tells whether that protects
  over many rounds; all other noise is to have new keys in every round.

  The sums of training loss and metrics are of the clean images and without noise. A server that
  sees them of each client can test guessed images with them; where it is not trusted with that, sum
  them securely (`secure_measurements`).

  For unweighted averaging set `client_weighting=tff.learning.ClientWeighting.UNIFORM`.

  Args:
    model_fn: Builds a `tff.learning.models.VariableModel` whose input is OrderedDict(x, y).
    client_optimizer_fn: The local optimiser; plain SGD for 'per_step'.
    server_optimizer_fn: SGD with learning rate 1 by default.
    noise: See `ShadowNoise`.
    shadow_model_fn: Builds the shadow: a Keras model with the weights of `model_fn`'s model in the
      same order. It carries the current global weights.
    client_weighting: By number of examples by default.
    model_distributor: A plain broadcast by default.
    model_aggregator: Aggregates the noised updates; the weighted mean by default.
    metrics_aggregator: As in TFF; see `build_client_work` for the default.
    batch_norm_sharing: See `build_weighted_fed_avg`.
    decoys: Public images of the modality with labels, for decoy noise; every client gets them with
      the computation, so a few hundred.
    secure_measurements: See `build_weighted_fed_avg`.

  Returns:
    A `LearningProcess` with the measurements of `build_weighted_fed_avg` and those of
    `shadow_noise_factory`. Its client work also reports `maps_fell_back`, the number of images
    whose region map could not be computed and was taken as the whole image.

  Raises:
    ValueError: For an unknown `batch_norm_sharing`, if 'per_step', 'image_ratio' or decoy noise
      cannot be used with the optimiser or with the shared statistics, 'local_training' or
      'image_ratio' with a model that draws at random, or if decoy noise has no decoys, or such as
      do not fit the model.
    TypeError: If `client_weighting` is no `tff.learning.ClientWeighting`; or if the input of
      `model_fn`'s model has other types than `shadow_input_spec`.
  """
  return shadow_fed_avg_but_aggregation(
    model_fn,
    client_optimizer_fn,
    server_optimizer_fn,
    noise=noise,
    shadow_model_fn=shadow_model_fn,
    client_weighting=client_weighting,
    model_distributor=model_distributor,
    metrics_aggregator=metrics_aggregator,
    batch_norm_sharing=batch_norm_sharing,
    decoys=decoys,
    secure_measurements=secure_measurements,
  )(model_aggregator)


def shadow_fed_avg_but_aggregation(
  model_fn: ModelFn,
  client_optimizer_fn: tff.learning.optimizers.Optimizer,
  server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
  *,
  noise: ShadowNoise,
  shadow_model_fn: Callable[[], tf.keras.Model],
  client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
  model_distributor: tff.learning.templates.DistributionProcess | None = None,
  metrics_aggregator: Callable[..., Any] | None = None,
  batch_norm_sharing: BatchNormSharing = 'aggregate',
  decoys: Examples | None = None,
  secure_measurements: bool = False,
) -> ButAggregation:
  """`build_shadow_fed_avg`, to be finished with one aggregator after another."""
  check_client_weighting(client_weighting)
  initial_model_weights, share_statistics = initial_weights(model_fn, batch_norm_sharing)
  if noise.needs_shadow and noise.propagation == 'per_step':
    _check_plain_sgd("propagation 'per_step'", "'local_training'", client_optimizer_fn)
    _check_statistics(share_statistics, "propagation 'per_step'", "'local_training', or ")
  elif noise.needs_decoys:
    _check_plain_sgd('decoy noise', "'isotropic'", client_optimizer_fn)
    _check_statistics(share_statistics, 'decoy noise', '')
    _check_decoys(decoys, model_fn)
  elif noise.measures_images:
    _check_plain_sgd("strength 'image_ratio'", "'ratio'", client_optimizer_fn)
    _check_statistics(share_statistics, "strength 'image_ratio'", "'ratio', or ")
  if noise.measures_images:
    _check_repeatable(
      shadow_model_fn,
      "strength 'image_ratio' compares gradients with and without an image",
      "'ratio'",
    )
  if noise.training_draws and noise.propagation == 'local_training':
    _check_repeatable(
      shadow_model_fn,
      "propagation 'local_training' compares copies of the training",
      "'per_step'",
    )
  client_work, update_type = _build_client_work(
    model_fn,
    shadow_model_fn,
    client_optimizer_fn,
    noise,
    initial_model_weights.type_signature.result,
    client_weighting,
    share_statistics,
    metrics_aggregator or default_metrics_aggregator(secure_measurements),
    decoy_batches(noise, decoys, shadow_model_fn()) if noise.needs_decoys else None,
    secure_measurements,
  )
  complete = but_aggregation(
    model_fn,
    initial_model_weights,
    model_distributor,
    client_work,
    server_optimizer_fn,
    update_type,
    share_statistics,
  )
  return lambda aggregator: complete(
    shadow_noise_factory(
      *noise.added, aggregator, floor=noise.floor, secure_measurements=secure_measurements
    )
  )


def _check_plain_sgd(
  what: str, otherwise: str, optimizer: tff.learning.optimizers.Optimizer
) -> None:
  state = optimizer.initialize(tf.TensorSpec((), tf.float32))
  if set(state) != {'learning_rate'}:
    raise ValueError(
      f'{what} needs SGD without momentum (build_sgdm(learning_rate)) on the clients; use'
      f' {otherwise} with others'
    )


def _check_statistics(share_statistics: bool, what: str, otherwise: str) -> None:
  if share_statistics:
    raise ValueError(
      f'{what} does not see the BatchNorm statistics that are sent; use'
      f" {otherwise}batch_norm_sharing 'local' or 'frozen'"
    )


def _check_decoys(decoys: Examples | None, model_fn: ModelFn) -> None:
  if decoys is None or not len(decoys):
    raise ValueError('decoy noise needs decoys: public images of the modality, with labels')
  with tf.Graph().as_default():
    expected = tuple(tf.nest.flatten(model_fn().input_spec)[0].shape[1:])
  if decoys.images.shape[1:] != expected:
    raise ValueError(f'decoys must be images of shape {expected}, found {decoys.images.shape[1:]}')


def _check_repeatable(
  shadow_model_fn: Callable[[], tf.keras.Model], comparison: str, instead: str
) -> None:
  with tf.Graph().as_default():
    random = random_layers(shadow_model_fn())
  if random:
    raise ValueError(
      f'{comparison}, but layer {random[0]!r} draws anew in each; use {instead}, or a model without'
      ' it'
    )


def _build_client_work(
  model_fn,
  shadow_model_fn,
  optimizer,
  noise,
  weights_type,
  client_weighting,
  share_statistics,
  metrics_aggregator,
  decoys,
  secure_measurements,
):
  """Returns the client work and the type of a plain update."""
  with tf.Graph().as_default():
    model, shadow = model_fn(), shadow_model_fn()
    metrics_aggregation = metrics_aggregator(model.metric_finalizers())
    # TFF takes x and y as a mapping or as a pair.
    x, y = tf.nest.flatten(model.input_spec)
  input_spec = shadow_input_spec(tuple(x.shape[1:]), with_regions=noise.saliency.kind == 'given')
  for name, own in (('x', x), ('y', y)):
    if own.dtype != input_spec[name].dtype:
      raise TypeError(
        f"model_fn: its input_spec has {name!r} of {own.dtype.name}, the clients' data for shadow"
        f' noise have {input_spec[name].dtype.name}; cast them, and say so in input_spec'
      )
  data_type = tff.types.SequenceType(tff.types.tensorflow_to_type(input_spec))

  start_hparams = hparams_computation(optimizer)

  @tff.tensorflow.computation(start_hparams.type_signature.result, weights_type, data_type)
  def client_update(hparams, initial_weights, dataset):
    work = ShadowWork(model_fn, shadow_model_fn, optimizer, noise, share_statistics, decoys)

    def train(hparams, initial_weights, dataset):
      return work.run(initial_weights, dataset, client_weighting, hparams)

    return graph_function(train, shadow)(hparams, initial_weights, dataset)

  result_type = client_update.type_signature.result[0]
  update_type = result_type.update.update
  expected = shaped_update_type(update_type, noise.added[0])
  if not expected.is_equivalent_to(result_type.update):
    raise AssertionError(f'{result_type.update} is not {expected}')
  client_work = wire_client_work(
    client_update,
    start_hparams,
    metrics_aggregation,
    ('maps_fell_back',),
    secure_measurements=secure_measurements,
  )
  return client_work, update_type
