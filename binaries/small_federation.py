"""The federation of small images on which tables of defences measure utility and protection."""

import dataclasses

import numpy as np
import tensorflow as tf

from tff_shadow.data import FederatedData, Partition, load
from tff_shadow.learning import (
  RoundReport,
  TrainingSettings,
  estimate_batch_norm_statistics,
  evaluate,
)
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
_ATTACKED_CLIENTS = 16
# The same in several rounds: learned slowly, for a few images are all that there is to learn.
KEPT_TRAINING = dataclasses.replace(ATTACKED_TRAINING, learning_rate=0.005)

# What leaves an image of the modality one; a chest film is not turned over.
_OF_FILMS = ('shifts', 'brightness')
_OF_PATCHES = ('mirror', 'turns', *_OF_FILMS)


def is_usual(row: dict[str, str]) -> bool:
  """Whether a row of the frontier is of the learning rate that all defences are compared at."""
  return float(row['learning_rate']) == UTILITY_TRAINING.learning_rate


def utility_data(dataset: str, seed: int) -> FederatedData:
  """The clients of a utility run."""
  sizes = '/'.join([str(_CLIENT_IMAGES[dataset])] * _CLIENTS)
  return _load(dataset, f'sizes:{sizes}', seed)


def attacked_data(dataset: str, seed: int) -> FederatedData:
  """The clients of an attacked round; each uses one image of its own."""
  return _load(dataset, f'iid:{_ATTACKED_CLIENTS}', seed)


def kept_data(dataset: str, seed: int, images: int) -> FederatedData:
  """The clients of rounds that a server keeps; each has so many images and uses all of them."""
  return _load(dataset, f'sizes:{"/".join([str(images)] * _ATTACKED_CLIENTS)}', seed)


def variations(dataset: str) -> tuple[str, ...]:
  """How an attacker may vary public images of it, of `AUGMENTATIONS`."""
  return _OF_FILMS if dataset == 'chest_phantom' else _OF_PATCHES


def small_model(data: FederatedData, seed: int, norm: Norm) -> tf.keras.Model:
  """Architecture and initial weights."""
  return build_model(
    'conv_small',
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
    norm=norm,
    seed=seed,
  )


class UtilityF1:
  """The F1 of a utility run that evaluates every round, collected as the `report` of its training.

  Attributes:
    validation: On validation, after each round.
  """

  def __init__(self, data: FederatedData, model: tf.keras.Model, settings: TrainingSettings):
    """`model` is the one that is trained, and `settings` those of its training."""
    self.validation: list[float] = []
    self._images, self._labels = data.test.float_images(), data.test.labels
    self._model, self._settings = model, settings
    self._test: list[float] = []

  def __call__(self, report: RoundReport) -> None:
    """Takes the report of a round that has just ended."""
    self.validation.append(report.metrics['validation/f1'])
    rounds = self._settings.rounds
    if report.round_num > rounds - num_last(rounds):
      # Validation has put the round's weights into the model, if BatchNorm is local with statistics
      # of its own images.
      if self._settings.batch_norm_sharing == 'local':
        estimate_batch_norm_statistics(self._model, self._images)
      self._test.append(evaluate(self._model, self._images, self._labels)['f1'])

  @property
  def test(self) -> float:
    """On test, the mean over the last third of the rounds."""
    return float(np.mean(self._test))


def num_last(rounds: int) -> int:
  """The last third of the rounds, over which F1 is averaged: after one alone it is all noise."""
  return max(1, rounds // 3)


def _load(dataset: str, partition: str, seed: int) -> FederatedData:
  return load(dataset, image_size=IMAGE_SIZE, partition=Partition.parse(partition), seed=seed)
