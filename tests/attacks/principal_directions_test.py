import numpy as np

from attacks.principal_directions import principal_directions


def test_directions_are_those_of_a_singular_value_decomposition():
  rng = np.random.default_rng(0)
  # More entries than are multiplied at a time.
  rows = (rng.standard_normal((6, 6)) @ rng.standard_normal((6, 9000))).astype(np.float32)
  _, singular, expected = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
  directions, energies = principal_directions(rows, 4)
  assert directions.dtype == np.float32
  np.testing.assert_allclose(energies, singular[:4] ** 2, rtol=1e-5)
  np.testing.assert_allclose(np.abs(expected[:4] @ directions), np.eye(4), atol=1e-3)


def test_rounding_has_no_direction():
  rows = np.outer(np.arange(1, 5), np.arange(20)).astype(np.float32)
  directions, energies = principal_directions(rows, 3)
  assert directions.shape == (20, 1)
  assert len(energies) == 1
  directions, energies = principal_directions(np.zeros((3, 20), np.float32), 3)
  assert directions.shape == (20, 0)
