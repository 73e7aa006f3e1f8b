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

import hashlib
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.data import Examples, FederatedData
from tff_shadow.errors import UserError
from tff_shadow.models import batch_norm_layers
from tff_shadow.observations import BatchNormSharing, ClientTraining
from tff_shadow.published import exposure, shadow_update
from tff_shadow.published.client_state import ClientState, ClientStateFiles, image_digests
from tff_shadow.published.defense import PublishedDefense
from tff_shadow.published.networks import ShadowNetworks
from tff_shadow.shadow.latents import fit_latents
from tff_shadow.shadow.noise_keys import image_keys

# Latents of small clients are fitted together, up to about so many images.
_GROUP_IMAGES = 64


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
    self._networks = ShadowNetworks(defense, model, freeze=batch_norm_sharing == 'frozen')
    self._latents: dict[str, np.ndarray] = {}
    self._pending: dict[str, ClientState] = {}
    start = self._networks.synthesis
    self._states = {
      client_id: ClientState(
        np.zeros((len(examples), *data.image_shape), np.float32),
        np.zeros(len(examples), bool),
        list(start),
      )
      for client_id, examples in data.clients.items()
    }

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
      if len(missing) < sum(len(digests[client_id]) for client_id in group):
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
    networks = self._networks
    networks.synthesis = state.synthesis
    optimizer_state = networks.start_round(weights, optimizer)
    noised, squares = [], []
    for start in range(0, len(order), batch_size):
      chosen = order[start : start + batch_size]
      pixels, labels = _batch(examples, chosen)
      batch_latents = tf.constant(latents[chosen])
      if learns and settings.update_shadow:
        before = networks.synthesis
        networks.learn(pixels, labels, batch_latents, settings.shadow_rate(batch_size))
      maps, errors = self._maps(state, chosen, pixels, batch_latents, learns)
      squares.append(errors)
      keys = self._keys(client_id, chosen)
      progress = (round_num - 1) / self._rounds
      batch = networks.noised(pixels, labels, maps, keys, progress).numpy()
      if not np.isfinite(batch).all():
        raise UserError(
          f'round {round_num}: the noise of {client_id} is not finite; are the global weights, and'
          ' is --published_shadow_learning_rate small enough?'
        )
      noised.append(batch)
      if learns and settings.update_shadow:
        networks.synthesis = shadow_update.averaged_weights(
          networks.synthesis, before, settings.shadow_average
        )
        if start + batch_size < len(order):
          optimizer_state = networks.train(optimizer, optimizer_state, tf.constant(batch), labels)
    if learns:
      state.synthesis = networks.synthesis
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
    rate = self._settings.shadow_rate(batch_size)
    return self._networks.step_seconds(pixels, labels, latents, rate, repeats)

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

  def _maps(self, state, chosen, pixels, latents, learns) -> tuple[tf.Tensor, np.ndarray]:
    """Steps 4 and 5: the maps that this round uses, and mean squared errors where they are new."""
    seen = state.has_map[chosen]
    if not learns and seen.all():
      return tf.constant(state.maps[chosen]), np.zeros(0)
    new, errors = self._networks.expose(pixels, latents)
    kept = exposure.averaged_map(state.maps[chosen], new, self._settings.map_momentum)
    seen = seen[:, None, None, None]
    if not learns:
      # Images that took no part while the shadow learned.
      new = tf.where(seen, state.maps[chosen], new)
      kept = new
    state.maps[chosen] = np.where(seen, kept, new)
    state.has_map[chosen] = True
    return new, errors.numpy()

  def _keys(self, client_id: str, chosen: np.ndarray) -> tf.Tensor:
    if self._settings.map_kind != 'white':
      return tf.zeros((len(chosen), 2), tf.int32)
    return tf.constant(image_keys(self._defense.secrets[client_id], chosen, None))

  def _check_generator(self, generator: tf.keras.Model, data: FederatedData) -> None:
    shape = tuple(generator.outputs[0].shape[1:])
    if shape != tuple(data.image_shape):
      raise UserError(
        f'--published_generator gives images of shape {shape}, the data has'
        f' {tuple(data.image_shape)}; train one with the same --image_size and --color'
      )


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
