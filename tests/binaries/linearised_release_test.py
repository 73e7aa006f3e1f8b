import collections

import numpy as np
import pytest
import tensorflow as tf

from binaries.linearised_release import LinearisedRelease
from tests.attacks.observed_rounds import small_model, smooth_images
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.aggregators.shadow_noise import noised_update
from tff_shadow.data import Examples
from tff_shadow.learning.decoys import DecoyBatches
from tff_shadow.observations import Truth
from tff_shadow.privacy import (
  cramer_rao_bound,
  fit_gaussian_prior,
  gradient_jacobian,
  image_gradients,
  pixel_weights,
  region_psnr,
  van_trees_bound,
)

_SHAPES = ('isotropic', 'diagonal', 'correlated')


def _release(model, **kwargs):
  regions = np.zeros((2, 1, 8, 8, 1), np.float32)
  regions[0, :, 2:6, 2:6] = 1
  regions[1, :, 1:4, 3:7] = 0.5
  clients = [
    Truth(image[None], np.array([label], np.int32), region)
    for label, (image, region) in enumerate(zip(smooth_images(2), regions, strict=True))
  ]
  return LinearisedRelease(model, clients, smooth_images(20, seed=1), _SHAPES, **kwargs)


@pytest.fixture(scope='module')
def release():
  return _release(small_model(activation='tanh'))


@pytest.mark.parametrize('shape', _SHAPES)
def test_noise_of_twice_the_ratio_costs_an_unbiased_attacker_6_db(release, shape):
  weak, strong = (
    [region_psnr(error) for error in release.errors(shape, s)] for s in ('0.2', '0.4')
  )
  assert weak[0] - strong[0] == pytest.approx(20 * np.log10(2), abs=1e-3)
  # Who knows what images look like loses less, and never does worse than one without bias.
  assert 0 < weak[1] - strong[1] < weak[0] - strong[0]
  assert weak[1] > weak[0]
  assert strong[1] > strong[0]


def test_more_noise_leaves_the_prior(release):
  known = release.errors('isotropic', '1e6')[1]
  for shape in _SHAPES:
    unbiased, prior = release.errors(shape, '1e4')
    assert prior == pytest.approx(known, rel=0.01)
    assert unbiased > known


def test_noise_in_the_images_is_bounded_whatever_the_model(release):
  other = _release(small_model(seed=1))
  weak, strong = (release.errors('correlated', f'images:{tau}') for tau in (0.1, 0.2))
  assert other.errors('correlated', 'images:0.1') == weak
  assert strong[0] == pytest.approx(4 * weak[0])
  assert weak[1] < strong[1] < strong[0]


def test_with_nothing_but_the_floor_noise_is_isotropic(release):
  bare = _release(small_model(activation='tanh'), floor=0.9999)
  expected = release.errors('isotropic', '0.2')
  for shape in _SHAPES:
    assert bare.errors(shape, '0.2') == pytest.approx(expected, rel=0.03)
  assert release.errors('correlated', '0.2') != pytest.approx(expected, rel=0.1)


def _flat_model():
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input((4, 4, 1))
  hidden = tf.keras.layers.Dense(3, activation='tanh')(tf.keras.layers.Flatten()(inputs))
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(hidden))


def _public(side):
  images = smooth_images(40, (side, side, 1), seed=1)
  labels = (np.arange(40) % 2).astype(np.int32)
  return Examples(np.rint(images * 255).astype(np.uint8), labels, np.ones_like(images, np.uint8))


def _client(side):
  region = np.ones((1, side, side, 1), np.float32)
  return Truth(smooth_images(1, (side, side, 1)), np.array([1], np.int32), region)


@pytest.fixture(scope='module')
def linear():
  """A model, a client, public images, decoys, their draws and the energy that these are told."""
  inputs = tf.keras.Input((4, 4, 1))
  hidden = tf.keras.layers.Dense(3, activation='tanh')(tf.keras.layers.Flatten()(inputs))
  tf.keras.utils.set_random_seed(0)
  model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(hidden))
  decoys = DecoyBatches(_public(4), 32, ('shifts',), mixes_batches=False)

  def mean_gradient(images, labels):
    with tf.GradientTape() as tape:
      losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images))
      loss = tf.reduce_mean(losses)
    return tape.gradient(loss, model.trainable_variables)

  @tf.function
  def draw(key):
    noise, energy = decoys.difference(
      mean_gradient, key, tf.constant(1.0), model.trainable_variables
    )
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in noise], 0), energy

  keys = np.random.default_rng(3).integers(-(2**31), 2**31, (2000, 2)).astype(np.int32)
  drawn = tf.map_fn(draw, keys, fn_output_signature=(tf.float32, tf.float32))
  # Each has a floor of its own; what it tells is in proportion to the inverse.
  draws, energies = drawn
  return model, _client(4), _public(4), decoys, keys, draws, 1 / tf.reduce_mean(1 / energies)


@pytest.mark.parametrize('floor', [0.05, 0.999])
def test_decoy_noise_has_the_covariance_that_clients_add(linear, floor):
  model, client, public, decoys, keys, draws, energy = linear
  release = LinearisedRelease(
    model, [client], public.float_images(), ['decoy'], floor=floor, decoys=decoys
  )
  update = image_gradients(model, client.images, client.labels)[0]
  jacobian = gradient_jacobian(model, client.images, client.labels).astype(np.float64)
  weights = pixel_weights(client.regions[0], 1)
  prior = fit_gaussian_prior(public.float_images()).information()
  zero = tf.constant(0.0)
  for kind, text in (('scale', 'scale:0.5'), ('ratio', '0.5')):
    strength = NoiseStrength(kind, 0.5)

    @tf.function
    def noise(key, shape, strength=strength):
      shaped = collections.OrderedDict(
        update=[tf.constant(update)],
        noise_key=key,
        image_energy=zero,
        region_energy=zero,
        region_fourth_moment=zero,
        sensitivity_energy=zero,
        decoy_energy=energy,
        shape=[shape],
      )
      (sent,), _ = noised_update(shaped, 'decoy', strength, floor)
      return sent - update

    noises = tf.map_fn(
      lambda own, noise=noise: noise(*own), (keys, draws), fn_output_signature=tf.float32
    )
    covariance = np.cov(noises.numpy().astype(np.float64).T)
    information = jacobian.T @ np.linalg.solve(covariance, jacobian)
    unbiased, known = release.errors('decoy', text)
    # A deviation that is 5 % off would show.
    assert unbiased == pytest.approx(cramer_rao_bound(information, weights), rel=0.1)
    assert known == pytest.approx(van_trees_bound(information, prior, weights), rel=0.1)


def test_decoys_hide_more_than_their_floor_alone():
  model, public = small_model(activation='tanh'), _public(8)
  decoys = DecoyBatches(public, 32, ('shifts',), mixes_batches=False)
  release = LinearisedRelease(
    model, [_client(8)], public.float_images(), ['decoy', 'isotropic'], floor=0.99, decoys=decoys
  )
  shaped, plain = (
    release.errors(shape, strength)[1]
    for shape, strength in (('decoy', '1.0'), ('isotropic', str(0.99**0.5)))
  )
  assert shaped > 1.05 * plain


def test_what_is_refused(release):
  with pytest.raises(ValueError, match='found scale:'):
    release.errors('correlated', 'scale:0.1')
  with pytest.raises(ValueError, match="found 'decoy'"):
    release.errors('decoy', '0.1')
  with pytest.raises(ValueError, match='need its decoys'):
    LinearisedRelease(small_model(), [], smooth_images(3), ['decoy'])
