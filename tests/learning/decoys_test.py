"""Draws of decoy noise against the gradients of the images that they are made of."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tff_shadow.data import Examples
from tff_shadow.learning.decoys import DecoyBatches, decoy_pool

_SIDE = 4
_WEIGHTS = [np.zeros((_SIDE * _SIDE, 2), np.float32), np.zeros(2, np.float32)]


def _public(count=6, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, _SIDE, _SIDE, 1)).astype(np.uint8)
  return Examples(images, rng.integers(0, 2, count).astype(np.int32), np.ones_like(images))


def _mean_gradient(images, labels):
  """Linear in the image, with a part for the label."""
  hot = tf.one_hot(labels, 2)
  pixels = tf.reshape(images, [-1, _SIDE * _SIDE])
  count = tf.cast(tf.shape(labels)[0], tf.float32)
  return [tf.matmul(pixels, hot, transpose_a=True) / count, tf.reduce_mean(hot, 0)]


def _draws(decoys, num, mean_gradient=_mean_gradient, images_per_step=1.0):
  """Draws [num, weights], and what each says of their energy [num]."""

  @tf.function
  def one(key):
    draw, energy = decoys.difference(mean_gradient, key, tf.constant(images_per_step), _WEIGHTS)
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in draw], 0), energy

  keys = np.random.default_rng(9).integers(-(2**31), 2**31, (num, 2)).astype(np.int32)
  signature = (tf.float32, tf.float32)
  return [
    own.numpy().astype(np.float64) for own in tf.map_fn(one, keys, fn_output_signature=signature)
  ]


def _single_gradients(public):
  hot = np.eye(2)[public.labels]
  pixels = public.float_images().reshape(len(public), -1)
  return np.concatenate([(pixels[:, :, None] * hot[:, None]).reshape(len(public), -1), hot], 1)


@pytest.mark.parametrize(
  ('size', 'mixes_batches', 'images_per_step'), [(32, False, 1.0), (1, False, 8.0), (24, True, 8.0)]
)
def test_has_the_covariance_of_one_image(size, mixes_batches, images_per_step):
  public = _public()
  decoys = DecoyBatches(public, size, (), mixes_batches=mixes_batches)
  draws, energies = _draws(decoys, 4000, images_per_step=images_per_step)
  singles = _single_gradients(public)
  expected = np.cov(singles.T, bias=True)
  energy = np.trace(expected)
  np.testing.assert_allclose(draws.mean(0), 0.0, atol=5 * np.sqrt(expected.max() / 4000))
  # Of five directions, so the standard error of the energy is near 1 %.
  assert (draws**2).sum(1).mean() == pytest.approx(energy, rel=0.06)
  assert energies.mean() == pytest.approx(energy, rel=0.06)
  np.testing.assert_allclose(draws.T @ draws / 4000, expected, atol=0.1 * expected.max())
  # Nothing but the images' own differences.
  centred = singles - singles.mean(0)
  outside = draws - draws @ np.linalg.pinv(centred) @ centred
  assert (outside**2).sum() < 1e-9 * (draws**2).sum()


@pytest.mark.parametrize(
  ('decoys', 'mixes_batches', 'images_per_step', 'sizes'),
  [
    (3, False, 8.0, [3] * 2),
    (12, False, 8.0, [4] * 6),
    (14, False, 8.0, [4] * 8),
    (12, True, 8.0, [8] * 8),
    (24, True, 3.6, [4] * 12),
    (12, True, 0.2, [1] * 24),
  ],
)
def test_batches_are_the_client_s_where_the_model_mixes_them(
  decoys, mixes_batches, images_per_step, sizes
):
  seen = []

  def mean_gradient(images, labels):
    tf.py_function(lambda count: seen.append(int(count)), [tf.shape(labels)[0]], [])
    return _mean_gradient(images, labels)

  batches = DecoyBatches(_public(), decoys, (), mixes_batches=mixes_batches)
  _draws(batches, 1, mean_gradient, images_per_step)
  assert seen == sizes


def test_energy_is_that_of_all_draws_where_one_direction_has_it():
  """As labels have: the squared norm of one draw is below a hundredth of it for 8 % of clients."""
  public = _public(50)

  def label_alone(images, labels):
    balance = tf.reduce_mean(2.0 * tf.cast(labels, tf.float32) - 1.0)
    return [tf.zeros_like(_WEIGHTS[0]), tf.stack([balance, 0.0])]

  draws, energies = _draws(DecoyBatches(public, 32, (), mixes_batches=False), 400, label_alone)
  expected = np.var(2.0 * public.labels - 1.0)
  assert energies.mean() == pytest.approx(expected, rel=0.06)
  assert np.quantile((draws**2).sum(1), 0.1) < 0.1 * expected
  assert np.quantile(energies, 0.1) > 0.4 * expected


def test_all_of_the_key_counts():
  decoys = DecoyBatches(_public(20), 8, ('shifts', 'brightness'), mixes_batches=False)

  def draw(key):
    weights, _ = decoys.difference(_mean_gradient, tf.constant(key), tf.constant(1.0), _WEIGHTS)
    return weights[0].numpy()

  np.testing.assert_array_equal(draw([5, 6]), draw([5, 6]))
  for other in ([5, 7], [6, 6], [6, 5]):
    assert np.abs(draw(other) - draw([5, 6])).max() > 0.01


def test_images_are_varied():
  public = _public()
  plain, varied = (
    _draws(DecoyBatches(public, 8, names, mixes_batches=False), 300)[0]
    for names in ((), ('mirror', 'turns'))
  )
  assert np.linalg.matrix_rank(plain, tol=1e-3) == len(public) - 1
  assert np.linalg.matrix_rank(varied, tol=1e-3) > len(public)


@given(
  st.lists(st.floats(1e-3, 10), min_size=2, max_size=6), st.integers(0, 2**16), st.floats(0.1, 10)
)
def test_noise_of_the_covariance_of_the_signal_leaves_a_linear_attacker_least(
  variances, seed, energy
):
  signal = np.diag(variances)
  root = np.random.default_rng(seed).standard_normal((len(variances), len(variances) + 1))
  other = root @ root.T
  errors = [
    np.trace(signal) - np.trace(signal @ np.linalg.solve(signal + noise, signal))
    for noise in (energy * noise / np.trace(noise) for noise in (signal, other))
  ]
  assert errors[0] >= errors[1] - 1e-9


def test_pool_is_spread_over_many_images():
  few = _public(512)
  assert decoy_pool(few) is few
  many = _public(1300)
  pool = decoy_pool(many)
  assert len(pool) == 512
  np.testing.assert_array_equal(pool.images[[0, 256]], many.images[[0, 650]])
  assert len({image.tobytes() for image in pool.images}) == 512


def test_needs_images():
  with pytest.raises(ValueError, match='public images'):
    DecoyBatches(_public(0), 8, (), mixes_batches=False)
