"""Threads of an operation, each case in a process of its own."""

import subprocess
import sys

import pytest

_PROGRAM = """
import os, sys
import tensorflow as tf
from attacks.threads import share_cores
os.sched_getaffinity = lambda pid: set(range(8))
if sys.argv[3] == 'late':
  tf.constant(1.0).numpy()
print(share_cores(int(sys.argv[1]), int(sys.argv[2]) or None))
print(tf.config.threading.get_intra_op_parallelism_threads())
"""


@pytest.mark.parametrize(
  ('lanes', 'op_threads', 'when', 'expected'),
  [
    (1, 0, 'early', ['8', '8']),
    (3, 0, 'early', ['2', '2']),
    (16, 0, 'early', ['1', '1']),
    (1, 5, 'early', ['5', '5']),
    (4, 0, 'late', ['None', '0']),
  ],
)
def test_lanes_and_threads_fill_the_cores_once(lanes, op_threads, when, expected):
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM, str(lanes), str(op_threads), when],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  assert done.stdout.split() == expected
