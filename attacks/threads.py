"""How many threads share one operation of an attack on the CPU."""

import os

import tensorflow as tf


def share_cores(lanes: int, op_threads: int | None = None) -> int | None:
  """Sets the threads of a single operation so that `lanes` side by side fill the cores once.

  Small convolutions gain nothing from threads of their own and lose half the time in handing work
  over: 8 lanes of `conv_small` on two cores take 12 ms an iteration with one thread an operation
  and 26 ms with two.

  Args:
    lanes: That run side by side.
    op_threads: The number itself, instead.

  Returns:
    The number of threads, or None if TensorFlow has started before, when it is too late; nothing is
    changed then.
  """
  if op_threads is None:
    op_threads = max(1, len(os.sched_getaffinity(0)) // lanes)
  try:
    tf.config.threading.set_intra_op_parallelism_threads(op_threads)
  except RuntimeError:
    return None
  return op_threads
