"""The networks of the published defence, with their steps traced once for all clients."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.models import (
  check_running_statistics,
  classification_loss,
  freeze_batch_norm,
  graph_function,
  model_from_config,
  model_to_config,
)
from tff_shadow.published import exposure, shadow_update
from tff_shadow.published.defense import PublishedDefense
from tff_shadow.shadow import SaliencyConfig, build_region_map
from tff_shadow.shadow.generator import synthesis_variables


class ShadowNetworks:
  """A copy of the shadow and two of the task model, in which each client takes its turn.

  One of the task models holds the global weights of the round, the other goes along with the
  client's local training.

  Everything is traced when this is built: a model that TFF builds later would leave these not
  callable.
  """

  def __init__(self, defense: PublishedDefense, model: tf.keras.Model, *, freeze: bool):
    """Copies and traces.

    Args:
      defense: Gives generator and settings.
      model: The task; not changed.
      freeze: Whether its BatchNorm layers are frozen.

    Raises:
      UserError: If the model's BatchNorm statistics cannot be recovered, it has no convolution for
        Grad-CAM++, or the generator has nothing to update.
    """
    self._defense = defense
    self._settings = defense.settings
    self._generator = _copy(defense.generator)
    self._local, self._global = _copy(model), _copy(model)
    if freeze:
      for copy in (self._local, self._global):
        freeze_batch_norm(copy)
    check_running_statistics(self._local)
    self._synthesis = synthesis_variables(self._generator)
    self._trace(tuple(model.inputs[0].shape[1:]))

  @property
  def synthesis(self) -> list[np.ndarray]:
    """The weights of the shadow that its update moves; settable."""
    return [variable.numpy() for variable in self._synthesis]

  @synthesis.setter
  def synthesis(self, arrays: list[np.ndarray]) -> None:
    for variable, array in zip(self._synthesis, arrays, strict=True):
      variable.assign(array)

  def start_round(self, weights: Any, optimizer: tff.learning.optimizers.Optimizer) -> Any:
    """Puts the server's `ModelWeights` into both task models; returns the optimiser's state."""
    for model in (self._global, self._local):
      tff.learning.models.ModelWeights(
        list(weights.trainable), list(weights.non_trainable)
      ).assign_weights_to(model)
    return optimizer.initialize(
      tuple(tf.TensorSpec(v.shape, v.dtype) for v in self._local.trainable_variables)
    )

  def train(
    self,
    optimizer: tff.learning.optimizers.Optimizer,
    optimizer_state: Any,
    pixels: tf.Tensor,
    labels: tf.Tensor,
  ) -> Any:
    """One local step, as the client takes it in the round; returns the optimiser's state."""
    gradients = self._gradients(pixels, labels)
    variables = self._local.trainable_variables
    optimizer_state, moved = optimizer.next(
      optimizer_state, tuple(v.read_value() for v in variables), tuple(gradients)
    )
    for variable, value in zip(variables, moved, strict=True):
      variable.assign(value)
    return optimizer_state

  def learn(self, pixels: tf.Tensor, labels: tf.Tensor, latents: tf.Tensor, rate: float) -> None:
    """Steps 2 and 3 but for the averaging: pulls the shadow towards what the batch would send."""
    target = self._pseudo_step(pixels, labels)
    self._update_shadow(pixels, labels, latents, target, tf.constant(rate))

  def expose(self, pixels: tf.Tensor, latents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Step 4: maps [B, H, W, C], and mean squared errors [B] of the reconstructions."""
    return self._expose(pixels, latents)

  def noised(
    self,
    pixels: tf.Tensor,
    labels: tf.Tensor,
    maps: tf.Tensor,
    keys: tf.Tensor,
    progress: float,
  ) -> tf.Tensor:
    """Steps 6 and 7.

    Args:
      pixels: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B].
      maps: float32 [B, H, W, C].
      keys: int32 [B, 2], for the ablation 'white'.
      progress: t / T, of rounds counted from 0.

    Returns:
      float32 [B, H, W, C], not clipped to [0, 1].
    """
    cam = tf.zeros_like(pixels[..., :1])
    if self._settings.subtract_cam:
      cam = self._region_map(pixels, labels).maps
      low, high = (f(cam, axis=(1, 2, 3), keepdims=True) for f in (tf.reduce_min, tf.reduce_max))
      cam = tf.math.divide_no_nan(cam - low, high - low)
    weight = exposure.cam_weight(progress, *self._settings.cam_weights)
    return self._finish(
      pixels, maps, cam, keys, tf.constant(weight, tf.float32), tf.constant(progress, tf.float32)
    )

  def step_seconds(
    self, pixels: tf.Tensor, labels: tf.Tensor, latents: tf.Tensor, rate: float, repeats: int
  ) -> dict[str, float]:
    """See `ClientShadows.step_seconds`."""
    target = self._pseudo_step(pixels, labels)
    maps, _ = self._expose(pixels, latents)
    keys, one = tf.zeros((len(pixels), 2), tf.int32), tf.constant(0.1)
    steps = {
      'pseudo_step': lambda: self._pseudo_step(pixels, labels),
      'exposure': lambda: self._expose(pixels, latents),
      'grad_cam': lambda: self._region_map(pixels, labels),
      'noise': lambda: self._finish(pixels, maps, pixels[..., :1], keys, one, one),
      'gradient': lambda: self._gradients(pixels, labels),
    }
    if self._settings.update_shadow:
      rate = tf.constant(rate)
      steps['shadow_update'] = lambda: self._update_shadow(pixels, labels, latents, target, rate)
    models = (self._local, self._generator)
    before = [model.get_weights() for model in models]
    try:
      return {name: _median_seconds(step, repeats) for name, step in steps.items()}
    finally:
      for model, weights in zip(models, before, strict=True):
        model.set_weights(weights)

  def _trace(self, image_shape: tuple[int, int, int]) -> None:
    defense, settings = self._defense, self._settings
    mean, std = (tf.constant(v, tf.float32) for v in (defense.pixel_mean, defense.pixel_std))
    loss_fn = classification_loss(self._local)
    pixels = tf.TensorSpec((None, *image_shape), tf.float32)
    labels = tf.TensorSpec((None,), tf.int32)
    latent_shape = self._generator.inputs[0].shape[1:]
    latents = tf.TensorSpec((None, *latent_shape), tf.float32)
    scalar = tf.TensorSpec((), tf.float32)

    def draw(latents):
      return tf.cast(self._generator(latents, training=False), tf.float32)

    def pseudo_step(pixels, labels):
      return shadow_update.pseudo_step(self._local, pixels, labels, loss_fn)

    def update_shadow(pixels, labels, latents, target, rate):
      target = shadow_update.Target(*target)
      adam = tff.learning.optimizers.build_adam(rate, epsilon=1e-8)
      variables = tuple(self._synthesis)
      images = (pixels - mean) / std

      def step(count, adam_state):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
          tape.watch(variables)
          drawn = draw(latents)
          gradient, statistics = shadow_update.gradient_of_images(
            self._global, drawn, labels, loss_fn
          )
          loss = shadow_update.shadow_loss(
            (drawn - mean) / std, images, gradient, statistics, target, settings
          )
        gradient = tape.gradient(loss, variables, unconnected_gradients='zero')
        values = tuple(variable.read_value() for variable in variables)
        adam_state, moved = adam.next(adam_state, values, gradient)
        for variable, value in zip(variables, moved, strict=True):
          variable.assign(value)
        return count + 1, adam_state

      specs = tuple(tf.TensorSpec(v.shape, v.dtype) for v in variables)
      # Anew for every batch, as the authors' code does.
      tf.while_loop(
        lambda count, _: count < settings.shadow_steps,
        step,
        (0, adam.initialize(specs)),
        parallel_iterations=1,
      )

    def expose(pixels, latents):
      drawn = draw(latents)
      maps = exposure.exposure_map(
        (drawn - mean) / std,
        (pixels - mean) / std,
        temperature=settings.temperature,
        equalization=settings.equalization,
      )
      return maps, tf.reduce_mean(tf.math.squared_difference(drawn, pixels), axis=(1, 2, 3))

    def finish(pixels, maps, cam, keys, weight, progress):
      images = (pixels - mean) / std
      if settings.subtract_cam:
        maps = exposure.subtract_cam(
          maps,
          cam,
          weight,
          top_fraction=settings.cam_top_fraction,
          temperature=settings.temperature,
        )
      noise = exposure.scaled_noise(maps, images, amplitude=settings.amplitude, progress=progress)
      if settings.map_kind == 'white':
        noise = exposure.white_noise_of_same_energy(noise, keys)
      return pixels + noise * std

    def gradients(pixels, labels):
      with tf.GradientTape() as tape:
        loss = loss_fn(labels, self._local(pixels, training=True))
        # As TFF's local training does.
        loss = tf.add_n([loss, *self._local.losses])
      return tape.gradient(
        loss, self._local.trainable_variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
      )

    traced = graph_function(pseudo_step, self._local)
    self._pseudo_step = traced.get_concrete_function(pixels, labels)
    target = tf.nest.map_structure(
      lambda t: tf.TensorSpec(t.shape, t.dtype), self._pseudo_step.structured_outputs
    )
    if settings.update_shadow:
      self._update_shadow = graph_function(update_shadow, self._global, self._generator)
      self._update_shadow.get_concrete_function(pixels, labels, latents, target, scalar)
    self._expose = graph_function(expose, self._generator).get_concrete_function(pixels, latents)
    self._finish = tf.function(finish, autograph=False).get_concrete_function(
      pixels,
      pixels,
      tf.TensorSpec((None, *image_shape[:2], 1), tf.float32),
      tf.TensorSpec((None, 2), tf.int32),
      scalar,
      scalar,
    )
    self._gradients = graph_function(gradients, self._local).get_concrete_function(pixels, labels)
    # Logits, as a network of PyTorch gives; the class is fixed, whatever the label.
    self._region_map = build_region_map(
      SaliencyConfig(target=settings.cam_class, linear_output=True), self._global
    )


def _median_seconds(step: Callable[[], Any], repeats: int) -> float:
  took = []
  for _ in range(1 + repeats):
    begin = time.perf_counter()
    step()
    took.append(time.perf_counter() - begin)
  return float(np.median(took[1:]))


def _copy(model: tf.keras.Model) -> tf.keras.Model:
  copy = model_from_config(model_to_config(model))
  copy.set_weights(model.get_weights())
  return copy
