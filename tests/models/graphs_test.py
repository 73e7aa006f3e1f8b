import pytest
import tensorflow as tf

from tff_shadow.models import graph_function


class Rectifier(tf.keras.layers.Layer):
  """A user's own, that branches on its input."""

  def call(self, inputs):
    if tf.reduce_mean(inputs) > 0:
      return inputs
    else:
      return 0 * inputs


def _model(layer):
  inputs = tf.keras.Input((2,))
  return tf.keras.Model(inputs, tf.keras.Sequential([layer])(inputs))


def test_layers_of_a_user_s_own_may_branch():
  model = _model(Rectifier())
  called = graph_function(lambda inputs: model(inputs), model, reduce_retracing=True)
  assert called(tf.ones((1, 2))).numpy().sum() == 2
  assert called(-tf.ones((1, 2))).numpy().sum() == 0


def test_else_python_is_traced_as_it_is():
  def branching(inputs):
    return inputs if tf.reduce_mean(inputs) > 0 else 0 * inputs

  with pytest.raises(TypeError, match='symbolic'):
    graph_function(branching, _model(tf.keras.layers.ReLU()))(tf.ones((1, 2)))
