import numpy as np
import tensorflow as tf

from tff_shadow.shadow import LatentFit, build_generator, fit_latents
from tff_shadow.shadow.inversion import invert

_SETTINGS = LatentFit(learning_rate=0.05, steps=10)


def _generator():
  return build_generator((32, 32, 1), latent_size=4, channels=2)


def test_weight_steps_come_closer_and_are_undone():
  generator = _generator()
  before = generator.get_weights()
  images = np.random.default_rng(0).random((6, 32, 32, 1)).astype(np.float32) ** 2
  found = invert(generator, images, _SETTINGS, seed=2)
  fitted = fit_latents(generator, images, _SETTINGS, seed=2)
  np.testing.assert_allclose(found.latent_mse, fitted.mse, rtol=1e-4)
  assert (found.weights_mse < found.latent_mse).all()
  np.testing.assert_allclose(
    found.weights_mse, np.mean((found.images - images) ** 2, (1, 2, 3)), rtol=1e-5
  )
  for one, other in zip(before, generator.get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)


def test_weight_steps_are_of_the_synthesis_by_adam_for_every_four_images():
  generator = _generator()
  images = np.random.default_rng(0).random((5, 32, 32, 1)).astype(np.float32)
  found = invert(generator, images, _SETTINGS, seed=2)
  latents = fit_latents(generator, images, _SETTINGS, seed=2).latents
  variables = [v for v in generator.trainable_variables if v.name.startswith('synthesis')]
  start = [variable.numpy() for variable in variables]
  for chosen in (slice(0, 4), slice(4, 5)):
    for variable, value in zip(variables, start, strict=True):
      variable.assign(value)
    adam = tf.keras.optimizers.legacy.Adam(1e-3)
    for _ in range(5):
      with tf.GradientTape() as tape:
        loss = tf.reduce_mean((generator(latents[chosen]) - images[chosen]) ** 2)
      adam.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    np.testing.assert_allclose(found.images[chosen], generator(latents[chosen]), atol=1e-4)
