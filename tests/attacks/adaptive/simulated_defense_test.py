import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf

from attacks.adaptive.simulated_defense import (
  Sensitivity,
  noise_key,
  region_map_of,
  simulate_round,
)
from attacks.adaptive.simulated_updates import SimulatedClients
from attacks.batch_norm_statistics import observed_statistics
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning import (
  DpFedAvg,
  DpSgd,
  PercentileGaussian,
  Quantization,
  ShadowDefense,
  ShadowNoise,
  TopK,
)
from tff_shadow.models import classification_loss
from tff_shadow.observations import Truth
from tff_shadow.shadow import SaliencyConfig


def _public(count=12):
  regions = np.zeros((count, 8, 8, 1), np.uint8)
  regions[:, 2:7, 2:7] = 255
  images = np.rint(255 * smooth_images(count, seed=7)).astype(np.uint8)
  return Examples(images, np.arange(count, dtype=np.int32) % 2, regions)


def _observed(model=None, **settings):
  images = smooth_images(2)
  return play_round(model or small_model(), [(images[:1], [1]), (images[1:], [0])], **settings)


def _defended(observation, shape, kind='ratio', value=0.5, saliency='given', **settings):
  noise = ShadowNoise(shape, NoiseStrength(kind, value), SaliencyConfig(kind=saliency), **settings)
  public = ShadowDefense(noise, True, {}).public_settings()
  return dataclasses.replace(observation, defense=public)


def _simulate(observation, num_clients=6, seed=3):
  return simulate_round(
    observation, observation.clients[0], _public(), num_clients=num_clients, seed=seed
  )


def _updates(simulated):
  return [
    np.concatenate([array.ravel() for array in client.update.trainable])
    for client in simulated.observation.clients
  ]


@functools.cache
def _clean():
  """The updates of the clients of `_simulate(_observed())`."""
  return _updates(_simulate(_observed()))


def _sent(defense, num_clients=6):
  """The updates of the same clients under a baseline."""
  observation = dataclasses.replace(_observed(), defense=defense.public_settings())
  return _updates(_simulate(observation, num_clients))


def _assert_own_noise(noises):
  assert np.abs(np.corrcoef(noises) - np.eye(len(noises))).max() < 5 / np.sqrt(noises[0].size)


@pytest.mark.parametrize('settings', [{}, {'steps': 3, 'momentum': 0.5}])
def test_without_defence_it_is_the_clients_own_training(settings):
  observation = _observed(**settings)
  simulated = _simulate(observation)
  clients = [(own.images, list(own.labels)) for own in simulated.truth.values()]
  played = play_round(small_model(), clients, **settings)
  for own, other in zip(simulated.observation.clients, played.clients, strict=True):
    for a, b in zip(own.update.trainable, other.update.trainable, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
  for a, b in zip(simulated.observation.aggregate.trainable, played.aggregate.trainable):  # noqa: B905
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('shape', ['isotropic', 'diagonal', 'correlated'])
def test_noise_has_the_ratio_that_the_defence_says(shape):
  observation = _observed()
  noised = _updates(_simulate(_defended(observation, shape)))
  pairs = zip(_clean(), noised, strict=True)
  ratios = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs]
  assert np.mean(ratios) == pytest.approx(0.5, rel=0.05)


def test_clients_have_noises_of_their_own_and_the_seed_decides_them():
  defended = _defended(_observed(), 'isotropic')
  first = _updates(_simulate(defended))
  _assert_own_noise([b - a for a, b in zip(_clean(), first, strict=True)])
  again, other = (_updates(_simulate(defended, num_clients=1, seed=seed)) for seed in (3, 4))
  np.testing.assert_array_equal(again[0], first[0])
  assert not np.array_equal(again[0], other[0])


@pytest.mark.parametrize('frozen', [True, False])
def test_noise_that_is_not_frozen_is_another_in_the_next_round(frozen):
  observation = _defended(_observed(), 'isotropic')
  observation = dataclasses.replace(observation, defense={**observation.defense, 'frozen': frozen})
  first, second = (
    _simulate(dataclasses.replace(observation, round_num=number), 1) for number in (1, 2)
  )
  np.testing.assert_array_equal(first.truth['public_00'].images, second.truth['public_00'].images)
  assert np.array_equal(*(_updates(own)[0] for own in (first, second))) == frozen


def test_in_a_later_round_clients_have_another_order():
  images = smooth_images(4)
  observation = play_round(small_model(), [(images, [0, 1, 0, 1])])
  training = dataclasses.replace(observation.client_training, batch_size=2)
  client = dataclasses.replace(observation.clients[0], num_steps=2)
  parted = dataclasses.replace(observation, client_training=training)
  found = {
    (name, is_first): simulate_round(
      seen, like, _public(), num_clients=1, seed=3, is_first=is_first
    )
    for name, seen, like in (
      ('whole', observation, observation.clients[0]),
      ('parted', parted, client),
    )
    for is_first in (True, False)
  }
  for name, differs in (('whole', False), ('parted', True)):
    first, later = (found[name, is_first] for is_first in (True, False))
    np.testing.assert_array_equal(first.truth['public_00'].images, later.truth['public_00'].images)
    assert np.array_equal(_updates(first)[0], _updates(later)[0]) != differs


class TestBaselines:
  def test_percentile_gaussian(self):
    noises = []
    for clean, sent in zip(_clean(), _sent(PercentileGaussian(0.2, 90.0)), strict=True):
      sigma = 0.2 * np.percentile(np.abs(clean[clean != 0]), 90.0)
      noises.append((sent - clean) / sigma)
    # Standard error 0.7 %.
    assert np.std(noises) == pytest.approx(1, rel=0.05)
    _assert_own_noise(noises)

  def test_top_k(self):
    for clean, sent in zip(_clean(), _sent(TopK(0.1)), strict=True):
      assert np.count_nonzero(sent) == round(0.1 * sent.size)
      least = np.sort(np.abs(clean))[-np.count_nonzero(sent)]
      np.testing.assert_array_equal(sent, np.where(np.abs(clean) >= least, clean, 0))

  def test_quantization(self):
    errors = []
    for clean, sent in zip(_clean(), _sent(Quantization(3)), strict=True):
      # The second tensor is the bias of the first layer, after 12 kernels of 3 x 3.
      own, before = sent[: 12 * 9], clean[: 12 * 9]
      assert len(np.unique(own)) <= 8
      assert own.min() == pytest.approx(before.min(), rel=1e-5)
      assert np.abs(own - before).max() <= np.ptp(before) / 7 * (1 + 1e-5)
      errors.append((own - before) / np.ptp(before))
    assert abs(np.mean(errors)) < 5 / 7 / 2 / np.sqrt(np.size(errors))
    assert np.abs(np.corrcoef(errors) - np.eye(6)).max() < 0.7

  def test_dp_fedavg_clips_and_leaves_the_noise_to_the_server(self):
    norms = np.linalg.norm(_clean(), axis=1)
    limit = float(np.median(norms))
    for clean, norm, sent in zip(_clean(), norms, _sent(DpFedAvg(limit, 3.0)), strict=True):
      np.testing.assert_allclose(sent, clean * min(1, limit / norm), rtol=1e-4, atol=1e-7)

  def test_dp_sgd(self):
    norms = np.linalg.norm(_clean(), axis=1) / 0.05  # Of the gradients.
    limit = float(np.median(norms))
    noises = []
    # As models and networks do that are built before: it must not give all clients one noise.
    tf.random.set_seed(1)
    for clean, norm, sent in zip(_clean(), norms, _sent(DpSgd(limit, 0.1)), strict=True):
      noises.append((sent - clean * min(1, limit / norm)) / (0.05 * 0.1 * limit))
    assert np.std(noises) == pytest.approx(1, rel=0.05)
    _assert_own_noise(noises)


def test_what_is_shared_of_batch_norm_is_played():
  observation = _observed(small_model(norm='batch'))
  assert len(observation.global_weights.non_trainable) == 2
  shared = dataclasses.replace(
    observation.clients[0].update, non_trainable=observation.global_weights.non_trainable
  )
  like = dataclasses.replace(observation.clients[0], update=shared)
  simulated = simulate_round(observation, like, _public(), num_clients=2, seed=3)
  model = ClientSimulator(observation).model
  for name, truth in simulated.truth.items():
    client = simulated.observation.client(name)
    inputs = model.layers[1](truth.images).numpy()
    found = observed_statistics(simulated.observation, client)
    np.testing.assert_allclose(found[0][0], inputs.mean(axis=(0, 1, 2)), rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(found[0][1], inputs.var(axis=(0, 1, 2)), rtol=1e-2, atol=1e-4)
  assert len(simulated.observation.aggregate.non_trainable) == 2
  assert not _simulate(observation, 1).observation.clients[0].update.non_trainable


def test_noise_in_the_images_moves_the_update_as_correlated_noise_does():
  # A smooth model, or the first order would not be all at rectifiers that switch.
  observation = _observed(small_model(activation='tanh'))
  clean = _updates(_simulate(observation, 3))
  in_images = _defended(observation, 'correlated', 'scale', 0.01, propagation='images')
  in_update = _defended(observation, 'correlated', 'scale', 0.01, floor=1e-6)
  in_images, in_update = (_simulate(defended, 3) for defended in (in_images, in_update))
  for a, b, c in zip(clean, _updates(in_images), _updates(in_update), strict=True):
    assert np.linalg.norm(b - c) < 0.1 * np.linalg.norm(b - a)


def test_deviations_are_the_square_roots_of_sensitivities():
  observation = _defended(_observed(small_model(activation='tanh')), 'diagonal', floor=0.01)
  simulator = ClientSimulator(observation)
  image, label = smooth_images(1, seed=2), np.array([1], np.int32)
  region = np.zeros((1, 8, 8, 1), np.float32)
  region[:, 3:5, 3:5] = 1
  found = Sensitivity(simulator).relative_deviations(observation.defense, image, label, region)
  # All four pixels of the region, one by one, by central differences.
  loss_fn, model = classification_loss(simulator.model), simulator.model

  def gradient(images):
    with tf.GradientTape() as tape:
      loss = loss_fn(label, model(images, training=True))
    return np.concatenate(
      [t.numpy().ravel() for t in tape.gradient(loss, model.trainable_variables)]
    )

  squared = 0.0
  for row, column in np.argwhere(region[0, :, :, 0]):
    step = np.zeros_like(image)
    step[0, row, column, 0] = 1e-2
    squared = squared + np.square((gradient(image + step) - gradient(image - step)) / 2e-2)
  variances = np.sqrt(squared)
  expected = np.sqrt(0.99 * variances / variances.mean() + 0.01)
  flat = np.concatenate([array.ravel() for array in found])
  assert np.sqrt(np.mean(np.square(flat))) == pytest.approx(1, abs=1e-4)
  # Sixteen probes scatter around it.
  assert np.corrcoef(flat, expected)[0, 1] > 0.9
  nothing = Sensitivity(simulator).relative_deviations(
    observation.defense, image, label, np.zeros_like(region)
  )
  assert all((array == 1).all() for array in nothing)


def dense_model():
  """Has no convolution, hence no map of Grad-CAM."""
  inputs = tf.keras.Input((8, 8, 1))
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(inputs)))


def test_noise_that_needs_no_region_needs_no_convolution():
  observation = _observed(dense_model())
  own = _public(2)
  truth = Truth(own.float_images(), own.labels, own.float_regions())
  for shape in ('isotropic', 'decoy'):
    defended = _defended(observation, shape, saliency='gradcam_pp')
    np.testing.assert_array_equal(region_map_of(defended)(truth), truth.regions)
  with pytest.raises(UserError, match='no convolutional layer'):
    region_map_of(_defended(observation, 'correlated', saliency='gradcam_pp'))


def test_what_cannot_be_simulated_takes_one_line():
  observation = _observed()
  with pytest.raises(UserError, match='13 are needed'):
    _simulate(observation, num_clients=13)
  for defense, message in (
    ({'name': 'mixup'}, "no simulation of the defence 'mixup'"),
    ({'name': 'published', 'map_kind': 'exposure'}, 'with a generator, and none'),
    ({'name': 'top_k', 'share': 0.1}, "defence 'top_k': .*share"),
    ({'name': 'top_k', 'fraction': 2.0}, "defence 'top_k': fraction must be"),
  ):
    with pytest.raises(UserError, match=message):
      _simulate(dataclasses.replace(observation, defense=defense))


@pytest.mark.parametrize('frozen', [True, False])
def test_settings_are_not_chosen_on_noise_that_was_learned_from(frozen):
  observation = dataclasses.replace(_observed(), defense={'name': 'shadow', 'frozen': frozen})
  like = observation.clients[0]
  clients = SimulatedClients(_public(), like, 20, (), seed=3)
  learned = [
    key for _, _, keys in clients.in_round(observation, like, 20, True) for key in keys.values()
  ]
  chosen = [noise_key(observation, 3, index) for index in range(20)]
  assert len({*learned, *chosen}) == 40
