"""Which reconstruction stands for which true image: one assignment, used by every metric."""

import numpy as np
from scipy import optimize


def mse_matrix(reconstructions: np.ndarray, truths: np.ndarray) -> np.ndarray:
  """Mean squared errors [N, M] of every reconstruction [N, H, W, C] to every truth [M, H, W, C].

  Raises:
    ValueError: If the image shapes differ or a value is not finite.
  """
  reconstructions = np.asarray(reconstructions, np.float64)
  truths = np.asarray(truths, np.float64)
  if reconstructions.shape[1:] != truths.shape[1:]:
    raise ValueError(
      f'reconstructions have image shape {reconstructions.shape[1:]}, truths {truths.shape[1:]}'
    )
  if not (np.isfinite(reconstructions).all() and np.isfinite(truths).all()):
    raise ValueError('images must be finite')
  # A row at a time: [N, M, H, W, C] at once would be gigabytes for a large client.
  rows = [((truths - image) ** 2).mean(axis=(1, 2, 3)) for image in reconstructions]
  return np.array(rows).reshape(len(reconstructions), len(truths))


def assign(reconstructions: np.ndarray, truths: np.ndarray) -> dict[int, int]:
  """The one-to-one assignment with the smallest total MSE (Hungarian method).

  Args:
    reconstructions: [N, H, W, C] in [0, 1].
    truths: [M, H, W, C] in [0, 1].

  Returns:
    From index of a truth to index of its reconstruction; min(N, M) entries, so with unequal counts
    some truths, or some reconstructions, are in no entry.
  """
  rows, columns = optimize.linear_sum_assignment(mse_matrix(reconstructions, truths))
  return {int(truth): int(row) for row, truth in sorted(zip(rows, columns, strict=True))}


def in_order(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """`images` [N, H, W, C] in the order that comes nearest to `reference` [N, H, W, C]."""
  order = assign(images, reference)
  return images[[order[k] for k in range(len(reference))]]
