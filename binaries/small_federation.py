"""The federation of small images on which tables of defences measure utility and protection."""

import tensorflow as tf

from tff_shadow.data import FederatedData, Partition, load
from tff_shadow.models import Norm, build_model
from tff_shadow.observations import ClientTraining

IMAGE_SIZE = 32

# Utility: full local epochs of nine clients, and rounds, more than the undefended F1 needs to level
# off. The phantoms are learned late.
UTILITY_TRAINING = ClientTraining('sgd', 0.1, 0.0, 8, 1, None)
UTILITY_ROUNDS = {'chest_phantom': 60, 'fundus_patches': 24, 'histology_patches': 12}
_CLIENTS = 9
_CLIENT_IMAGES = {'chest_phantom': 64, 'fundus_patches': 64, 'histology_patches': 32}

# Protection: one step on one image.
ATTACKED_TRAINING = ClientTraining('sgd', 0.05, 0.0, 1, 1, 1)
_ATTACKED_IMAGES = 16


def utility_data(dataset: str, seed: int) -> FederatedData:
  """The clients of a utility run."""
  sizes = '/'.join([str(_CLIENT_IMAGES[dataset])] * _CLIENTS)
  return _load(dataset, f'sizes:{sizes}', seed)


def attacked_data(dataset: str, seed: int) -> FederatedData:
  """The clients of an attacked round; each uses one image of its own."""
  return _load(dataset, f'iid:{_ATTACKED_IMAGES}', seed)


def small_model(data: FederatedData, seed: int, norm: Norm) -> tf.keras.Model:
  """Architecture and initial weights."""
  return build_model(
    'conv_small',
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
    norm=norm,
    seed=seed,
  )


def _load(dataset: str, partition: str, seed: int) -> FederatedData:
  return load(dataset, image_size=IMAGE_SIZE, partition=Partition.parse(partition), seed=seed)
