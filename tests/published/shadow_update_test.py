import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models import (
  check_running_statistics,
  classification_loss,
  collect_statistics,
  freeze_batch_norm,
)
from tff_shadow.published import shadow_update
from tff_shadow.published.settings import PublishedSettings


def _model(dtype='float32'):
  tf.keras.utils.set_random_seed(2)
  layers = [
    tf.keras.Input((8, 8, 3), dtype=dtype),
    tf.keras.layers.Conv2D(5, 3, activation='softplus', dtype=dtype),
    tf.keras.layers.BatchNormalization(momentum=0.9, dtype=dtype),
    tf.keras.layers.Conv2D(4, 3, activation='softplus', dtype=dtype),
    tf.keras.layers.BatchNormalization(momentum=0.6, dtype=dtype),
    tf.keras.layers.Flatten(),
    tf.keras.layers.Dense(2, dtype=dtype),
  ]
  model = tf.keras.Sequential(layers)
  rng = np.random.default_rng(0)
  for variable in model.non_trainable_variables:
    variable.assign(rng.uniform(0.5, 1.5, variable.shape))
  return model


def _images(seed=0, count=4, dtype=np.float32):
  return np.random.default_rng(seed).uniform(size=(count, 8, 8, 3)).astype(dtype)


_LABELS = tf.constant([0, 1, 1, 0])


class TestPseudoStep:
  def test_statistics_are_those_of_the_batch(self):
    model, images = _model(), _images()
    with collect_statistics(model) as expected:
      model(images, training=True)
    model = _model()
    target = shadow_update.pseudo_step(model, images, _LABELS, classification_loss(model))
    sizes = (4 * 6 * 6, 4 * 4 * 4)
    for (mean, variance), (true_mean, true_variance), n in zip(
      target.statistics, expected, sizes, strict=True
    ):
      np.testing.assert_allclose(mean, true_mean, atol=2e-5)
      # The running variance is the unbiased one.
      np.testing.assert_allclose(variance, true_variance * n / (n - 1), rtol=1e-4)

  def test_gradient_is_that_of_training_and_nothing_stays(self):
    model, images = _model(), _images()
    before = model.get_weights()
    loss_fn = classification_loss(model)
    target = shadow_update.pseudo_step(model, images, _LABELS, loss_fn)
    for variable, value in zip(model.get_weights(), before, strict=True):
      np.testing.assert_array_equal(variable, value)
    with tf.GradientTape() as tape:
      loss = loss_fn(_LABELS, model(images, training=True))
    for found, expected in zip(
      target.gradient, tape.gradient(loss, model.trainable_variables), strict=True
    ):
      np.testing.assert_allclose(found, expected, atol=1e-6)

  def test_recovered_statistic(self):
    old, batch = np.array([1.0, -2.0]), np.array([3.0, 5.0])
    found = shadow_update.recovered_statistic(old, 0.9 * old + 0.1 * batch, 0.9)
    np.testing.assert_allclose(found, batch)

  def test_frozen_layers_have_none(self):
    model = _model()
    freeze_batch_norm(model)
    target = shadow_update.pseudo_step(model, _images(), _LABELS, classification_loss(model))
    assert target.statistics == []

  def test_renormalisation_is_refused(self):
    model = tf.keras.Sequential(
      [tf.keras.Input((8, 8, 3)), tf.keras.layers.BatchNormalization(renorm=True)]
    )
    with pytest.raises(UserError, match='keeps no plain running mean'):
      check_running_statistics(model)


class TestLoss:
  def test_total_variation_equals_numpy(self):
    x = _images(1)
    expected = sum(
      np.linalg.norm(d)
      for d in (
        np.diff(x, axis=1),
        np.diff(x, axis=2),
        x[:, 1:, 1:] - x[:, :-1, :-1],
        x[:, 1:, :-1] - x[:, :-1, 1:],
      )
    )
    np.testing.assert_allclose(shadow_update.total_variation(tf.constant(x)), expected, rtol=1e-5)

  def test_equals_numpy(self):
    rng = np.random.default_rng(3)
    drawn, images = _images(4), _images(5)
    first, second = ([rng.normal(size=s) for s in ((3, 2), (4,))] for _ in range(2))
    seen, wanted = ([(rng.normal(size=3), rng.uniform(size=3))] for _ in range(2))
    as_float = lambda tree: tf.nest.map_structure(lambda a: tf.constant(a, tf.float32), tree)  # noqa: E731
    found = shadow_update.shadow_loss(
      tf.constant(drawn),
      tf.constant(images),
      as_float(first),
      as_float(seen),
      shadow_update.Target(as_float(second), as_float(wanted)),
      PublishedSettings(),
    )
    norm = np.linalg.norm
    expected = (
      1e-2 * sum(norm(a - b) for a, b in zip(first, second, strict=True))
      + 1e-2 * (norm(seen[0][0] - wanted[0][0]) + norm(seen[0][1] - wanted[0][1]))
      + 1e-5 * float(shadow_update.total_variation(tf.constant(drawn)))
      + 1e2 * norm(drawn) / 64**2
      + np.mean((drawn - images) ** 2)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)

  def test_equal_gradients_have_a_finite_derivative(self):
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
      distance = shadow_update.gradient_distance([x * 1.0], [tf.constant([1.0, 2.0])])
    np.testing.assert_array_equal(tape.gradient(distance, x), 0)

  @pytest.mark.parametrize('part', ['gradient', 'statistics'])
  def test_matching_is_differentiated_through_the_model(self, part):
    """Against differences in float64; a detached gradient would give zeros."""
    tf.keras.backend.set_floatx('float64')
    try:
      model = _model('float64')
    finally:
      tf.keras.backend.set_floatx('float32')
    loss_fn = classification_loss(model)
    target = shadow_update.pseudo_step(
      model, tf.constant(_images(6, dtype=float)), _LABELS, loss_fn
    )

    def distance(images):
      gradient, statistics = shadow_update.gradient_of_images(model, images, _LABELS, loss_fn)
      if part == 'gradient':
        return shadow_update.gradient_distance(gradient, target.gradient)
      return tf.add_n(
        [
          tf.norm(mean - other) + tf.norm(variance - other_variance)
          for (mean, variance), (other, other_variance) in zip(
            statistics, target.statistics, strict=True
          )
        ]
      )

    images = tf.constant(_images(7, dtype=float))
    with tf.GradientTape() as tape:
      tape.watch(images)
      value = distance(images)
    gradient = tape.gradient(value, images).numpy()
    direction = np.random.default_rng(8).standard_normal(images.shape)
    step = 1e-6 * direction
    expected = float(distance(images + step) - distance(images - step)) / 2e-6
    assert abs(expected) > 1e-4
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5)


def test_averaged_weights():
  found = shadow_update.averaged_weights([np.array([2.0])], [np.array([6.0])], 0.25)
  np.testing.assert_allclose(found, [[5.0]])


class TestSettings:
  @pytest.mark.parametrize(('batch_size', 'rate'), [(1, 1e-4), (4, 1e-3), (8, 2e-3)])
  def test_published_learning_rates(self, batch_size, rate):
    assert PublishedSettings().shadow_rate(batch_size) == rate
    assert PublishedSettings(shadow_learning_rate=0.5).shadow_rate(batch_size) == 0.5

  @pytest.mark.parametrize(
    'change',
    [
      {'amplitude': -1.0},
      {'temperature': 0.0},
      {'gradient_weight': float('nan')},
      {'map_momentum': 1.5},
      {'cam_weights': (0.5, 0.1)},
      {'equalization': 'adaptive'},
      {'map_kind': 'random'},
      {'shadow_steps': 0},
    ],
  )
  def test_a_bad_value_is_named(self, change):
    with pytest.raises(ValueError, match=next(iter(change))):
      PublishedSettings(**change)
