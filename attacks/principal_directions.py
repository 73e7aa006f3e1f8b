"""The directions in which rows that are far longer than many differ most."""

import numpy as np

# Directions of less energy than this share of the largest are rounding.
_LEAST_ENERGY = 1e-9


def principal_directions(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """By the products of the rows, of which there are far fewer than entries.

  Args:
    rows: float32 [N, d], without their mean.
    most: Directions at most.

  Returns:
    float32 [d, r], orthonormal, the first that of the most energy; and float64 [r], the sums of
    squares of the rows along each.
  """
  energies, vectors = np.linalg.eigh(_products(rows))
  kept = np.argsort(-energies)[:most]
  kept = kept[energies[kept] > _LEAST_ENERGY * energies.max()]
  directions = rows.T @ (vectors[:, kept] / np.sqrt(energies[kept])).astype(np.float32)
  return directions, energies[kept]


def _products(rows: np.ndarray) -> np.ndarray:
  """Inner products [N, N] of rows [N, d] in float64, some columns at a time."""
  blocks = np.array_split(rows, 1 + rows.shape[1] // 4096, axis=1)
  return sum(block @ block.T for block in (own.astype(np.float64) for own in blocks))
