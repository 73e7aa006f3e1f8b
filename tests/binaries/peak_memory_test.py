"""The high-water mark follows what the process holds, and can begin again."""

import numpy as np

from binaries.peak_memory import peak_memory_gib, reset_peak_memory


def test_the_mark_stays_until_it_is_reset():
  reset_peak_memory()
  before = peak_memory_gib()
  held = np.ones(2**28, np.uint8)
  assert held[-1] == 1
  del held
  assert 0.2 < peak_memory_gib() - before < 0.3
  reset_peak_memory()
  assert peak_memory_gib() - before < 0.05
