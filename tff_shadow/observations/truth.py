"""Ground truth of a logged round. Only scoring opens these files."""

import dataclasses
import pathlib

import numpy as np
from safetensors import safe_open

from tff_shadow.errors import UserError
from tff_shadow.observations.files import load_tensors, save_tensors

_METADATA = {'format': 'tff-shadow-truth', 'version': '1'}


@dataclasses.dataclass(frozen=True)
class Truth:
  """The distinct images that one client trained on in one round, in order of first use.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1].
    labels: int32 [N].
    regions: float32 [N, H, W, 1] in [0, 1], 1 where the image is sensitive.
  """

  images: np.ndarray
  labels: np.ndarray
  regions: np.ndarray

  def alone(self, image: int) -> 'Truth':
    """Of a client that has one of them."""
    return self.some(slice(image, image + 1))

  def some(self, images: slice) -> 'Truth':
    """Of a client that has several of them."""
    return Truth(self.images[images], self.labels[images], self.regions[images])

  def beside(self, others: 'Truth') -> 'Truth':
    """Of a client that has these and after them others."""
    return Truth(
      np.concatenate([self.images, others.images]),
      np.concatenate([self.labels, others.labels]),
      np.concatenate([self.regions, others.regions]),
    )


def write_truth(path: pathlib.Path, round_num: int, clients: dict[str, Truth]) -> None:
  """Writes the truth of one round."""
  tensors = {
    f'{client_id}/{field}': getattr(truth, field)
    for client_id, truth in clients.items()
    for field in ('images', 'labels', 'regions')
  }
  save_tensors(path, tensors, {**_METADATA, 'round': str(round_num)})


def read_truth(path: pathlib.Path) -> dict[str, Truth]:
  """Reads what `write_truth` wrote; UserError if missing, damaged or of another version."""
  tensors = load_tensors(path)
  with safe_open(path, framework='numpy') as file:
    metadata = file.metadata() or {}
  if any(metadata.get(key) != value for key, value in _METADATA.items()):
    raise UserError(f'{path}: not a truth file of version {_METADATA["version"]}')
  clients = dict.fromkeys(name.rpartition('/')[0] for name in sorted(tensors))
  try:
    return {
      client_id: Truth(
        *(tensors[f'{client_id}/{field}'] for field in ('images', 'labels', 'regions'))
      )
      for client_id in clients
    }
  except KeyError as error:
    raise UserError(f'{path}: damaged, {error} is missing') from error
