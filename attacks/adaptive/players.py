"""What a client sends under each defence, played by the attacker with the clients' own code.

The code of local training, defence and aggregator is the one that the clients run, called here on
one client after another without a federation around it. Only the keys are the attacker's.
"""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from attacks.local_steps import LocalSteps
from tff_shadow.aggregators.shadow_noise import noised_update
from tff_shadow.data import Examples, FederatedData
from tff_shadow.errors import UserError
from tff_shadow.learning import BASELINES, BaselineDefense, ShadowNoise, keras_model_fn
from tff_shadow.learning.client_work import client_result, train_locally
from tff_shadow.learning.decoys import decoy_batches
from tff_shadow.learning.observed_round import observed_update
from tff_shadow.learning.shadow_work import ShadowWork
from tff_shadow.models import graph_function, model_from_config
from tff_shadow.observations import Observation, Truth, WeightArrays
from tff_shadow.published import PublishedDefense, PublishedSettings, standardization
from tff_shadow.published.client_shadows import ClientShadows
from tff_shadow.shadow.latents import LatentFit
from tff_shadow.shadow.noise_keys import NOISE_KEY, experiment_secret
from tff_shadow.shadow.region_maps import REGION

_UNIFORM = tff.learning.ClientWeighting.UNIFORM


def _few_elements() -> tf.data.Options:
  options = tf.data.Options()
  options.autotune.enabled = False
  options.experimental_optimization.apply_default_optimizations = False
  options.threading.private_threadpool_size = 1
  return options


# To optimise the pipeline of a handful of elements takes longer than to go through them.
_FEW_ELEMENTS = _few_elements()


class AttackersShadow(NamedTuple):
  """With what an attacker plays the published defence.

  Attributes:
    generator: Latents -> images in [0, 1]; the clients' own as pretrained, at worst.
    pixel_mean: Of each channel of public images.
    pixel_std: Their standard deviations.
    rounds: Of the whole training; the noise grows with the share that is over.
  """

  generator: tf.keras.Model
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  rounds: int

  @classmethod
  def fitted(
    cls, generator: tf.keras.Model, public_images: np.ndarray, rounds: int
  ) -> 'AttackersShadow':
    """With the scale of public images [N, H, W, C] in [0, 1]."""
    return cls(generator, *standardization(public_images), rounds)


class Equipment(NamedTuple):
  """With what an attacker plays defences that need more than their settings.

  Attributes:
    shadow: For the published defence.
    decoys: The public images of decoy noise.
  """

  shadow: AttackersShadow | None = None
  decoys: Examples | None = None


NO_EQUIPMENT = Equipment()


class _OwnSecrets(dict):
  """A secret for whoever is asked for."""

  def __missing__(self, name: str) -> bytes:
    return experiment_secret(0, name)


class Player:
  """Plays clients of one round; traced once for all of them."""

  def __init__(self, observation: Observation, shares_statistics: bool):
    """Rebuilds what the clients of `observation` ran.

    Args:
      observation: The round, under the defence that this player knows.
      shares_statistics: Whether the clients send the change of their BatchNorm statistics.
    """
    training = observation.client_training
    self._shares_statistics = shares_statistics
    self._optimizer = tff.learning.optimizers.build_sgdm(training.learning_rate, training.momentum)
    model = model_from_config(observation.model_config)
    self._model_fn = keras_model_fn(model, observation.image_shape, observation.batch_norm_sharing)
    # A client that keeps its statistics to itself starts from those of a fresh model.
    statistics = observation.global_weights.non_trainable or [
      variable.numpy() for variable in model.non_trainable_variables
    ]
    self._weights = tff.learning.models.ModelWeights(
      list(map(tf.constant, observation.global_weights.trainable)),
      list(map(tf.constant, statistics)),
    )
    self._build(model, observation.defense)
    self._train = graph_function(self._trained, model, reduce_retracing=True)

  def update(self, truth: Truth, steps: LocalSteps, key: tuple[int, int]) -> WeightArrays:
    """What a client sends, trained minus initial weights.

    Args:
      truth: Its images, labels and regions.
      steps: Its local steps.
      key: Decides the noise, but for that of DP-SGD: tensorflow-privacy draws it afresh.
    """
    key = tf.constant(key, tf.int32)
    order = np.concatenate(steps.batches)
    examples = {name: array[order] for name, array in self._examples(truth, key).items()}
    return self._update(examples, steps, key)

  def updates(
    self,
    clients: Mapping[str, Truth],
    steps: Mapping[str, LocalSteps],
    keys: Mapping[str, tuple[int, int]],
  ) -> dict[str, WeightArrays]:
    """What each of several clients with as many images in each step sends; see `update`."""
    return {name: self.update(truth, steps[name], keys[name]) for name, truth in clients.items()}

  def _update(
    self, examples: Mapping[str, np.ndarray], steps: LocalSteps, key: tf.Tensor
  ) -> WeightArrays:
    """What a client sends that trains on these, one row for each image of each step."""
    # All batches but the last are of one size.
    size = tf.constant(len(steps.batches[0]), tf.int64)
    tensors = collections.OrderedDict((name, tf.constant(own)) for name, own in examples.items())
    return observed_update(self._train(tensors, size, key))

  def _trained(self, examples: Mapping[str, tf.Tensor], size: tf.Tensor, key: tf.Tensor) -> Any:
    dataset = tf.data.Dataset.from_tensor_slices(examples).batch(size)
    return self._send(dataset.with_options(_FEW_ELEMENTS), key)

  def _build(self, model: tf.keras.Model, defense: dict[str, Any]) -> None:
    """Makes variables, which a traced function must not.

    Args:
      model: Of the architecture; its weights do not count.
      defense: `Observation.defense`.
    """
    raise NotImplementedError

  def _examples(self, truth: Truth, key: tf.Tensor) -> dict[str, np.ndarray]:
    """One row for each image."""
    return {'x': truth.images, 'y': truth.labels}

  def _send(self, dataset: tf.data.Dataset, key: tf.Tensor) -> Any:
    """Initial minus trained weights of a client with these batches, as they leave it."""
    raise NotImplementedError


class _BaselinePlayer(Player):
  """Of a baseline, or of no defence."""

  def _build(self, model, defense):
    self._defense = _baseline(defense)
    try:
      build_gradient_fn = self._defense.gradients(model)
    except ValueError as error:
      raise UserError(f'observation: defence {defense["name"]!r}: {error}') from error
    self._model = self._model_fn()
    self._gradient_fn = build_gradient_fn(self._model)

  def _send(self, dataset, key):
    # For this trace alone: with a seed that someone has set, tensorflow-privacy would draw the same
    # noise of DP-SGD for every client.
    tf.random.set_seed(None)

    def gradient_fn(batch):
      num_examples, gradients = self._gradient_fn(batch)
      return num_examples, [gradients], ()

    (update,), num_examples, _ = train_locally(
      [self._model],
      self._optimizer,
      self._weights,
      dataset,
      gradient_fn,
      self._shares_statistics,
    )
    result, *_ = client_result(self._model, update, num_examples, _UNIFORM)
    sent = self._defense.sent(tf.nest.flatten(result.update), key)
    return tf.nest.pack_sequence_as(update, sent)


class _ShadowPlayer(Player):
  """Of shadow noise of any shape and propagation."""

  def __init__(self, observation: Observation, shares_statistics: bool, decoys: Examples | None):
    self._decoys = decoys
    super().__init__(observation, shares_statistics)

  def _build(self, model, defense):
    self._noise = ShadowNoise.from_public_settings(defense)
    if self._noise.needs_decoys and self._decoys is None:
      raise UserError('decoy noise is simulated with its public images, and none were given')
    self._work = ShadowWork(
      self._model_fn,
      lambda: model,
      self._optimizer,
      self._noise,
      self._shares_statistics,
      decoy_batches(self._noise, self._decoys, model) if self._noise.needs_decoys else None,
    )

  def _examples(self, truth, key):
    keys = tf.random.experimental.stateless_split(key, len(truth.images)).numpy()
    examples = {**super()._examples(truth, key), NOISE_KEY: keys}
    return {**examples, REGION: truth.regions} if self._noise.saliency.kind == 'given' else examples

  def _send(self, dataset, key):
    result, *_ = self._work.run(self._weights, dataset, _UNIFORM)
    noised, _ = noised_update(result.update, *self._noise.added, self._noise.floor)
    return noised


class _PublishedPlayer(_BaselinePlayer):
  """Of the published method: undefended training on images that a shadow has noised.

  The shadow starts as pretrained in whatever round this is: what clients' shadows have learned in
  earlier rounds the attacker does not know.
  """

  def __init__(self, observation: Observation, shares_statistics: bool, shadow: AttackersShadow):
    self._observation = observation
    self._shadow = shadow
    super().__init__(observation, shares_statistics)

  def update(self, truth, steps, key):
    """See `Player`."""
    return self.updates({'alone': truth}, {'alone': steps}, {'alone': key})['alone']

  def updates(self, clients, steps, keys):
    """See `Player`."""
    seen = self._observation
    examples = {
      name: Examples(
        np.rint(truth.images * 255).astype(np.uint8),
        truth.labels,
        np.rint(truth.regions * 255).astype(np.uint8),
      )
      for name, truth in clients.items()
    }
    any_split = next(iter(examples.values()))
    data = FederatedData(
      seen.dataset, seen.class_names, tuple(seen.image_shape), examples, any_split, any_split
    )
    batch_size = len(next(iter(steps.values())).batches[0])
    training = dataclasses.replace(seen.client_training, batch_size=batch_size)
    sent = {}
    with tempfile.TemporaryDirectory() as directory:
      shadows = ClientShadows(
        self._published,
        data,
        self._task,
        max(self._shadow.rounds, seen.round_num),
        seen.batch_norm_sharing,
        pathlib.Path(directory),
      )
      shadows.fit_latents()
      for name, truth in clients.items():
        order = np.concatenate(steps[name].batches)
        noised, _ = shadows.prepare(name, order, training, self._weights, seen.round_num)
        own = {'x': noised, 'y': truth.labels[order]}
        sent[name] = self._update(own, steps[name], tf.constant(keys[name], tf.int32))
    return sent

  def _build(self, model, defense):
    super()._build(model, {'name': 'none'})
    self._task = model
    settings = {name: value for name, value in defense.items() if name != 'name'}
    try:
      settings['latents'] = LatentFit(**settings['latents'])
      settings['cam_weights'] = tuple(settings['cam_weights'])
      settings = PublishedSettings(**settings)
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"observation: defence 'published': {error}") from error
    # Noise that clients draw follows from secrets of theirs; the attacker draws its own.
    self._published = PublishedDefense(
      settings,
      self._shadow.generator,
      self._shadow.pixel_mean,
      self._shadow.pixel_std,
      secrets=_OwnSecrets(),
    )


def without_noise(defense: Mapping[str, Any]) -> dict[str, Any]:
  """`Observation.defense` with no more than it does to an update besides noising it.

  Raises:
    UserError: If its settings are none.
  """
  if defense['name'] not in BASELINES:
    return {'name': 'none'}
  left = _baseline(defense).without_noise()
  return {'name': 'none'} if left is None else left.public_settings()


def example_clip_norm(defense: Mapping[str, Any]) -> float | None:
  """See `BaselineDefense`, of `Observation.defense`.

  Raises:
    UserError: If its settings are none.
  """
  return _baseline(defense).example_clip_norm if defense['name'] in BASELINES else None


def _baseline(defense: Mapping[str, Any]) -> BaselineDefense:
  """Of `Observation.defense`; one that does nothing for 'none'."""
  parameters = {name: value for name, value in defense.items() if name != 'name'}
  try:
    return BASELINES.get(defense['name'], BaselineDefense)(**parameters)
  except (TypeError, ValueError) as error:
    raise UserError(f'observation: defence {defense["name"]!r}: {error}') from error


def build_player(
  observation: Observation, shares_statistics: bool, equipment: Equipment = NO_EQUIPMENT
) -> Player:
  """The player of the defence of `observation`; see `Player`.

  Args:
    observation: The round.
    shares_statistics: Whether the clients send the change of their BatchNorm statistics.
    equipment: See there.

  Raises:
    UserError: If there is none, or the settings of the defence are none.
  """
  name = observation.defense['name']
  if name == 'published':
    if equipment.shadow is None:
      raise UserError("the defence 'published' is simulated with a generator, and none was given")
    return _PublishedPlayer(observation, shares_statistics, equipment.shadow)
  if name == 'shadow':
    return _ShadowPlayer(observation, shares_statistics, equipment.decoys)
  if name != 'none' and name not in BASELINES:
    raise UserError(f'observation: there is no simulation of the defence {name!r}')
  return _BaselinePlayer(observation, shares_statistics)
