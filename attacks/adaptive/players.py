"""What a client sends under each defence, played by the attacker with the clients' own code.

The code of local training, defence and aggregator is the one that the clients run, called here on
one client after another without a federation around it. Only the keys are the attacker's.
"""

import collections
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from attacks.local_steps import LocalSteps
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.aggregators.shadow_noise import noised_update
from tff_shadow.errors import UserError
from tff_shadow.learning import BASELINES, BaselineDefense, ShadowNoise, keras_model_fn
from tff_shadow.learning.client_work import client_result, train_locally
from tff_shadow.learning.noise_settings import REGION
from tff_shadow.learning.shadow_work import ShadowWork
from tff_shadow.learning.training import observed_update
from tff_shadow.models import model_from_config
from tff_shadow.observations import Observation, Truth, WeightArrays
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.noise_keys import NOISE_KEY

_UNIFORM = tff.learning.ClientWeighting.UNIFORM


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
    self._train = tf.function(self._send)

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
    # All batches but the last are of one size.
    dataset = tf.data.Dataset.from_tensor_slices(collections.OrderedDict(examples))
    return observed_update(self._train(dataset.batch(len(steps.batches[0])), key))

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
    parameters = {name: value for name, value in defense.items() if name != 'name'}
    try:
      self._defense = BASELINES.get(defense['name'], BaselineDefense)(**parameters)
      build_gradient_fn = self._defense.gradients(model)
    except (TypeError, ValueError) as error:
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

  def _build(self, model, defense):
    settings = {name: value for name, value in defense.items() if name not in ('name', 'frozen')}
    settings['strength'] = NoiseStrength(**settings['strength'])
    settings['saliency'] = SaliencyConfig(**settings['saliency'])
    self._noise = ShadowNoise(**settings)
    self._work = ShadowWork(
      self._model_fn, lambda: model, self._optimizer, self._noise, self._shares_statistics
    )

  def _examples(self, truth, key):
    keys = tf.random.experimental.stateless_split(key, len(truth.images)).numpy()
    examples = {**super()._examples(truth, key), NOISE_KEY: keys}
    return {**examples, REGION: truth.regions} if self._noise.saliency.kind == 'given' else examples

  def _send(self, dataset, key):
    result, *_ = self._work.run(self._weights, dataset, _UNIFORM)
    noised, _ = noised_update(result.update, *self._noise.added, self._noise.floor)
    return noised


_PLAYERS: dict[str, type[Player]] = {
  'shadow': _ShadowPlayer,
  'none': _BaselinePlayer,
  **dict.fromkeys(BASELINES, _BaselinePlayer),
}


def build_player(observation: Observation, shares_statistics: bool) -> Player:
  """The player of the defence of `observation`; see `Player`.

  Raises:
    UserError: If there is none, or the settings of the defence are none.
  """
  name = observation.defense['name']
  if name == 'published':
    raise UserError(
      "observation: the defence 'published' cannot be simulated: its noise needs the generator"
    )
  if name not in _PLAYERS:
    raise UserError(f'observation: there is no simulation of the defence {name!r}')
  return _PLAYERS[name](observation, shares_statistics)
