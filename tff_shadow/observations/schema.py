"""What an honest-but-curious server saw of one round, as data.

An observation holds everything an attacker may know and nothing else. The images, labels and
regions it was computed from are in a separate truth file (`truth.py`) that no attack opens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

BatchNormSharing = Literal['aggregate', 'local', 'frozen']
BATCH_NORM_SHARING: tuple[BatchNormSharing, ...] = ('aggregate', 'local', 'frozen')

# In place of a client's id: the mean over all of them.
AGGREGATE = 'aggregate'


@dataclasses.dataclass(frozen=True)
class WeightArrays:
  """Model weights, or a difference of model weights, in the model's own order.

  Attributes:
    trainable: One float32 array per trainable variable.
    non_trainable: One per non-trainable variable (the statistics of BatchNorm); empty in an update
      that does not share them.
  """

  trainable: tuple[np.ndarray, ...]
  non_trainable: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClientTraining:
  """The local training that every client ran; public by the protocol.

  Attributes:
    optimizer: Name of the local optimiser; 'sgd'.
    learning_rate: Its learning rate.
    momentum: Its momentum, 0 for none.
    batch_size: Images per local step; the last step of a round may have fewer.
    local_epochs: Passes over the client's images in a round.
    max_local_steps: Most local steps in a round; None for no limit.
  """

  optimizer: str
  learning_rate: float
  momentum: float
  batch_size: int
  local_epochs: int
  max_local_steps: int | None


@dataclasses.dataclass(frozen=True)
class ClientObservation:
  """What one client sent.

  Attributes:
    client_id: Who sent it.
    num_images: Distinct images that the client trained on in this round.
    num_steps: Local steps it took.
    weight: Its weight in the mean.
    update: Trained minus initial weights, as received: after any defence.
    dropped: Whether the client dropped its update because it was not finite; it is all zeros then.
    batch_size: Images per local step, where that is not the protocol's
      (`ClientTraining.batch_size`); public as that is.
  """

  client_id: str
  num_images: int
  num_steps: int
  weight: float
  update: WeightArrays
  dropped: bool = False
  batch_size: int | None = None

  def images_per_step(self, training: ClientTraining) -> int:
    """Of this client in a protocol; the last step of a round may have fewer."""
    return training.batch_size if self.batch_size is None else self.batch_size


@dataclasses.dataclass(frozen=True)
class Observation:
  """One round as the server saw it.

  Attributes:
    round_num: The round, from 1.
    dataset: Name of the data set; tells the attacker the modality.
    image_shape: (H, W, C); images are float32 in [0, 1].
    class_names: One per class.
    model_name: Name for people; the architecture is `model_config`.
    model_config: The architecture (`tff_shadow.models.model_from_config`).
    batch_norm_sharing: What of the BatchNorm statistics was sent.
    client_training: The local training.
    defense: Public settings of the defence, with its 'name'; an attacker may use them.
    global_weights: What the server sent at the start of the round.
    clients: What came back.
    aggregate: The mean update over the clients, trained minus initial.
    public_mean_image: [H, W, C], the mean of public images of the modality (the validation split).
  """

  round_num: int
  dataset: str
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  model_name: str
  model_config: dict[str, Any]
  batch_norm_sharing: BatchNormSharing
  client_training: ClientTraining
  defense: dict[str, Any]
  global_weights: WeightArrays
  clients: tuple[ClientObservation, ...]
  aggregate: WeightArrays
  public_mean_image: np.ndarray

  def client(self, client_id: str) -> ClientObservation:
    """The observation of one client; KeyError if it took no part."""
    for client in self.clients:
      if client.client_id == client_id:
        return client
    raise KeyError(client_id)


def mean_update(clients: Sequence[ClientObservation]) -> WeightArrays:
  """The mean of what clients sent, each counting as much as its weight.

  Args:
    clients: At least one; those without a weight do not count unless all have none.
  """
  weights = np.array([client.weight for client in clients], np.float64)
  shares = weights / weights.sum() if weights.sum() > 0 else np.full(len(clients), 1 / len(clients))

  def mean(kind: str) -> tuple[np.ndarray, ...]:
    sent = (getattr(client.update, kind) for client in clients)
    return tuple(
      np.tensordot(shares, np.stack(arrays), 1).astype(arrays[0].dtype)
      for arrays in zip(*sent, strict=True)
    )

  return WeightArrays(mean('trainable'), mean('non_trainable'))
