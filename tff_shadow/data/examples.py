"""One split of an image data set, held in memory."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Examples:
  """Images with their labels and sensitive regions.

  Attributes:
    images: uint8 [N, H, W, C], C = 1 or 3.
    labels: int32 [N].
    regions: uint8 [N, H, W, 1], 255 = fully inside the sensitive region. All 255 if None is given,
      or where the set names no region, so that the whole image counts as sensitive.

  Raises:
    ValueError: an array has another dtype or shape.
  """

  images: np.ndarray
  labels: np.ndarray
  regions: np.ndarray = None

  def __post_init__(self):
    if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] not in (1, 3):
      raise ValueError(
        f'images must be uint8 [N, H, W, 1 or 3], got {self.images.dtype} {list(self.images.shape)}'
      )
    count, height, width, _ = self.images.shape
    if self.labels.dtype != np.int32 or self.labels.shape != (count,):
      raise ValueError(
        f'labels must be int32 [{count}], got {self.labels.dtype} {list(self.labels.shape)}'
      )
    if self.regions is None:
      object.__setattr__(self, 'regions', np.full((count, height, width, 1), 255, np.uint8))
    if self.regions.dtype != np.uint8 or self.regions.shape != (count, height, width, 1):
      raise ValueError(
        f'regions must be uint8 {[count, height, width, 1]}, got '
        f'{self.regions.dtype} {list(self.regions.shape)}'
      )

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, indices) -> 'Examples':
    """Returns the examples at `indices` (int array [M]; repeats allowed), copied."""
    indices = np.asarray(indices, np.int64)
    return Examples(self.images[indices], self.labels[indices], self.regions[indices])

  def float_images(self) -> np.ndarray:
    """Returns the images as float32 [N, H, W, C] in [0, 1]."""
    return self.images.astype(np.float32) / np.float32(255)

  def float_regions(self) -> np.ndarray:
    """Returns the regions as float32 [N, H, W, 1] in [0, 1]."""
    return self.regions.astype(np.float32) / np.float32(255)
