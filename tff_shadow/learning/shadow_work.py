"""The local training of a client together with its shadow."""

import collections
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators.shadow_noise import squared_norm
from tff_shadow.learning.client_work import (
  ModelFn,
  client_result,
  fold,
  initial_hparams,
  train_locally,
)
from tff_shadow.learning.decoys import DecoyBatches
from tff_shadow.learning.noise_settings import ShadowNoise
from tff_shadow.models import collect_statistics, sent_statistics, training_batch_norm_layers
from tff_shadow.shadow import RegionMap, build_region_map
from tff_shadow.shadow.noise_keys import NOISE_KEY
from tff_shadow.shadow.region_maps import REGION
from tff_shadow.shadow.sensitivity import gradient_and_derivatives, region_noise

# Of pixels beyond [0, 1], where images were resized or varied.
_TOLERANCE = 0.05
# Of a client, over which the statistics of its shadow are averaged.
_STATISTICS_BATCHES = 32


class ShadowWork:
  """One client's local training with its shadow; built where it runs, as in a TFF computation."""

  def __init__(
    self,
    model_fn: ModelFn,
    shadow_model_fn: Callable[[], tf.keras.Model],
    optimizer: tff.learning.optimizers.Optimizer,
    noise: ShadowNoise,
    share_statistics: bool,
    decoys: DecoyBatches | None = None,
  ):
    """Makes the variables; see `build_shadow_fed_avg` for the arguments, `decoys` as batches."""
    self._optimizer = optimizer
    self._hparams = initial_hparams(optimizer)
    self._noise = noise
    self._share_statistics = share_statistics
    pairs = noise.training_draws if noise.propagation == 'local_training' else 0
    self._models = [model_fn() for _ in range(1 + 2 * pairs)]
    # Not where BatchNorm is frozen.
    self._has_statistics = any(sent_statistics(list(self._models[0].non_trainable_variables)))
    # Apart from the others, so that no batch counts twice in the metrics.
    probes = noise.probes_batches or noise.measures_images or noise.needs_decoys
    self._probe_model = model_fn() if probes else None
    self._decoys = decoys
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
    hparams: collections.OrderedDict | None = None,
  ) -> tuple[tff.learning.templates.ClientResult, Any, tf.Tensor, tf.Tensor]:
    """Trains on `dataset`, batches of `shadow_input_spec`; to be called in a tf.function.

    `hparams` are those of the optimiser, by default what it was built with.

    Returns:
      ClientResult of a shaped update (`shaped_update_type`), metrics, whether the update was not
      finite, and how many region maps fell back.
    """
    self._hparams = hparams or initial_hparams(self._optimizer)
    if self._shadow is not None:
      variables = [*self._shadow.trainable_variables, *self._shadow.non_trainable_variables]
      values = [*initial_weights.trainable, *initial_weights.non_trainable]
      for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
      if not self._share_statistics and self._has_statistics:
        self._estimate_statistics(dataset)
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
      hparams=self._hparams,
    )
    key, num_steps, energy, fourth_moment, fell_back, *direction = sums
    if self._noise.measures_images or self._noise.needs_decoys:
      smallest_batch = _smallest_batch(dataset)
    update = updates[0]
    epochs = float(self._noise.local_epochs)
    result, metrics, non_finite = client_result(
      self._models[0], update, num_examples, client_weighting
    )
    shaped = collections.OrderedDict(
      update=result.update,
      noise_key=key,
      image_energy=tf.zeros(()),
      region_energy=energy / epochs,
      region_fourth_moment=fourth_moment / epochs,
      sensitivity_energy=tf.zeros(()),
      decoy_energy=tf.zeros(()),
      shape=(),
    )
    if self._noise.measures_images:
      shaped['image_energy'] = self._image_energy(initial_weights, dataset, smallest_batch)
    added_shape, _ = self._noise.added
    if added_shape == 'correlated':
      direction = direction or self._differences(updates)[0]
      shaped['shape'] = tf.nest.pack_sequence_as(update, direction)
    elif added_shape == 'decoy':
      direction, decoy_energy = self._decoy_difference(initial_weights, key, smallest_batch)
      shaped['decoy_energy'] = decoy_energy
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

  def _estimate_statistics(self, dataset):
    """Gives the shadow the BatchNorm statistics of the client's own batches.

    Where clients keep theirs the server has none to send, and a map of what a network sees without
    them would be one of another network.
    """
    layers = training_batch_norm_layers(self._shadow)
    variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]

    def reduce_fn(state, batch):
      count, totals = state
      with collect_statistics(self._shadow) as statistics:
        self._shadow(batch['x'], training=True)
      size = tf.cast(tf.shape(batch['x'])[0], tf.float32)
      own = [part for pair in statistics for part in pair]
      return count + size, tuple(t + size * s for t, s in zip(totals, own, strict=True))

    start = (tf.zeros(()), tuple(tf.zeros_like(variable) for variable in variables))
    count, totals = fold(dataset.take(_STATISTICS_BATCHES), start, reduce_fn)
    for variable, total in zip(variables, totals, strict=True):
      variable.assign(tf.where(count > 0.0, total / tf.maximum(count, 1.0), variable))

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
    self._reset_probe_model(initial_weights)
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
    _, squared, fell_back = fold(dataset.repeat().take(probes), start, reduce_fn)
    factor = num_steps * float(self._noise.local_epochs) / probes
    return [factor * tensor for tensor in squared], fell_back

  def _image_energy(self, initial_weights, dataset, smallest_batch):
    """Mean square of what one image of a smallest batch adds to the update, at the initial weights.

    Of one image of each of some batches: the part of the batch's gradient that is not there without
    it, which in a smaller batch is as many times larger. An image that is seen again adds the same
    again.
    """
    self._reset_probe_model(initial_weights)
    probes = self._noise.probes

    def mean_gradient(batch):
      return self._derivatives(self._probe_model, batch, batch['x'])[0]

    def reduce_fn(state, batch):
      count, energy = state
      others = tf.nest.map_structure(lambda tensor: tensor[1:], batch)
      size = tf.cast(tf.shape(batch['x'])[0], tf.float32)
      share = (size - 1.0) / size
      without = tf.cond(
        size > 1.0,
        lambda: mean_gradient(others),
        lambda: [tf.zeros_like(tensor) for tensor in initial_weights.trainable],
      )
      parts = [a - share * b for a, b in zip(mean_gradient(batch), without, strict=True)]
      return count + 1.0, energy + tf.square(size / smallest_batch) * squared_norm(parts)

    start = (tf.zeros(()), tf.zeros(()))
    count, energy = fold(dataset.take(probes), start, reduce_fn)
    factor = float(self._noise.local_epochs) * self._rate
    return factor**2 * tf.math.divide_no_nan(energy, count)

  def _decoy_difference(self, initial_weights, key, images_per_step):
    """Decoy noise of scale 1: of the covariance of what an image of such a batch adds to an update.

    Returns the draw and its expected squared norm; of a client without images zeros.
    """
    self._reset_probe_model(initial_weights)
    difference, energy = self._decoys.difference(
      lambda images, labels: self._derivatives(
        self._probe_model, collections.OrderedDict(y=labels), images
      )[0],
      key,
      images_per_step,
      initial_weights.trainable,
    )
    rate = float(self._noise.local_epochs) * self._rate
    factor = tf.where(tf.math.is_finite(images_per_step), rate / images_per_step, 0.0)
    return [factor * tensor for tensor in difference], factor**2 * energy

  def _reset_probe_model(self, initial_weights):
    for variables, values in (
      (self._probe_model.trainable_variables, initial_weights.trainable),
      (self._probe_model.non_trainable_variables, initial_weights.non_trainable),
    ):
      tf.nest.map_structure(lambda a, b: a.assign(b), list(variables), list(values))

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
    return self._hparams['learning_rate']

  def _scale_in_images(self, maps):
    """Tau of every image [B, 1, 1, 1]; see `NoiseStrength`."""
    sums = [tf.reduce_sum(maps**power, (1, 2, 3), keepdims=True) for power in (2, 4)]
    squared = self._noise.strength.squared_scale(
      'correlated',
      update_energy=tf.zeros(()),
      image_energy=tf.zeros(()),
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
    if self._noise.needs_shadow or self._noise.needs_decoys:
      beyond = tf.reduce_any((images < -_TOLERANCE) | (images > 1.0 + _TOLERANCE))
      tf.debugging.Assert(
        tf.logical_not(beyond),
        ['shadow noise is measured in image units: pixels must be in [0, 1]; divide them by 255'],
      )
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


def _smallest_batch(dataset):
  """Images in it, float32, infinite without data: what an image adds is largest there."""

  def reduce_fn(smallest, batch):
    return tf.minimum(smallest, tf.cast(tf.shape(batch['y'])[0], tf.float32))

  return fold(dataset, tf.constant(float('inf')), reduce_fn)


def _mean_squares(draws):
  """Mean over draws of the squares, per variable."""
  return [
    tf.add_n([tf.square(tensor) for tensor in column]) / len(draws)
    for column in zip(*draws, strict=True)
  ]
