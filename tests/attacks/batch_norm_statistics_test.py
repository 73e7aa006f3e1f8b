import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.batch_norm_statistics import observed_statistics, proxy_statistics
from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.priors import BatchNormStatistics
from attacks.simulator import ClientSimulator
from attacks.threat_model import threat_model
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.errors import UserError
from tff_shadow.models import (
  batch_norm_layers,
  build_model,
  collect_statistics,
  freeze_batch_norm,
  model_from_config,
  sent_statistics,
)
from tff_shadow.observations import WeightArrays

_SHAPE = (8, 8, 1)


def _model(momentum=0.9):
  """A fused BatchNorm, one in a nested model, and one on vectors, which is not fused."""
  tf.keras.utils.set_random_seed(3)
  normalise = tf.keras.layers.BatchNormalization
  inner_inputs = tf.keras.Input((8, 8, 5))
  inner = tf.keras.Model(
    inner_inputs,
    normalise(momentum=momentum)(
      tf.keras.layers.Conv2D(4, 3, strides=2, use_bias=False)(inner_inputs)
    ),
  )
  inputs = tf.keras.Input(_SHAPE)
  x = normalise(momentum=0.8, name='first')(tf.keras.layers.Conv2D(5, 3, padding='same')(inputs))
  x = inner(tf.keras.layers.ReLU()(x))
  x = tf.keras.layers.Dense(6)(tf.keras.layers.Flatten()(tf.keras.layers.ReLU()(x)))
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(normalise(momentum=momentum)(x)))


def _statistics_sent(model, observation):
  """The changes of the statistics of layers that train."""
  variables = model.non_trainable_variables
  before = observation.global_weights.non_trainable
  sent = sent_statistics(variables)
  return tuple(v.numpy() - old for v, old, own in zip(variables, before, sent, strict=True) if own)


def _round(model, images, *, batch_size=8, **kwargs):
  """One round of one client that shares its statistics."""
  observation = play_round(model, [(images, [k % 2 for k in range(len(images))])], **kwargs)
  change = _statistics_sent(model, observation)
  client = observation.clients[0]
  client = dataclasses.replace(client, update=WeightArrays(client.update.trainable, change))
  training = dataclasses.replace(observation.client_training, batch_size=batch_size)
  return dataclasses.replace(observation, clients=(client,), client_training=training)


def _true_statistics(observation, images):
  """By `tf.nn.moments` of what a model with the global weights feeds each layer."""
  model = model_from_config(observation.model_config)
  for variable, array in zip(
    model.trainable_variables, observation.global_weights.trainable, strict=True
  ):
    variable.assign(array)
  seen = {}
  for layer in batch_norm_layers(model):
    inner = layer.call

    def call(inputs, *args, inner=inner, layer=layer, **kwargs):
      seen[layer.name] = tf.nn.moments(inputs, list(range(inputs.shape.rank - 1)))
      return inner(inputs, *args, **kwargs)

    layer.call = call
  model(images, training=True)
  return [seen[layer.name] for layer in batch_norm_layers(model)]


def _assert_same(actual, expected, **tolerance):
  assert len(actual) == len(expected)
  for layer, expected_layer in zip(actual, expected, strict=True):
    for array, expected_array in zip(layer, expected_layer, strict=True):
      assert np.abs(expected_array).max() > 1e-3
      np.testing.assert_allclose(array, expected_array, **tolerance)


@pytest.mark.parametrize('num_images', [1, 3])
def test_one_step_gives_the_statistics_of_the_batch(num_images):
  images = smooth_images(num_images)
  observation = _round(
    build_model('conv_small', image_shape=_SHAPE, num_classes=2, norm='batch', seed=0), images
  )
  statistics = observed_statistics(observation, observation.clients[0])
  _assert_same(statistics, _true_statistics(observation, images), atol=1e-5)


def test_a_batch_size_of_the_clients_own():
  images = smooth_images(3)
  observation = _round(_model(), images, batch_size=2)
  # One step on all three images, which the protocol's batches of two do not allow.
  own = dataclasses.replace(observation.clients[0], batch_size=3)
  statistics = observed_statistics(observation, own)
  _assert_same(statistics, _true_statistics(observation, images), atol=1e-5)
  protocol = observed_statistics(observation, observation.clients[0])
  assert np.abs(protocol[0][1] / statistics[0][1] - 1).max() > 1e-3


def test_every_kind_of_layer():
  images = smooth_images(6)
  observation = _round(_model(), images)
  assert [layer.fused for layer in batch_norm_layers(_model())] == [True, True, False]
  statistics = observed_statistics(observation, observation.clients[0])
  _assert_same(statistics, _true_statistics(observation, images), atol=1e-5)


def test_momentum_near_one_is_inverted_as_well_as_float32_allows():
  images = smooth_images(4)
  observation = _round(_model(momentum=0.99), images)
  statistics = observed_statistics(observation, observation.clients[0])
  _assert_same(statistics, _true_statistics(observation, images), atol=1e-4)


def test_several_steps_on_equal_batches():
  images = smooth_images(4)
  observation = _round(_model(), images, steps=3, learning_rate=1e-9)
  statistics = observed_statistics(observation, observation.clients[0])
  _assert_same(statistics, _true_statistics(observation, images), atol=1e-5)


def test_several_steps_on_other_batches_give_their_weighted_mean():
  images = smooth_images(5)
  model = _model()
  observation = _round(model, images, batch_size=4, learning_rate=1e-9)
  client = dataclasses.replace(observation.clients[0], num_steps=2)
  # Played again in the true order, 4 images and then 1; the vectors' variance of one image is 0.
  for variable, array in zip(
    model.non_trainable_variables, observation.global_weights.non_trainable, strict=True
  ):
    variable.assign(array)
  batches = images[:4], images[4:]
  for batch in batches:
    model(batch, training=True)
  change = _statistics_sent(model, observation)
  client = dataclasses.replace(client, update=WeightArrays(client.update.trainable, change))
  observation = dataclasses.replace(
    observation, global_weights=_with_trainable(observation, model), clients=(client,)
  )
  statistics = observed_statistics(observation, client)
  first, second = (_true_statistics(observation, batch) for batch in batches)
  momentum = [layer.momentum for layer in batch_norm_layers(model)]
  expected = [
    [(m * a + b) / (m + 1) for a, b in zip(one, two, strict=True)]
    for m, one, two in zip(momentum, first, second, strict=True)
  ]
  for layer, expected_layer in zip(statistics, expected, strict=True):
    np.testing.assert_allclose(layer[0], expected_layer[0], atol=1e-5)
  # Each variance counts with its own n / (n - 1): exact only where that was the same.
  np.testing.assert_allclose(statistics[2][1], expected[2][1], atol=1e-5)
  np.testing.assert_allclose(statistics[0][1], expected[0][1], rtol=0.02)


def _with_trainable(observation, model):
  return dataclasses.replace(
    observation.global_weights, trainable=tuple(v.numpy() for v in model.trainable_variables)
  )


def test_nothing_shared_gives_nothing():
  images = smooth_images(2)
  observation = _round(_model(), images)
  client = observation.clients[0]
  assert observed_statistics(observation, client) is not None
  silent = dataclasses.replace(client, update=WeightArrays(client.update.trainable))
  assert observed_statistics(observation, silent) is None
  assert observed_statistics(observation, dataclasses.replace(client, dropped=True)) is None
  assert observed_statistics(observation, dataclasses.replace(client, num_steps=0)) is None
  for sharing in ('local', 'frozen'):
    other = dataclasses.replace(observation, batch_norm_sharing=sharing)
    assert observed_statistics(other, client) is None


def test_frozen_layers_are_left_out():
  model = _model()
  batch_norm_layers(model)[0].trainable = False
  images = smooth_images(3)
  observation = _round(model, images)
  statistics = observed_statistics(observation, observation.clients[0])
  assert [mean.shape for mean, _ in statistics] == [(4,), (6,)]
  _assert_same(statistics, _true_statistics(observation, images)[1:], atol=1e-5)
  with collect_statistics(model) as collected:
    model(images, training=True)
  assert [mean.shape for mean, _ in collected] == [(4,), (6,)]


def test_noise_makes_no_negative_variance():
  observation = _round(_model(), smooth_images(2))
  client = observation.clients[0]
  noisy = tuple(array - 1 for array in client.update.non_trainable)
  client = dataclasses.replace(client, update=WeightArrays(client.update.trainable, noisy))
  statistics = observed_statistics(observation, client)
  assert min(variance.min() for _, variance in statistics) == 0


@pytest.mark.parametrize('change', [{'momentum': 1.0}, {'virtual_batch_size': 1}])
def test_statistics_that_cannot_be_had(change):
  observation = _round(_model(), smooth_images(2))
  config = _changed(observation.model_config, 'first', change)
  with pytest.raises(UserError, match="'first' keeps no plain running mean"):
    observed_statistics(
      dataclasses.replace(observation, model_config=config), observation.clients[0]
    )


def test_observation_that_does_not_hold_together():
  observation = _round(_model(), smooth_images(2))
  client = observation.clients[0]
  short = WeightArrays(client.update.trainable, client.update.non_trainable[:-1])
  with pytest.raises(UserError, match='5 in the update'):
    observed_statistics(observation, dataclasses.replace(client, update=short))


class TestCollectStatistics:
  def test_equals_what_the_layers_normalise_with(self):
    model, images = _model(), smooth_images(4)
    with collect_statistics(model) as statistics:
      assert statistics == []
      model(images, training=True)
    truth = _true_statistics(_round(_model(), images), images)
    _assert_same(statistics, truth, atol=1e-6)

  def test_leaves_no_trace(self):
    model, images = _model(), smooth_images(4)
    replaced = batch_norm_layers(model)[0]
    replaced.call = lambda inputs, training=None, mask=None: inputs
    kept = replaced.call
    with pytest.raises(ZeroDivisionError), collect_statistics(model):
      raise ZeroDivisionError
    with collect_statistics(model) as statistics:
      model(images, training=True)
    before = [array.numpy() for array in statistics[0]]
    model(images + 1, training=True)
    assert replaced.call is kept
    assert all('call' not in vars(layer) for layer in batch_norm_layers(model)[1:])
    np.testing.assert_array_equal(statistics[0], before)

  def test_gradient_in_the_simulator_equals_differences(self):
    """Where `call` has been replaced, beside the gradient of the weights, in a traced function."""
    truth = smooth_images(3)
    observation = _round(_model(), truth)
    targets = observed_statistics(observation, observation.clients[0])
    simulator = ClientSimulator(observation, 'float64')

    @tf.function
    def penalty(images):
      with collect_statistics(simulator.model) as statistics:
        simulator.gradient(images, tf.constant([0, 1, 0]))
      return BatchNormStatistics(1.0)(statistics, targets)

    images = tf.constant(np.random.default_rng(0).uniform(size=truth.shape))
    with tf.GradientTape() as tape:
      tape.watch(images)
      value = penalty(images)
    gradient = tape.gradient(value, images).numpy()
    direction = np.random.default_rng(1).standard_normal(truth.shape)
    step = 1e-6 * direction
    expected = float(penalty(images + step) - penalty(images - step)) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5)
    assert float(penalty(tf.constant(truth, tf.float64))) < 1e-8 < 1e-2 * float(value)

  @pytest.mark.parametrize('times', [0, 2])
  def test_a_layer_is_called_once(self, times):
    model = _model()
    collected = []

    def collect():
      with collect_statistics(model) as statistics:
        collected.append(statistics)
        for _ in range(times):
          model(smooth_images(2), training=True)

    with pytest.raises(UserError, match=f'called {times} times'):
      collect()
    assert collected == [[]]


class TestAttack:
  """What an attack makes of them."""

  _CONFIG = AttackConfig(iterations=200, xla='off')

  def _with_weight(self, weight):
    prior = dataclasses.replace(self._CONFIG.batch_norm_statistics, weight=weight)
    return dataclasses.replace(self._CONFIG, batch_norm_statistics=prior)

  def test_they_tell_brightness_and_contrast(self):
    image = smooth_images(1, seed=5)
    observation = _round(small_model(norm='batch'), image, batch_size=1)
    told, untold = (
      attack_observation(observation, self._with_weight(weight), controls=False)[0].reconstructions[
        'attack'
      ]
      for weight in (self._CONFIG.batch_norm_statistics.weight, 0.0)
    )
    assert abs(told.mean() - image.mean()) < 0.01
    assert psnr(told[0], image[0]) > psnr(untold[0], image[0]) + 6

  def test_those_of_every_round_are_matched(self):
    seen = _round(small_model(norm='batch'), smooth_images(1), batch_size=1)
    client = seen.clients[0]
    other = tuple(array + 0.1 for array in client.update.non_trainable)
    client = dataclasses.replace(client, update=WeightArrays(client.update.trainable, other))
    changed = dataclasses.replace(seen, clients=(client,))
    config = dataclasses.replace(self._CONFIG, iterations=3)
    found = {
      name: attack_observation(rounds, config, controls=False)[0].reconstructions['attack']
      for name, rounds in {
        'once': [seen],
        'twice': [seen, seen],
        'another later': [seen, changed],
      }.items()
    }
    # Their weight beside the matching does not grow with the rounds.
    np.testing.assert_allclose(found['twice'], found['once'], atol=1e-4)
    assert np.abs(found['another later'] - found['twice']).max() > 1e-3

  def test_used_only_where_shared(self):
    observation = _round(small_model(norm='batch'), smooth_images(1), batch_size=1)
    silent = dataclasses.replace(observation, batch_norm_sharing='local')
    short = dataclasses.replace(self._CONFIG, iterations=3)
    without = dataclasses.replace(self._with_weight(0.0), iterations=3)
    default, weightless = (
      attack_observation(silent, c, controls=False)[0] for c in (short, without)
    )
    for name, images in default.reconstructions.items():
      np.testing.assert_array_equal(images, weightless.reconstructions[name])
    assert attack_observation(observation, short, controls=False)[0].loss != default.loss
    for seen, config, used in (
      (observation, short, True),
      (observation, without, False),
      (silent, short, False),
    ):
      facts = ' '.join(threat_model(seen, config, labels_known=False))
      assert ('BatchNorm statistics' in facts) == used

  def test_required_ones_must_be_shared(self):
    observation = _round(small_model(norm='batch'), smooth_images(1), batch_size=1)
    prior = dataclasses.replace(self._CONFIG.batch_norm_statistics, required=True)
    config = dataclasses.replace(self._CONFIG, batch_norm_statistics=prior)
    with pytest.raises(UserError, match='shared no BatchNorm statistics'):
      attack_observation(dataclasses.replace(observation, batch_norm_sharing='local'), config)
    client = dataclasses.replace(observation.clients[0], num_steps=2)
    with pytest.raises(UserError, match='more than one local step'):
      attack_observation(dataclasses.replace(observation, clients=(client,)), config)

  @pytest.mark.parametrize(
    ('frozen', 'reason'),
    [(False, 'no plain running mean'), (True, 'shared no BatchNorm statistics')],
  )
  def test_layers_that_tell_none(self, frozen, reason):
    model = small_model(norm='batch')
    if frozen:
      freeze_batch_norm(model)
    observation = _round(model, smooth_images(1), batch_size=1)
    if not frozen:
      name = batch_norm_layers(model)[0].name
      config = _changed(observation.model_config, name, {'momentum': 1.0})
      observation = dataclasses.replace(observation, model_config=config)
    short = dataclasses.replace(self._CONFIG, iterations=3)
    assert attack_observation(observation, short, controls=False)[0].status == 'ok'
    facts = ' '.join(threat_model(observation, short, labels_known=False))
    assert 'BatchNorm statistics' not in facts
    prior = dataclasses.replace(short.batch_norm_statistics, required=True)
    with pytest.raises(UserError, match=reason):
      attack_observation(observation, dataclasses.replace(short, batch_norm_statistics=prior))

  def test_damage_is_told_even_where_they_are_not_required(self):
    observation = _round(small_model(norm='batch'), smooth_images(1), batch_size=1)
    client = observation.clients[0]
    damaged = WeightArrays(client.update.trainable, client.update.non_trainable[:-1])
    client = dataclasses.replace(client, update=damaged)
    with pytest.raises(UserError, match='1 in the update'):
      attack_observation(dataclasses.replace(observation, clients=(client,)), self._CONFIG)


class TestProxyStatistics:
  def test_one_batch_of_all(self):
    model, images = _model(), smooth_images(5)
    running = [v.numpy() for v in model.non_trainable_variables]
    statistics = proxy_statistics(model, images)
    with collect_statistics(model) as expected:
      model(images, training=True)
    _assert_same(statistics, expected, rtol=1e-6)
    statistics = proxy_statistics(_model(), images.astype(np.float64))
    _assert_same(statistics, expected, rtol=1e-6)
    model = _model()
    proxy_statistics(model, images)
    for variable, array in zip(model.non_trainable_variables, running, strict=True):
      np.testing.assert_array_equal(variable, array)

  def test_mean_over_batches_of_the_client_s_size(self):
    model, images = _model(), smooth_images(5)
    parts = [proxy_statistics(model, images[k : k + 2]) for k in (0, 2)]
    expected = [
      [(a + b) / 2 for a, b in zip(one, two, strict=True)] for one, two in zip(*parts, strict=True)
    ]
    _assert_same(proxy_statistics(model, images, batch_size=2), expected, rtol=1e-6)

  def test_too_few_images(self):
    with pytest.raises(ValueError, match='batch_size 3 for 2 images'):
      proxy_statistics(_model(), smooth_images(2), batch_size=3)


def _changed(config, layer_name, change):
  """`config` with other settings of one layer."""
  if isinstance(config, dict):
    config = {key: _changed(value, layer_name, change) for key, value in config.items()}
    if config.get('name') == layer_name and 'momentum' in config:
      config.update(change)
    return config
  if isinstance(config, list):
    return [_changed(value, layer_name, change) for value in config]
  return config
