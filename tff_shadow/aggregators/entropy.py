"""Keys of noise that nobody shall be able to draw again."""

import tensorflow as tf

_KERNEL_UUID = '/proc/sys/kernel/random/uuid'


def draw_key() -> tf.Tensor:
  """A key int32 [2] from the entropy of the Linux kernel of the machine that runs this.

  Each execution, so each client and round, has its own; a stateful random op with a seed would give
  all clients the same noise. TensorFlow's own entropy (`NonDeterministicInts`, stateful random ops
  without a seed) is one generator a process that 32 bits seed, few enough to try them all.
  """
  # The kernel makes a new random UUID, of 122 random bits, for each reading.
  drawn = tf.data.TextLineDataset(_KERNEL_UUID).get_single_element()
  halves = [tf.strings.to_hash_bucket_strong(drawn + end, 2**32, [0, 0]) for end in ('/0', '/1')]
  return tf.cast(tf.stack(halves) - 2**31, tf.int32)
