"""The published shadow defence as the clients run it, before each round of plain FedAvg.

Why before the round and not in it: the noise of steps 4 to 7 is in the images, and all that the
server gets is computed from the noised images. So a client prepares them with its shadow, in a
process of its own, and then takes part in an undefended round whose data they are. That the shadow,
latents, maps and clean images never leave the client needs no new proof: the TFF computation does
not have them. As state in the computation they would have to come out of it as CLIENTS-placed
values, which no `LearningProcess` returns and no MapReduceForm allows, and every round would carry
them to the worker and back. Beside that it works with any learning process and its aggregators,
runs on a GPU, which TFF's worker does not, and is how a hospital would add it to its own tf.data
pipeline. The price: in the first rounds, in which the shadow learns from the gradient of every
local step, the client trains twice, here to know its local weights and in the round.
"""

import dataclasses
import hashlib
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.data import Examples, FederatedData
from tff_shadow.errors import UserError
from tff_shadow.models import (
  batch_norm_layers,
  classification_loss,
  freeze_batch_norm,
  model_from_config,
  model_to_config,
)
from tff_shadow.observations import BatchNormSharing, ClientTraining
from tff_shadow.published import exposure, shadow_update
from tff_shadow.published.client_state import ClientState, ClientStateFiles, image_digests
from tff_shadow.published.settings import PublishedSettings
from tff_shadow.shadow import SaliencyConfig, build_region_map
from tff_shadow.shadow.generator import synthesis_variables
from tff_shadow.shadow.latents import fit_latents
from tff_shadow.shadow.noise_keys import image_keys

# Latents of small clients are fitted together, up to about so many images.
_GROUP_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class PublishedDefense:
  """The published defence in a run.

  Attributes:
    settings: Its constants.
    generator: Latents [N, ...] -> images [N, H, W, C] in [0, 1]: the shadow as pretrained.
    pixel_mean: Of each channel of public images; the method works on standardised pixels.
    pixel_std: Their standard deviations.
    seed: Decides the start of the latents.
    secrets: Each client's secret, from which the ablation 'white' draws its noise; not needed
      otherwise, for the published noise is a function of image, shadow and round.
    known_latents: A directory `client_state` of another run with the same generator, whose latents
      are taken over for images that are the same; None to fit all.
  """

  settings: PublishedSettings
  generator: tf.keras.Model
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  seed: int = 0
  secrets: dict[str, bytes] | None = None
  known_latents: pathlib.Path | None = None

  def public_settings(self) -> dict[str, Any]:
    """What an attacker may know: the method and its constants, not the shadow."""
    return {'name': 'published', **dataclasses.asdict(self.settings)}


def standardization(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel of public images [N, H, W, C] in [0, 1]."""
  mean, std = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))
  return tuple(map(float, mean)), tuple(map(float, np.maximum(std, 1e-3)))


class ClientShadows:
  """All clients' shadows of one run, with one copy of the networks that each takes its turn in."""

  def __init__(
    self,
    defense: PublishedDefense,
    data: FederatedData,
    model: tf.keras.Model,
    rounds: int,
    batch_norm_sharing: BatchNormSharing,
    directory: pathlib.Path,
  ):
    """Builds and traces everything; no latent is fitted yet.

    Args:
      defense: See there.
      data: The clients' images.
      model: The task; its architecture is copied.
      rounds: T of the schedules.
      batch_norm_sharing: 'local' is refused for a model with BatchNorm: Grad-CAM++ and the shadow's
        gradient use the running statistics of the global model, which then has none.
      directory: Where the clients keep their state.

    Raises:
      UserError: If generator, model and data do not fit together.
    """
    settings = defense.settings
    if batch_norm_layers(model) and batch_norm_sharing == 'local':
      raise UserError(
        '--defense=published uses the BatchNorm statistics of the global model:'
        ' --batch_norm_sharing must be aggregate or frozen'
      )
    if settings.map_kind == 'white' and defense.secrets is None:
      raise ValueError("map_kind 'white' needs secrets")
    if settings.cam_class >= data.num_classes:
      raise UserError(
        f'--published_cam_class={settings.cam_class}: the data has classes 0 to'
        f' {data.num_classes - 1}'
      )
    self._check_generator(defense.generator, data)
    self._defense = defense
    self._settings = settings
    self._data = data
    self._rounds = rounds
    self._files = ClientStateFiles(directory, list(data.clients))
    self._generator_digest = _digest(defense.generator)
    self._generator = _copy(defense.generator)
    self._local, self._global = _copy(model), _copy(model)
    if batch_norm_sharing == 'frozen':
      for copy in (self._local, self._global):
        freeze_batch_norm(copy)
    shadow_update.check_batch_norm(self._local)
    self._synthesis = synthesis_variables(self._generator)
    self._latents: dict[str, np.ndarray] = {}
    self._pending: dict[str, ClientState] = {}
    start = [variable.numpy() for variable in self._synthesis]
    self._states = {
      client_id: ClientState(
        np.zeros((len(examples), *data.image_shape), np.float32),
        np.zeros(len(examples), bool),
        [array.copy() for array in start],
      )
      for client_id, examples in data.clients.items()
    }
    self._trace()

  def fit_latents(self, report: Callable[[int], None] = lambda images: None) -> None:
    """Step 1 for every image that has no latent yet; each client's are saved at once.

    Args:
      report: Called with the number of images done.

    Raises:
      UserError: If latents that are there cannot be used.
    """
    known = {}
    if self._defense.known_latents is not None:
      source = ClientStateFiles(self._defense.known_latents, list(self._data.clients))
      known = source.load_latents(self._generator_digest)
    known.update(self._files.load_latents(self._generator_digest))
    loaded, done = bool(known), 0
    digests = {
      client_id: image_digests(examples.images)
      for client_id, examples in self._data.clients.items()
    }
    for group in self._groups():
      missing = {}
      for client_id in group:
        own = [(client_id, i) for i, digest in enumerate(digests[client_id]) if digest not in known]
        if own and loaded:
          logging.warning('%s: fitting the latents of %d images', client_id, len(own))
        missing.update({digests[client_id][i]: (client_id, i) for client_id, i in own})
      if missing:
        seed = np.random.SeedSequence([self._defense.seed, *group[0].encode()]).generate_state(1)
        found = fit_latents(
          self._defense.generator,
          np.concatenate(
            [self._data.clients[name].take([i]).float_images() for name, i in missing.values()]
          ),
          self._settings.latents,
          seed=int(seed[0]),
          report=lambda count, done=done: report(done + count),
        )
        known.update(zip(missing, found.latents, strict=True))
      for client_id in group:
        self._latents[client_id] = np.stack([known[digest] for digest in digests[client_id]])
        if missing or not self._files.has_latents(client_id):
          self._files.save_latents(
            client_id, self._latents[client_id], digests[client_id], self._generator_digest
          )
        done += len(digests[client_id])
      report(done)

  def _groups(self) -> list[list[str]]:
    """Clients side by side until they have enough images to be worth a trace of their own."""
    groups, images = [[]], 0
    for client_id, examples in self._data.clients.items():
      if images >= _GROUP_IMAGES:
        groups.append([])
        images = 0
      groups[-1].append(client_id)
      images += len(examples)
    return groups

  def prepare(
    self,
    client_id: str,
    order: np.ndarray,
    training: ClientTraining,
    weights: Any,
    round_num: int,
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Steps 2 to 7 for one client in one round; what it keeps of them takes effect with `commit`.

    Args:
      client_id: The client.
      order: int [M], its images in the order of the local training.
      training: The local training, with this client's batch size and this round's learning rate.
      weights: `ModelWeights` that the server sent.
      round_num: From 1.

    Returns:
      The noised images float32 [M, H, W, C] in pixel units, not clipped to [0, 1], and figures:
      'noise/image_rms', the root mean square of the noise in pixel units, and, in rounds in which
      the shadow learns, 'shadow/psnr', the mean PSNR in dB of its reconstructions.

    Raises:
      UserError: If the noise is not finite.
    """
    settings, batch_size = self._settings, training.batch_size
    optimizer = tff.learning.optimizers.build_sgdm(training.learning_rate, training.momentum)
    learns = round_num <= settings.shadow_rounds
    state = self._states[client_id]
    if learns or not state.has_map.all():
      state = ClientState(state.maps.copy(), state.has_map.copy(), state.synthesis)
    self._pending[client_id] = state
    examples, latents = self._data.clients[client_id], self._latents[client_id]
    for model in (self._global, self._local):
      tff.learning.models.ModelWeights(
        list(weights.trainable), list(weights.non_trainable)
      ).assign_weights_to(model)
    for variable, array in zip(self._synthesis, state.synthesis, strict=True):
      variable.assign(array)
    optimizer_state = optimizer.initialize(
      tuple(tf.TensorSpec(v.shape, v.dtype) for v in self._local.trainable_variables)
    )
    noised, squares = [], []
    for start in range(0, len(order), batch_size):
      chosen = order[start : start + batch_size]
      pixels, labels = _batch(examples, chosen)
      batch_latents = tf.constant(latents[chosen])
      if learns and settings.update_shadow:
        # The local weights before the pseudo step; nothing of it stays.
        target = self._pseudo_step(pixels, labels)
        before = [variable.numpy() for variable in self._synthesis]
        rate = tf.constant(settings.shadow_rate(batch_size))
        self._update_shadow(pixels, labels, batch_latents, target, rate)
      maps, errors = self._maps(state, chosen, pixels, batch_latents, learns)
      squares.append(errors)
      batch = self._noised(pixels, labels, maps, self._keys(client_id, chosen), round_num)
      if not np.isfinite(batch).all():
        raise UserError(
          f'round {round_num}: the noise of {client_id} is not finite; are the global weights, and'
          ' is --published_shadow_learning_rate small enough?'
        )
      noised.append(batch)
      if learns and settings.update_shadow:
        state.synthesis = shadow_update.averaged_weights(
          [variable.numpy() for variable in self._synthesis], before, settings.shadow_average
        )
        for variable, array in zip(self._synthesis, state.synthesis, strict=True):
          variable.assign(array)
        if start + batch_size < len(order):
          optimizer_state = self._train(optimizer, optimizer_state, batch, labels)
    images = np.concatenate(noised)
    clean = examples.images[order].astype(np.float32) / np.float32(255)
    figures = {'noise/image_rms': float(np.sqrt(np.mean(np.square(images - clean))))}
    if learns:
      errors = np.maximum(np.concatenate(squares), 1e-12)
      figures['shadow/psnr'] = float(np.mean(-10 * np.log10(errors)))
    return images, figures

  def step_seconds(self, client_id: str, batch_size: int, repeats: int = 5) -> dict[str, float]:
    """What each step costs on one batch of a client's images; nothing that is kept changes.

    Args:
      client_id: Has at least `batch_size` images and its latents.
      batch_size: Images.
      repeats: Of which the median is taken, after one that is not counted.

    Returns:
      Seconds by step: 'pseudo_step' (2), 'shadow_update' (3, all its steps of Adam), 'exposure'
      (4), 'grad_cam' (6), 'noise' (6 and 7) and, for comparison, 'gradient', that of the client's
      own local step.
    """
    chosen = np.arange(batch_size)
    pixels, labels = _batch(self._data.clients[client_id], chosen)
    latents = tf.constant(self._latents[client_id][:batch_size])
    target = self._pseudo_step(pixels, labels)
    maps, _ = self._expose(pixels, latents)
    rate = tf.constant(self._settings.shadow_rate(batch_size))
    keys, one = tf.zeros((batch_size, 2), tf.int32), tf.constant(0.1)
    steps = {
      'pseudo_step': lambda: self._pseudo_step(pixels, labels),
      'exposure': lambda: self._expose(pixels, latents),
      'grad_cam': lambda: self._region_map(pixels, labels),
      'noise': lambda: self._finish(pixels, maps, pixels[..., :1], keys, one, one),
      'gradient': lambda: self._gradients(pixels, labels),
    }
    if self._settings.update_shadow:
      steps['shadow_update'] = lambda: self._update_shadow(pixels, labels, latents, target, rate)
    models = (self._local, self._generator)
    before = [model.get_weights() for model in models]
    try:
      return {name: _median_seconds(step, repeats) for name, step in steps.items()}
    finally:
      for model, weights in zip(models, before, strict=True):
        model.set_weights(weights)

  def state_bytes(self, client_id: str) -> int:
    """Memory of what a client keeps: latents, maps and weights of its shadow."""
    state = self._states[client_id]
    arrays = (self._latents[client_id], state.maps, state.has_map, *state.synthesis)
    return sum(array.nbytes for array in arrays)

  def commit(self) -> None:
    """Ends a round that succeeded: the clients keep what they prepared for it."""
    self._states.update(self._pending)
    self._pending.clear()

  def save(self, round_num: int) -> None:
    """Saves what the clients keep after `round_num`."""
    self._files.save(self._states, round_num)

  def load(self, round_num: int) -> None:
    """Takes up what the clients kept after `round_num`; UserError if it is gone."""
    self._files.load(self._states, round_num)

  def _trace(self) -> None:
    """Traces all now: a model that TFF builds later would leave these not callable."""
    defense, settings = self._defense, self._settings
    mean, std = (tf.constant(v, tf.float32) for v in (defense.pixel_mean, defense.pixel_std))
    loss_fn = classification_loss(self._local)
    pixels = tf.TensorSpec((None, *self._data.image_shape), tf.float32)
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

    traced = tf.function(pseudo_step)
    self._pseudo_step = traced.get_concrete_function(pixels, labels)
    target = tf.nest.map_structure(
      lambda t: tf.TensorSpec(t.shape, t.dtype), self._pseudo_step.structured_outputs
    )
    if settings.update_shadow:
      self._update_shadow = tf.function(update_shadow)
      self._update_shadow.get_concrete_function(pixels, labels, latents, target, scalar)
    self._expose = tf.function(expose).get_concrete_function(pixels, latents)
    self._finish = tf.function(finish).get_concrete_function(
      pixels,
      pixels,
      tf.TensorSpec((None, *self._data.image_shape[:2], 1), tf.float32),
      tf.TensorSpec((None, 2), tf.int32),
      scalar,
      scalar,
    )
    self._gradients = tf.function(gradients).get_concrete_function(pixels, labels)
    # Logits, as a network of PyTorch gives; the class is fixed, whatever the label.
    self._region_map = build_region_map(
      SaliencyConfig(target=settings.cam_class, linear_output=True), self._global
    )

  def _maps(self, state, chosen, pixels, latents, learns) -> tuple[tf.Tensor, np.ndarray]:
    """Steps 4 and 5: the maps that this round uses, and mean squared errors where they are new."""
    seen = state.has_map[chosen]
    if not learns and seen.all():
      return tf.constant(state.maps[chosen]), np.zeros(0)
    new, errors = self._expose(pixels, latents)
    kept = exposure.averaged_map(state.maps[chosen], new, self._settings.map_momentum)
    seen = seen[:, None, None, None]
    if not learns:
      # Images that took no part while the shadow learned.
      new = tf.where(seen, state.maps[chosen], new)
      kept = new
    state.maps[chosen] = np.where(seen, kept, new)
    state.has_map[chosen] = True
    return new, errors.numpy()

  def _noised(self, pixels, labels, maps, keys, round_num) -> np.ndarray:
    """Steps 6 and 7."""
    progress = (round_num - 1) / self._rounds
    cam = tf.zeros_like(pixels[..., :1])
    if self._settings.subtract_cam:
      cam = self._region_map(pixels, labels).maps
      low, high = (f(cam, axis=(1, 2, 3), keepdims=True) for f in (tf.reduce_min, tf.reduce_max))
      cam = tf.math.divide_no_nan(cam - low, high - low)
    weight = exposure.cam_weight(progress, *self._settings.cam_weights)
    return self._finish(
      pixels, maps, cam, keys, tf.constant(weight, tf.float32), tf.constant(progress, tf.float32)
    ).numpy()

  def _keys(self, client_id: str, chosen: np.ndarray) -> tf.Tensor:
    if self._settings.map_kind != 'white':
      return tf.zeros((len(chosen), 2), tf.int32)
    return tf.constant(image_keys(self._defense.secrets[client_id], chosen, None))

  def _train(
    self,
    optimizer: tff.learning.optimizers.Optimizer,
    optimizer_state: Any,
    images: np.ndarray,
    labels: tf.Tensor,
  ) -> Any:
    """One local step on noised images, as the client takes it in the round."""
    gradients = self._gradients(tf.constant(images), labels)
    variables = self._local.trainable_variables
    optimizer_state, moved = optimizer.next(
      optimizer_state, tuple(v.read_value() for v in variables), tuple(gradients)
    )
    for variable, value in zip(variables, moved, strict=True):
      variable.assign(value)
    return optimizer_state

  def _check_generator(self, generator: tf.keras.Model, data: FederatedData) -> None:
    shape = tuple(generator.outputs[0].shape[1:])
    if shape != tuple(data.image_shape):
      raise UserError(
        f'--generator gives images of shape {shape}, the data has {tuple(data.image_shape)}; train'
        ' one with the same --image_size and --color'
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


def _digest(model: tf.keras.Model) -> str:
  """Of kinds of layers and weights; the names of layers count up from model to model."""
  kinds = [type(layer).__name__ for layer in model._flatten_layers()]
  digest = hashlib.sha256(repr(kinds).encode())
  for weight in model.get_weights():
    digest.update(weight.tobytes())
  return digest.hexdigest()


def _batch(examples: Examples, chosen: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
  batch = examples.take(chosen)
  return tf.constant(batch.float_images()), tf.constant(batch.labels)
