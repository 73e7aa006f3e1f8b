"""A data set spread over clients, with the held-out splits of the server."""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from tff_shadow.data.examples import Examples


@dataclasses.dataclass(frozen=True)
class FederatedData:
  """The training examples of each client and the pooled validation and test splits.

  Attributes:
    name: what reports call the set, with its configuration.
    class_names: one per label, in label order.
    image_shape: (H, W, C) of every image.
    clients: client id to training examples, in the order of the partition.
    validation: examples for choosing among models.
    test: examples that only a final score may see.

  Raises:
    ValueError: there is no client, a client is empty, or a split has images of another shape.
  """

  name: str
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  clients: dict[str, Examples]
  validation: Examples
  test: Examples

  def __post_init__(self):
    if not self.clients:
      raise ValueError('clients is empty')
    for split, examples in self._splits():
      if not len(examples):
        raise ValueError(f'{split} has no examples')
      if examples.images.shape[1:] != tuple(self.image_shape):
        raise ValueError(f'{split} has images {examples.images.shape[1:]}, not {self.image_shape}')
      if examples.labels.min() < 0 or examples.labels.max() >= self.num_classes:
        raise ValueError(f'{split} has labels outside 0..{self.num_classes - 1}')

  def _splits(self):
    yield from self.clients.items()
    yield 'validation', self.validation
    yield 'test', self.test

  @property
  def num_classes(self) -> int:
    """The number of classes."""
    return len(self.class_names)

  def digest(self) -> str:
    """Returns the SHA-256 (hex) of every id, image, label and region: names the data in reports."""
    return digest_of(self._splits())


def digest_of(splits: Iterable[tuple[str, Examples]]) -> str:
  """Returns the SHA-256 (hex) of examples and the names of their splits."""
  sha = hashlib.sha256()
  for split, examples in splits:
    for part in (split, 'images', 'labels', 'regions'):
      # Length-prefixed: no two sets may run together into the same bytes.
      payload = part.encode()
      if part != split:
        array = np.ascontiguousarray(getattr(examples, part))
        sha.update(f'{part}{array.dtype.str}{array.shape}'.encode())
        payload = array.tobytes()
      sha.update(len(payload).to_bytes(8, 'little'))
      sha.update(payload)
  return sha.hexdigest()
