import numpy as np
import tensorflow as tf

from tff_shadow.aggregators.entropy import draw_key


def test_every_draw_is_another_and_all_bits_are_used():
  two = tf.function(lambda: tf.stack([draw_key(), draw_key()]))
  keys = np.concatenate([two().numpy() for _ in range(500)])
  assert keys.dtype == np.int32
  assert len(np.unique(keys, axis=0)) == len(keys)
  ones = np.unpackbits(np.ascontiguousarray(keys).view(np.uint8), axis=1).mean(axis=0)
  # Five standard errors of 64 means of 1000 bits.
  assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(keys))


def test_tensorflow_s_seed_does_not_decide_them():
  drawn = []
  for _ in range(2):
    tf.random.set_seed(1)
    drawn.append(draw_key().numpy())
  assert not np.array_equal(*drawn)
