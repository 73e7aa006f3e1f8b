"""Threads of an operation, each case in a process of its own."""

import os

import pytest
import tensorflow as tf

from attacks.threads import share_cores
from tests.binaries.programs import FORKS


def _threads(lanes, op_threads, is_late):
  """What is shared out on eight cores, and the threads of an operation, once TensorFlow is used."""
  os.sched_getaffinity = lambda pid: set(range(8))
  if is_late:
    tf.constant(1.0).numpy()
  return share_cores(lanes, op_threads), tf.config.threading.get_intra_op_parallelism_threads()


@pytest.mark.parametrize(
  ('lanes', 'op_threads', 'is_late', 'expected'),
  [
    (1, None, False, (8, 8)),
    (3, None, False, (2, 2)),
    (16, None, False, (1, 1)),
    (1, 5, False, (5, 5)),
    (4, None, True, (None, 0)),
  ],
)
def test_lanes_and_threads_fill_the_cores_once(lanes, op_threads, is_late, expected):
  with FORKS.Pool(1) as pool:
    assert pool.apply(_threads, (lanes, op_threads, is_late)) == expected
