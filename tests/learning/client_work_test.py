"""Of the loop over a client's batches; what is trained in it is tested with the processes."""

import tensorflow as tf

from tff_shadow.learning.client_work import fold


def _last_and_sum(state, batch):
  _, (total, count) = state
  return tf.identity(batch), (total + 2 * total * tf.reduce_sum(batch), count + 1)


_START = (tf.constant([-1, -1]), (tf.constant(1), tf.constant(0)))


def test_folds_as_reduce_does():
  dataset = tf.data.Dataset.range(6, output_type=tf.int32).batch(2, drop_remainder=True)
  folded = tf.function(lambda d: fold(d, _START, _last_and_sum))(dataset)
  reduced = dataset.reduce(_START, _last_and_sum)
  tf.nest.assert_same_structure(folded, reduced)
  for own, other in zip(tf.nest.flatten(folded), tf.nest.flatten(reduced), strict=True):
    assert own.numpy().tolist() == other.numpy().tolist()
  assert folded[1][1] == 3


def test_nothing_to_fold_leaves_the_state():
  dataset = tf.data.Dataset.range(6, output_type=tf.int32).batch(2, drop_remainder=True).take(0)
  folded = tf.function(lambda d: fold(d, _START, _last_and_sum))(dataset)
  assert folded[0].numpy().tolist() == [-1, -1]
  assert folded[1][1] == 0


def test_steps_that_assign_follow_each_other():
  weight = tf.Variable(1.0)

  def step(state, batch):
    # Neither commutes with the other: any other order gives another number.
    weight.assign(3 * weight + batch)
    return state + weight

  dataset = tf.data.Dataset.from_tensor_slices(tf.range(12, dtype=tf.float32))
  total = tf.function(lambda d: fold(d, tf.zeros(()), step))(dataset)
  expected, own = 0.0, 1.0
  for batch in range(12):
    own = 3 * own + batch
    expected += own
  assert weight.numpy() == own
  assert total.numpy() == expected
