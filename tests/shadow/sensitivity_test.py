import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.shadow.noise_keys import experiment_secret, image_keys
from tff_shadow.shadow.sensitivity import gradient_and_derivatives, region_noise

_SECRET = experiment_secret(0, 'client_00')


def _keys(num_images):
  return tf.constant(image_keys(_SECRET, np.arange(num_images), None))


def _loss_fn(channels=1, dtype=tf.float32):
  """A smooth net of one convolution and a dense layer; (loss_fn, variables)."""
  rng = np.random.default_rng(2)
  kernel = tf.Variable(rng.normal(0, 0.5, (3, 3, channels, 2)), dtype=dtype)
  bias = tf.Variable(rng.normal(0, 0.5, 2), dtype=dtype)
  dense = tf.Variable(rng.normal(0, 0.5, (8, 3)), dtype=dtype)
  labels = tf.constant([0, 2])

  def loss_fn(images):
    hidden = tf.tanh(tf.nn.conv2d(images, kernel, 2, 'SAME') + bias)
    logits = tf.reshape(hidden, [-1, 8]) @ dense
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses)

  return loss_fn, [kernel, bias, dense]


def _images(dtype=np.float32):
  return np.random.default_rng(3).random((2, 4, 4, 1)).astype(dtype)


def _flat(tensors):
  return np.concatenate([np.asarray(t).ravel() for t in tensors])


class TestRegionNoise:
  @pytest.mark.parametrize('distribution', ['normal', 'rademacher'])
  def test_unit_variance_inside_and_zero_outside(self, distribution):
    maps = np.zeros((40, 16, 16, 1), np.float32)
    maps[:, :8] = 1.0
    maps[:, 8:12] = 0.5
    noise = region_noise(tf.constant(maps), _keys(40), 3, distribution).numpy()
    assert noise.shape == (40, 16, 16, 3)
    # 15,360 and 7,680 values: standard error of the variance 1.1 % and 1.6 %.
    assert noise[:, :8].var() == pytest.approx(1.0, rel=0.05)
    assert noise[:, 8:12].var() == pytest.approx(0.25, rel=0.07)
    assert abs(noise[:, :8].mean()) < 0.04
    assert not noise[:, 12:].any()
    if distribution == 'rademacher':
      assert set(np.unique(noise[:, :8])) == {-1.0, 1.0}

  @pytest.mark.parametrize('distribution', ['normal', 'rademacher'])
  def test_images_channels_and_draws_are_independent(self, distribution):
    maps = tf.ones([4, 32, 32, 1])
    draws = [region_noise(maps, _keys(4), 2, distribution, draw, 3).numpy() for draw in range(3)]
    columns = np.stack(draws).transpose(0, 1, 4, 2, 3).reshape(3 * 4 * 2, -1)
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    # Standard error 1 / 32; 276 pairs.
    assert np.abs(correlations).max() < 4.5 / 32

  def test_an_image_gets_the_same_noise_in_any_batch(self):
    maps = tf.ones([3, 8, 8, 1])
    together = region_noise(maps, _keys(3), 1, 'normal').numpy()
    alone = region_noise(maps[:1], _keys(3)[2:], 1, 'normal').numpy()
    np.testing.assert_array_equal(together[2:], alone)
    in_graph = tf.function(lambda m, k: region_noise(m, k, 1, 'normal'))(maps, _keys(3))
    np.testing.assert_array_equal(together, in_graph)

  def test_both_halves_of_a_key_count(self):
    keys = tf.constant([[1, 2], [1, 3], [2, 2]])
    first, *others = region_noise(
      tf.ones([3, 16, 16, 1]), keys, 1, 'normal', draw=1, draws=2
    ).numpy()
    for other in others:
      assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.3


class TestGradientAndDerivatives:
  def test_equals_central_differences(self):
    loss_fn, variables = _loss_fn(dtype=tf.float64)
    images = _images(np.float64)
    directions = list(np.random.default_rng(4).normal(size=(3, *images.shape)))
    gradient, derivatives = gradient_and_derivatives(
      loss_fn, variables, tf.constant(images), [tf.constant(d) for d in directions]
    )

    def gradient_at(x):
      with tf.GradientTape() as tape:
        loss = loss_fn(tf.constant(x))
      return _flat(tape.gradient(loss, variables))

    np.testing.assert_allclose(_flat(gradient), gradient_at(images), rtol=1e-12)
    step = 1e-5
    for direction, derivative in zip(directions, derivatives, strict=True):
      plus, minus = gradient_at(images + step * direction), gradient_at(images - step * direction)
      expected = (plus - minus) / (2 * step)
      assert np.linalg.norm(expected) > 1e-2
      np.testing.assert_allclose(_flat(derivative), expected, atol=1e-8)

  def test_same_in_a_graph_and_without_directions(self):
    loss_fn, variables = _loss_fn()
    images = tf.constant(_images())
    direction = tf.ones_like(images)
    eager = gradient_and_derivatives(loss_fn, variables, images, [direction])
    graph = tf.function(
      lambda x, d: gradient_and_derivatives(tf.function(loss_fn), variables, x, [d])
    )(images, direction)
    np.testing.assert_allclose(_flat(graph[0]), _flat(eager[0]), atol=1e-6)
    np.testing.assert_allclose(_flat(graph[1][0]), _flat(eager[1][0]), atol=1e-6)
    alone, derivatives = gradient_and_derivatives(loss_fn, variables, images, [])
    np.testing.assert_allclose(_flat(alone), _flat(eager[0]), atol=1e-6)
    assert derivatives == []

  @pytest.mark.parametrize('frozen', [False, True])
  def test_batch_norm_in_a_nested_function(self, frozen):
    tf.keras.utils.set_random_seed(1)
    layer = tf.keras.layers.BatchNormalization(trainable=not frozen)
    model = tf.keras.Sequential(
      [
        tf.keras.layers.Conv2D(2, 3, strides=2, activation='tanh'),
        layer,
        tf.keras.layers.Flatten(),
        tf.keras.layers.Dense(3),
      ]
    )
    images = tf.constant(_images())
    model(images)
    direction = tf.constant(np.random.default_rng(6).normal(size=(2, 4, 4, 1)), tf.float32)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def loss_fn(x):
      return loss(tf.constant([0, 2]), model(x, training=True))

    variables = model.trainable_variables
    derivatives = tf.function(
      lambda x, d: gradient_and_derivatives(loss_fn, variables, x, [d])[1][0]
    )(images, direction)
    plus, minus = (
      _flat(gradient_and_derivatives(loss_fn, variables, images + s * direction, [])[0])
      for s in (0.01, -0.01)
    )
    expected = (plus - minus) / 0.02
    np.testing.assert_allclose(_flat(derivatives), expected, atol=0.03 * np.abs(expected).max())
    assert not tf.config.functions_run_eagerly()

  def test_a_variable_that_the_images_do_not_move_has_zeros(self):
    loss_fn, variables = _loss_fn()
    unused = tf.Variable([1.0, 2.0])
    gradient, (derivative,) = gradient_and_derivatives(
      lambda x: loss_fn(x) + tf.reduce_sum(unused),
      [*variables, unused],
      tf.constant(_images()),
      [tf.ones([2, 4, 4, 1])],
    )
    np.testing.assert_array_equal(gradient[-1], [1.0, 1.0])
    np.testing.assert_array_equal(derivative[-1], [0.0, 0.0])

  def test_rademacher_probes_find_the_diagonal_of_the_full_jacobian(self):
    loss_fn, variables = _loss_fn()
    images = tf.constant(_images())
    maps = tf.constant(np.random.default_rng(5).random((2, 4, 4, 1)), tf.float32)
    with tf.GradientTape(persistent=True) as outer:
      outer.watch(images)
      with tf.GradientTape() as inner:
        loss = loss_fn(images)
      gradients = inner.gradient(loss, variables)
      flat = tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)
    jacobian = outer.jacobian(flat, images).numpy().reshape(flat.shape[0], -1)
    expected = np.square(jacobian * maps.numpy().reshape(1, -1)).sum(axis=1)

    @tf.function
    def squared(draw_keys):
      direction = region_noise(maps, draw_keys, 1, 'rademacher')
      _, (derivative,) = gradient_and_derivatives(loss_fn, variables, images, [direction])
      return tf.square(tf.concat([tf.reshape(d, [-1]) for d in derivative], 0))

    num_draws = 3000
    keys = image_keys(_SECRET, np.arange(2 * num_draws), None).reshape(num_draws, 2, 2)
    mean = sum(squared(tf.constant(k)).numpy() for k in keys) / num_draws
    # Variance of a probe is at most 2 S^4: a standard error of 2.6 % per weight.
    np.testing.assert_allclose(mean, expected, rtol=0.13)
    assert mean.sum() == pytest.approx(expected.sum(), rel=0.05)
