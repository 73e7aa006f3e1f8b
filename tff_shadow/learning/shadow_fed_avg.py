"""Federated averaging whose clients put noise on what their shadow finds would leak."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators import (
  NoiseShape,
  NoiseStrength,
  shadow_noise_factory,
  shaped_update_type,
)
from tff_shadow.aggregators.shadow_noise import DEFAULT_FLOOR, squared_norm
from tff_shadow.learning.client_work import (
  ModelFn,
  client_result,
  train_locally,
  wire_client_work,
)
from tff_shadow.learning.fed_avg import compose, initial_weights
from tff_shadow.observations import BatchNormSharing
from tff_shadow.shadow import RegionMap, SaliencyConfig, build_region_map
from tff_shadow.shadow.noise_keys import NOISE_KEY
from tff_shadow.shadow.sensitivity import gradient_and_derivatives, region_noise

REGION = 'region'
Propagation = Literal['per_step', 'local_training', 'images']
PROPAGATIONS: tuple[Propagation, ...] = ('per_step', 'local_training', 'images')


@dataclasses.dataclass(frozen=True)
class ShadowNoise:
  """What noise a client adds, and how its shadow finds the shape.

  Attributes:
    shape: 'isotropic': the same for every weight. 'diagonal': variances by how much of the region
      each weight of the update carries. 'correlated': how the update itself moves when the region
      does, n ~ J(m v), so that the noise lies where the region's information lies.
    strength: See `NoiseStrength`.
    saliency: Where the region is.
    propagation: How J is taken. 'per_step': exact derivative of each local step's gradient, without
      its echo in later steps; needs plain SGD. 'local_training': through the whole local training,
      by the central difference (U(x + eps m v) - U(x - eps m v)) / (2 eps), zero-mean by
      construction, which trains two more copies for every draw.
      'images', for correlated noise of an absolute strength: the training runs on x + tau m v
      itself, so that all that is sent, BatchNorm statistics too, depends on those images alone. The
      other two add the linear part of that, tau J(m v). Frozen, it is the gradient of
      tau <m v, dloss/dx>, which training can lower without end by making the model more sensitive:
      over many rounds it spoils the model where 'images', whose loss is bounded, does not.
    probes: Rademacher draws for the diagonal; 8 recover about 90 % of what exact ones would gain.
      With 'per_step' each is one batch's, at the initial weights, one batch after another and round
      again if there are fewer, so that their cost does not grow with the client's data.
    epsilon: Of the central difference, in image units.
    floor: Share of the noise's energy that is isotropic; none with 'images', where the update has
      nothing else in it that noise would have to cover.
    local_epochs: How often a client's data repeats each image; only 'region_psnr' needs it.
  """

  shape: NoiseShape
  strength: NoiseStrength
  saliency: SaliencyConfig = dataclasses.field(default_factory=SaliencyConfig)
  propagation: Propagation = 'per_step'
  probes: int = 8
  epsilon: float = 0.1
  floor: float = DEFAULT_FLOOR
  local_epochs: int = 1

  def __post_init__(self):
    """Raises ValueError for settings that fit no noise."""
    if self.propagation not in PROPAGATIONS:
      raise ValueError(f'propagation must be one of {PROPAGATIONS}, found {self.propagation!r}')
    if self.in_images and (self.shape != 'correlated' or self.strength.kind == 'ratio'):
      raise ValueError(
        "propagation 'images' needs correlated noise of strength 'scale' or 'region_psnr', found"
        f' {self.shape} of {self.strength.kind!r}'
      )
    if self.probes < 1 or self.local_epochs < 1:
      raise ValueError('probes and local_epochs must be at least 1')
    if not 0 < self.epsilon < float('inf'):
      raise ValueError(f'epsilon must be finite and above 0, found {self.epsilon}')

  @property
  def in_images(self) -> bool:
    """Whether the noise is in the images, and none is added to the update."""
    return self.propagation == 'images'

  @property
  def added(self) -> tuple[NoiseShape, NoiseStrength]:
    """Shape and strength of what is added to the update."""
    if self.in_images:
      return 'isotropic', NoiseStrength('ratio', 0.0)
    return self.shape, self.strength

  @property
  def needs_shadow(self) -> bool:
    """Whether region maps and derivatives are computed at all."""
    return self.shape != 'isotropic' or self.strength.kind == 'region_psnr'

  @property
  def probes_batches(self) -> bool:
    """Whether the diagonal is probed on some batches before the training."""
    return self.needs_shadow and self.propagation == 'per_step' and self.shape != 'correlated'

  @property
  def training_draws(self) -> int:
    """Draws of v per image along which the local training is differentiated."""
    if not self.needs_shadow or self.probes_batches or self.in_images:
      return 0
    return 1 if self.shape == 'correlated' else self.probes


def shadow_input_spec(
  image_shape: tuple[int, int, int], *, with_regions: bool
) -> collections.OrderedDict:
  """Element type of a client's data: x, y, noise_key int32 [B, 2] and region where it is given."""
  spec = collections.OrderedDict(
    x=tf.TensorSpec((None, *image_shape), tf.float32),
    y=tf.TensorSpec((None,), tf.int32),
  )
  spec[NOISE_KEY] = tf.TensorSpec((None, 2), tf.int32)
  if with_regions:
    spec[REGION] = tf.TensorSpec((None, *image_shape[:2], 1), tf.float32)
  return spec


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
) -> tff.learning.templates.LearningProcess:
  """Builds FedAvg with shadow noise: `build_weighted_fed_avg` plus `noise` and `shadow_model_fn`.

  A client's data are batches of `shadow_input_spec`: as for FedAvg, with 'noise_key' for every
  image (`tff_shadow.shadow.noise_keys`), and 'region' where the saliency is 'given'. Keys that stay
  the same make the noise frozen, which is what to use: fresh noise averages out over rounds.

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
    metrics_aggregator: As in TFF.
    batch_norm_sharing: See `build_weighted_fed_avg`.

  Returns:
    A `LearningProcess`. Its client work also reports `maps_fell_back`, the number of images whose
    region map could not be computed and was taken as the whole image. With 'images' the
    aggregator's noise_to_signal and cosine are 0 and 1, for nothing is added to the update.

  Raises:
    ValueError: For an unknown `batch_norm_sharing`, if 'per_step' cannot be used with the
      optimiser or the shared statistics, or 'local_training' with a model that draws at random.
  """
  initial_model_weights, share_statistics = initial_weights(model_fn, batch_norm_sharing)
  if noise.needs_shadow and noise.propagation == 'per_step':
    _check_per_step(client_optimizer_fn, share_statistics)
  if noise.training_draws and noise.propagation == 'local_training':
    _check_repeatable(shadow_model_fn)
  client_work, update_type = _build_client_work(
    model_fn,
    shadow_model_fn,
    client_optimizer_fn,
    noise,
    initial_model_weights.type_signature.result,
    client_weighting,
    share_statistics,
    metrics_aggregator or tff.learning.metrics.sum_then_finalize,
  )
  return compose(
    model_fn,
    initial_model_weights,
    model_distributor,
    client_work,
    shadow_noise_factory(*noise.added, model_aggregator, floor=noise.floor),
    server_optimizer_fn or tff.learning.optimizers.build_sgdm(1.0),
    update_type,
    share_statistics,
  )


def _check_per_step(optimizer: tff.learning.optimizers.Optimizer, share_statistics: bool) -> None:
  state = optimizer.initialize(tf.TensorSpec((), tf.float32))
  if set(state) != {'learning_rate'}:
    raise ValueError(
      "propagation 'per_step' needs SGD without momentum (build_sgdm(learning_rate)) on the"
      " clients; use 'local_training' with others"
    )
  if share_statistics:
    raise ValueError(
      "propagation 'per_step' does not see the BatchNorm statistics that are sent; use"
      " 'local_training', or batch_norm_sharing 'local' or 'frozen'"
    )


def _check_repeatable(shadow_model_fn: Callable[[], tf.keras.Model]) -> None:
  with tf.Graph().as_default():
    layers = list(shadow_model_fn()._flatten_layers())
  random = [
    layer.name
    for layer in layers
    if isinstance(layer, tf.keras.__internal__.layers.BaseRandomLayer)
  ]
  if random:
    raise ValueError(
      f"propagation 'local_training' compares copies of the training, but layer {random[0]!r} draws"
      " anew in each; use 'per_step', or a model without it"
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
):
  """Returns the client work and the type of a plain update."""
  with tf.Graph().as_default():
    model = model_fn()
    metrics_aggregation = metrics_aggregator(model.metric_finalizers())
    image_shape = tuple(tf.nest.flatten(model.input_spec)[0].shape[1:])
  data_type = tff.types.SequenceType(
    tff.types.tensorflow_to_type(
      shadow_input_spec(image_shape, with_regions=noise.saliency.kind == 'given')
    )
  )

  @tff.tensorflow.computation(weights_type, data_type)
  def client_update(initial_weights, dataset):
    work = ShadowWork(model_fn, shadow_model_fn, optimizer, noise, share_statistics)

    @tf.function
    def train(initial_weights, dataset):
      return work.run(initial_weights, dataset, client_weighting)

    return train(initial_weights, dataset)

  result_type = client_update.type_signature.result[0]
  update_type = result_type.update.update
  expected = shaped_update_type(update_type, noise.added[0])
  if not expected.is_equivalent_to(result_type.update):
    raise AssertionError(f'{result_type.update} is not {expected}')
  return wire_client_work(client_update, metrics_aggregation, ('maps_fell_back',)), update_type


class ShadowWork:
  """One client's local training with its shadow; built where it runs, as in a TFF computation."""

  def __init__(
    self,
    model_fn: ModelFn,
    shadow_model_fn: Callable[[], tf.keras.Model],
    optimizer: tff.learning.optimizers.Optimizer,
    noise: ShadowNoise,
    share_statistics: bool,
  ):
    """Makes the variables; see `build_shadow_fed_avg` for the arguments."""
    self._optimizer = optimizer
    self._noise = noise
    self._share_statistics = share_statistics
    pairs = noise.training_draws if noise.propagation == 'local_training' else 0
    self._models = [model_fn() for _ in range(1 + 2 * pairs)]
    # Apart from the others, so that no batch counts twice in the metrics.
    self._probe_model = model_fn() if noise.probes_batches else None
    self._shadow = None
    self._region_map: RegionMap | None = None
    if noise.needs_shadow:
      if noise.saliency.kind not in ('given', 'uniform'):
        self._shadow = shadow_model_fn()
      self._region_map = build_region_map(noise.saliency, self._shadow)

  def run(
    self,
    initial_weights: tff.learning.models.ModelWeights,
    dataset: tf.data.Dataset,
    client_weighting: tff.learning.ClientWeighting,
  ) -> tuple[tff.learning.templates.ClientResult, Any, tf.Tensor, tf.Tensor]:
    """Trains on `dataset`, batches of `shadow_input_spec`; to be called in a tf.function.

    Returns:
      ClientResult of a shaped update (`shaped_update_type`), metrics, whether the update was not
      finite, and how many region maps fell back.
    """
    if self._shadow is not None:
      variables = [*self._shadow.trainable_variables, *self._shadow.non_trainable_variables]
      values = [*initial_weights.trainable, *initial_weights.non_trainable]
      for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    follows_steps = self._noise.propagation == 'per_step' and self._noise.training_draws
    # Key, steps, energies of the region, fall-backs, and for 'per_step' the sum of J(m v).
    sums = (
      tf.zeros((2,), tf.int32),
      tf.zeros(()),
      tf.zeros(()),
      tf.zeros(()),
      tf.zeros((), tf.int32),
      *(tf.zeros_like(tensor) for tensor in initial_weights.trainable if follows_steps),
    )
    updates, num_examples, sums = train_locally(
      self._models,
      self._optimizer,
      initial_weights,
      dataset,
      self._gradients,
      self._share_statistics,
      sums,
    )
    key, num_steps, energy, fourth_moment, fell_back, *direction = sums
    update = updates[0]
    epochs = float(self._noise.local_epochs)
    result, metrics, non_finite = client_result(
      self._models[0], update, num_examples, client_weighting
    )
    shaped = collections.OrderedDict(
      update=result.update,
      noise_key=key,
      region_energy=energy / epochs,
      region_fourth_moment=fourth_moment / epochs,
      sensitivity_energy=tf.zeros(()),
      shape=(),
    )
    added_shape, _ = self._noise.added
    if added_shape == 'correlated':
      direction = direction or self._differences(updates)[0]
      shaped['shape'] = tf.nest.pack_sequence_as(update, direction)
    elif self._noise.needs_shadow and not self._noise.in_images:
      if self._noise.probes_batches:
        squared, probed_fell_back = self._probe(initial_weights, dataset, num_steps)
        fell_back = tf.maximum(fell_back, probed_fell_back)
      else:
        squared = _mean_squares(self._differences(updates))
      shaped['sensitivity_energy'] = tf.add_n([tf.reduce_sum(tensor) for tensor in squared])
      if added_shape == 'diagonal':
        shaped['shape'] = tf.nest.pack_sequence_as(update, squared)
    return (
      tff.learning.templates.ClientResult(shaped, result.update_weight),
      metrics,
      non_finite,
      fell_back,
    )

  def _differences(self, updates):
    """Central differences J(m v), one per draw, from the updates of the shifted copies."""
    return [
      [
        (a - b) / (2.0 * self._noise.epsilon)
        for a, b in zip(tf.nest.flatten(plus), tf.nest.flatten(minus), strict=True)
      ]
      for plus, minus in zip(updates[1::2], updates[2::2], strict=True)
    ]

  def _probe(self, initial_weights, dataset, num_steps):
    """Returns S_j^2 of the local training from probes at the initial weights, and fall-backs.

    A probe of one batch gives the sum of S_j^2 over its images; all steps together give
    `num_steps` times the mean of them, and an image that is seen again moves the update again by
    the same, hence another factor of the epochs.
    """
    for variables, values in (
      (self._probe_model.trainable_variables, initial_weights.trainable),
      (self._probe_model.non_trainable_variables, initial_weights.non_trainable),
    ):
      tf.nest.map_structure(lambda a, b: a.assign(b), list(variables), list(values))
    probes = self._noise.probes

    def reduce_fn(state, batch):
      probe, squared, fell_back = state
      maps, map_fell_back = self._maps(batch)
      direction = region_noise(
        maps, batch[NOISE_KEY], batch['x'].shape[-1], 'rademacher', probe, probes
      )
      _, (derivative,) = self._derivatives(self._probe_model, batch, batch['x'], [direction])
      squared = tuple(
        total + tf.square(self._rate * tensor)
        for total, tensor in zip(squared, derivative, strict=True)
      )
      # A batch that comes round again has been counted.
      is_new = tf.cast(tf.cast(probe, tf.float32) < num_steps, tf.int32)
      return probe + 1, squared, fell_back + is_new * map_fell_back

    zeros = tuple(tf.zeros_like(tensor) for tensor in initial_weights.trainable)
    start = (tf.constant(0), zeros, tf.constant(0))
    _, squared, fell_back = dataset.repeat().take(probes).reduce(start, reduce_fn)
    factor = num_steps * float(self._noise.local_epochs) / probes
    return [factor * tensor for tensor in squared], fell_back

  def _maps(self, batch):
    """Region maps of a batch, and how many of them fell back."""
    maps, fell_back = self._region_map(batch['x'], batch['y'], batch.get(REGION))
    return maps, tf.reduce_sum(tf.cast(fell_back, tf.int32))

  def _derivatives(self, model, batch, images, along=()):
    """The gradient of a batch's loss at `images`, and its derivatives."""

    def loss_fn(x):
      return model.forward_pass(collections.OrderedDict(x=x, y=batch['y']), training=True).loss

    return gradient_and_derivatives(loss_fn, list(model.trainable_variables), images, along)

  @property
  def _rate(self):
    return self._optimizer.initialize(tf.TensorSpec((), tf.float32))['learning_rate']

  def _scale_in_images(self, maps):
    """Tau of every image [B, 1, 1, 1]; see `NoiseStrength`."""
    sums = [tf.reduce_sum(maps**power, (1, 2, 3), keepdims=True) for power in (2, 4)]
    squared = self._noise.strength.squared_scale(
      'correlated',
      update_energy=tf.zeros(()),
      shape_energy=tf.zeros(()),
      sensitivity_energy=tf.zeros(()),
      region_energy=sums[0],
      region_fourth_moment=sums[1],
      num_weights=0,
    )
    return tf.sqrt(squared)

  def _gradients(self, batch):
    """Gradients of all copies on a batch, and what is added to the sums of `run`."""
    images = batch['x']
    key = tf.reduce_sum(batch[NOISE_KEY], axis=0)
    energy = fourth_moment = tf.zeros(())
    fell_back = tf.zeros((), tf.int32)
    directions = []
    if self._noise.in_images:
      maps, fell_back = self._maps(batch)
      noise = region_noise(maps, batch[NOISE_KEY], images.shape[-1], 'normal')
      images += self._scale_in_images(maps) * noise
    elif self._noise.training_draws or self._noise.strength.kind == 'region_psnr':
      maps, fell_back = self._maps(batch)
      channels = images.shape[-1]
      energy = channels * squared_norm([maps])
      fourth_moment = channels * squared_norm([tf.square(maps)])
      distribution = 'normal' if self._noise.shape == 'correlated' else 'rademacher'
      draws = self._noise.training_draws
      directions = [
        region_noise(maps, batch[NOISE_KEY], channels, distribution, draw, draws)
        for draw in range(draws)
      ]
    head = (key, tf.ones(()), energy, fourth_moment, fell_back)
    batch_size = tf.shape(images)[0]
    if self._noise.propagation == 'per_step':
      own, derivatives = self._derivatives(self._models[0], batch, images, directions)
      moved = (self._rate * tensor for derivative in derivatives for tensor in derivative)
      return batch_size, [own], (*head, *moved)
    epsilon = self._noise.epsilon
    shifted = [images]
    for direction in directions:
      shifted += [images + epsilon * direction, images - epsilon * direction]
    gradients = [
      self._derivatives(model, batch, perturbed)[0]
      for model, perturbed in zip(self._models, shifted, strict=True)
    ]
    return batch_size, gradients, head


def _mean_squares(draws):
  """Mean over draws of the squares, per variable."""
  return [
    tf.add_n([tf.square(tensor) for tensor in column]) / len(draws)
    for column in zip(*draws, strict=True)
  ]
