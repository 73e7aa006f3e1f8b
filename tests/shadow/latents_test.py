import math

import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.shadow import LatentFit, build_generator, fit_latents
from tff_shadow.shadow.latents import start_latents

_SHAPE = (4, 4, 1)


def _linear(latent=3, seed=0, scale=1.0):
  """Linear, so that the gradient is known; returns the model and its matrix and offset."""
  rng = np.random.default_rng(seed)
  kernel = (scale * rng.standard_normal((latent, 16))).astype(np.float32)
  bias = rng.standard_normal(16).astype(np.float32)
  inputs = tf.keras.Input((latent,))
  dense = tf.keras.layers.Dense(16)
  model = tf.keras.Model(inputs, tf.keras.layers.Reshape(_SHAPE)(dense(inputs)))
  dense.set_weights([kernel, bias])
  return model, kernel.astype(np.float64), bias.astype(np.float64)


def _images(count):
  return np.random.default_rng(5).random((count, *_SHAPE)).astype(np.float32)


def _reference(kernel, bias, image, start, settings):
  """AdamW of torch.optim, one image, float64: latent, error, steps."""
  z, x = start.astype(np.float64), image.reshape(-1).astype(np.float64)
  m, v, previous, rising = np.zeros_like(z), np.zeros_like(z), math.inf, 0
  steps = 0
  for t in range(settings.steps):
    residual = z @ kernel + bias - x
    error = np.mean(residual**2)
    rising = rising + 1 if error > previous else 0
    previous = error
    if t >= settings.patience_after and rising >= settings.patience:
      break
    rate = settings.learning_rate
    for eighths in (3, 5, 7):
      if t >= eighths / 8 * settings.steps:
        rate /= 2
    gradient = 2 * kernel @ residual / 16
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    z = z * (1 - rate * settings.weight_decay)
    unbiased = np.sqrt(v / (1 - 0.999 ** (t + 1)))
    z = z - rate * (m / (1 - 0.9 ** (t + 1))) / (unbiased + 1e-8)
    steps += 1
  return z, np.mean((z @ kernel + bias - x) ** 2), steps


@pytest.mark.parametrize(
  ('settings', 'stops'),
  [
    (LatentFit(learning_rate=0.02, steps=60), False),
    (LatentFit(learning_rate=0.02, weight_decay=5.0, steps=50), False),
    # So fast that it overshoots, and the error rises for a while.
    (LatentFit(learning_rate=1.0, steps=60, patience=2, patience_after=4), True),
    (LatentFit(learning_rate=1.0, steps=60, patience=3, patience_after=12), True),
  ],
  ids=['plain', 'decay', 'stop', 'stop_later'],
)
def test_equals_the_reference(settings, stops):
  model, kernel, bias = _linear()
  images = _images(5)
  fitted = fit_latents(model, images, settings, seed=3, batch_size=2)
  assert fitted.latents.shape == (5, 3)
  starts = start_latents(model, 5, seed=3)
  expected = [
    _reference(kernel, bias, *pair, settings) for pair in zip(images, starts, strict=True)
  ]
  steps = [steps for *_, steps in expected]
  # Some of a batch stop and some do not, or at other steps.
  assert (len(set(steps)) > 1) == stops
  assert fitted.steps.tolist() == steps
  np.testing.assert_allclose(fitted.latents, [z for z, *_ in expected], rtol=2e-3, atol=2e-4)
  np.testing.assert_allclose(fitted.mse, [mse for _, mse, _ in expected], rtol=2e-3)


def test_published_learning_rate_moves_a_coordinate_by_0_29():
  # Far away, so that the gradient never turns.
  model, *_ = _linear(latent=2, scale=1e-3)
  far = np.full((1, *_SHAPE), 100, np.float32)
  settings = LatentFit(weight_decay=0.0)
  assert (settings.learning_rate, settings.steps, settings.patience) == (1e-3, 500, 5)
  fitted = fit_latents(model, far, settings, seed=0)
  moved = np.abs(fitted.latents - start_latents(model, 1, seed=0))
  np.testing.assert_allclose(moved, 0.289, atol=0.002)


def test_a_rising_error_does_not_stop_before_its_step():
  model, *_ = _linear()
  fast = LatentFit(learning_rate=1.0, steps=20, patience=1, patience_after=20)
  assert fit_latents(model, _images(3), fast, seed=0).steps.tolist() == [20] * 3


def test_neither_batches_nor_other_images_matter():
  generator, *_ = _linear(latent=6)
  images = _images(5)
  settings = LatentFit(learning_rate=0.05, steps=12)
  whole = fit_latents(generator, images, settings, seed=1)
  done = []
  parts = fit_latents(generator, images, settings, seed=1, batch_size=2, report=done.append)
  assert done == [2, 4, 5]
  fewer = fit_latents(generator, images[:2], settings, seed=1)
  assert whole.mse.shape == (5,)
  np.testing.assert_allclose(parts.latents, whole.latents, atol=1e-6)
  np.testing.assert_allclose(fewer.latents, whole.latents[:2], atol=1e-6)
  again = fit_latents(generator, images, settings, seed=1)
  np.testing.assert_array_equal(again.latents, whole.latents)
  other = fit_latents(generator, images, settings, seed=2)
  assert np.abs(other.latents - whole.latents).min(axis=1).max() > 0.01
  drawn = generator(whole.latents).numpy()
  np.testing.assert_allclose(whole.mse, ((drawn - images) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_one_trace_for_all_batches():
  model, *_ = _linear()
  traces = []

  class Counting(tf.keras.layers.Layer):
    def call(self, inputs):
      traces.append(inputs.shape)
      return inputs

  counted = tf.keras.Model(model.inputs, Counting()(model.outputs[0]))
  traces.clear()
  fit_latents(counted, _images(7), LatentFit(steps=3), seed=0, batch_size=4)
  # Of the one trace: a step, and the error at the end.
  assert traces == [(4, *_SHAPE)] * 2


def test_finds_an_image_of_its_own():
  generator = build_generator((32, 32, 1), latent_size=4, channels=4, seed=1)
  truth = generator(tf.random.stateless_normal((2, 4), (8, 8))).numpy()
  settings = LatentFit(learning_rate=0.05, steps=200, patience=20)
  fitted = fit_latents(generator, truth, settings, seed=0)
  assert fitted.mse.max() < 1e-3 < truth.var(axis=(1, 2, 3)).min()


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((2, 8, 8, 1)), r'shape \(2, 8, 8, 1\), the generator draws \(None, 4, 4, 1\)'),
    (np.zeros(_SHAPE), 'images of shape'),
    (np.zeros((0, *_SHAPE)), 'images of shape'),
    (np.full((1, *_SHAPE), np.nan), 'not finite'),
  ],
)
def test_images_that_do_not_fit(images, message):
  with pytest.raises(UserError, match=message):
    fit_latents(_linear()[0], images, seed=0)


def test_nan_names_the_image():
  model, *_ = _linear()
  images = _images(3)
  images[1] = 1e30  # Its error is infinite, and so are the moments.
  with pytest.raises(UserError, match='image 1 is not finite'):
    fit_latents(model, images, LatentFit(steps=3), seed=0)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'learning_rate': 0.0}, 'learning_rate must be a positive'),
    ({'learning_rate': math.nan}, 'learning_rate must be a positive'),
    ({'weight_decay': -1.0}, 'weight_decay'),
    ({'steps': 0}, 'steps must be at least 1'),
    ({'patience': 0}, 'patience must be at least 1'),
    ({'patience_after': -1}, 'patience_after'),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(ValueError, match=message):
    LatentFit(**change)
