"""Which clients train in a round, and on what."""

import dataclasses

import numpy as np
import tensorflow as tf

from tff_shadow.data import FederatedData, client_dataset, local_training_order
from tff_shadow.errors import UserError
from tff_shadow.learning.settings import TrainingSettings
from tff_shadow.observations import Truth
from tff_shadow.shadow.noise_keys import image_keys

# Tags that keep the streams of random numbers of a run apart.
_CLIENT_SAMPLING, _LOCAL_ORDER = 1, 2


@dataclasses.dataclass(frozen=True)
class LocalTask:
  """What one client trains on in one round.

  Attributes:
    client_id: The client.
    dataset: Batches of OrderedDict(x, y).
    order: int64 [M], which of the client's examples these are, one after another.
    truth: Its distinct images, in order of first use.
    num_steps: Local steps.
  """

  client_id: str
  dataset: tf.data.Dataset
  order: np.ndarray
  truth: Truth
  num_steps: int


class RoundSampler:
  """Draws the clients of a round and their batches; a function of the seed and the round only."""

  def __init__(self, data: FederatedData, settings: TrainingSettings):
    """Checks that there are enough clients, and that all that are named exist."""
    self._data = data
    self._settings = settings
    wanted = settings.clients_per_round
    if wanted is not None and not 1 <= wanted <= len(data.clients):
      raise UserError(
        f'--clients_per_round={wanted}: the partition has {len(data.clients)} clients'
      )

    for client_id in settings.client_batch_sizes:
      if client_id not in data.clients:
        raise UserError(
          f'--client_batch_sizes: no client {client_id!r} in the partition; it has'
          f' {", ".join(data.clients)}'
        )

  def sample(self, round_num: int) -> list[LocalTask]:
    """The local tasks of `round_num`, in the order of the data's clients."""
    ids = list(self._data.clients)
    chosen = np.arange(len(ids))
    if self._settings.clients_per_round is not None:
      rng = np.random.default_rng([self._settings.seed, _CLIENT_SAMPLING, round_num])
      chosen = np.sort(rng.choice(len(ids), self._settings.clients_per_round, replace=False))
    return [self._task(ids[index], int(index), round_num) for index in chosen]

  def _task(self, client_id: str, client_index: int, round_num: int) -> LocalTask:
    local = self._settings.client_training
    batch_size = self._settings.batch_size_of(client_id)
    examples = self._data.clients[client_id]
    rng = np.random.default_rng([self._settings.seed, _LOCAL_ORDER, round_num, client_index])
    order = local_training_order(
      len(examples), batch_size, local.local_epochs, local.max_local_steps, rng
    )
    distinct, first_use = np.unique(order, return_index=True)
    distinct = distinct[np.argsort(first_use)]
    used = examples.take(distinct)
    position = np.empty(len(examples), np.int64)
    position[distinct] = np.arange(len(distinct))
    defense = self._settings.shadow_defense
    keys = None
    if defense is not None:
      keys = image_keys(defense.secrets[client_id], distinct, None if defense.frozen else round_num)
    return LocalTask(
      client_id,
      # Only what is used travels to the worker.
      client_dataset(
        used,
        position[order],
        batch_size,
        with_regions=defense is not None and defense.noise.saliency.kind == 'given',
        noise_keys=keys,
      ),
      order,
      Truth(used.float_images(), used.labels, used.float_regions()),
      -(-len(order) // batch_size),
    )
