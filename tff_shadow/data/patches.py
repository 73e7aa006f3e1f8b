"""Geometry of patches cut from one photograph: disjoint zones first, patches inside them after.

Pure functions, so that a test can prove that no pixel serves two splits.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Zones:
  """A photograph cut into square blocks, each of which belongs to one split.

  Attributes:
    layout: rows of letters, one a block: 't' train, 'v' validation, 's' test.
    block: side of a block in pixels.
  """

  layout: tuple[str, ...]
  block: int

  def blocks(self, split: str) -> list[tuple[int, int]]:
    """Returns the upper left corners (y, x) of the blocks of `split`."""
    letter = {'train': 't', 'validation': 'v', 'test': 's'}[split]
    return [
      (row * self.block, column * self.block)
      for row, letters in enumerate(self.layout)
      for column, found in enumerate(letters)
      if found == letter
    ]


def patch_corners(zones: Zones, split: str, patch: int, stride: int = 1) -> np.ndarray:
  """Returns the upper left corners (y, x) of all patches of a split, int64 [N, 2].

  Every patch of `patch` pixels lies wholly inside one block, so patches of different splits
  never share a pixel; those of one split may overlap.

  Raises:
    ValueError: a patch does not fit into a block.
  """
  if not 1 <= patch <= zones.block:
    raise ValueError(f'a patch of {patch} px does not fit into a block of {zones.block} px')
  offsets = np.arange(0, zones.block - patch + 1, stride)
  grid = np.stack(np.meshgrid(offsets, offsets, indexing='ij'), axis=-1).reshape(-1, 2)
  return np.concatenate([grid + corner for corner in zones.blocks(split)]).astype(np.int64)


def patch_means(image: np.ndarray, corners: np.ndarray, patch: int) -> np.ndarray:
  """Returns the mean of `image` [H, W] over each patch, float64 [N], by a summed-area table."""
  table = np.zeros((image.shape[0] + 1, image.shape[1] + 1))
  table[1:, 1:] = image.cumsum(0, dtype=np.float64).cumsum(1)
  y, x = corners[:, 0], corners[:, 1]
  total = table[y + patch, x + patch] - table[y, x + patch] - table[y + patch, x] + table[y, x]
  return total / patch**2


def balanced_choice(
  scores: np.ndarray, thresholds: tuple[float, float], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Chooses as many low as high scores, without replacement, in random order.

  Args:
    scores: [N].
    thresholds: label 0 is a score below the first, label 1 one above the second; what lies
      between is ambiguous and is never chosen.
    count: even; examples to choose at most.
    rng: the only source of chance.

  Returns:
    Chosen indices int64 [M] and labels int32 [M]; M < count where a class has too few.
  """
  low, high = np.flatnonzero(scores < thresholds[0]), np.flatnonzero(scores > thresholds[1])
  half = min(count // 2, len(low), len(high))
  chosen = np.concatenate(
    [rng.choice(low, half, replace=False), rng.choice(high, half, replace=False)]
  )
  labels = np.repeat(np.array([0, 1], np.int32), half)
  order = rng.permutation(2 * half)
  return chosen[order], labels[order]


def top_fraction(scores: np.ndarray, fraction: float) -> np.ndarray:
  """Returns a uint8 mask [H, W] of 255 on exactly round(fraction * H * W) highest scores.

  The area is the same for every image, so it tells nothing of the label. Ties go by position.
  """
  count = round(fraction * scores.size)
  mask = np.zeros(scores.size, np.uint8)
  mask[np.argsort(-scores.ravel(), kind='stable')[:count]] = 255
  return mask.reshape(scores.shape)
