import numpy as np
import pytest
import tensorflow as tf

from attacks.optimizers import Adam, ConstantRate, CosineDecay, Lbfgs, StepDecay


def test_adam_takes_the_steps_of_keras():
  rng = np.random.default_rng(0)
  start = {'a': rng.standard_normal((2, 3)), 'b': [rng.standard_normal(4)]}
  parameters = tf.nest.map_structure(tf.constant, start)
  variables = [tf.Variable(tensor) for tensor in tf.nest.flatten(start)]
  keras = tf.keras.optimizers.Adam(0.1, epsilon=1e-12)
  adam = Adam(0.1)
  moments = adam.start(parameters)
  for iteration in range(5):
    gradient = tf.nest.map_structure(lambda t: tf.sin(3 * t) + t, parameters)
    keras.apply_gradients([(tf.sin(3 * v) + v, v) for v in variables])
    change, moments = adam.step(
      gradient, moments, tf.constant(iteration), tf.constant(1.0, tf.float64)
    )
    parameters = tf.nest.map_structure(tf.add, parameters, change)
  for found, expected in zip(tf.nest.flatten(parameters), variables, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_signed_adam_forgets_the_size_of_the_gradient():
  adam = Adam(0.1, signed=True)
  parameters = tf.zeros([3])
  changes = [
    adam.step(scale * tf.constant([1.0, -2, 0]), adam.start(parameters), tf.constant(0), 1.0)[0]
    for scale in (1.0, 1e3)
  ]
  np.testing.assert_array_equal(*changes)
  np.testing.assert_allclose(changes[0], [-0.1, 0.1, 0.0], atol=1e-6)


def test_lbfgs_solves_a_quadratic_in_every_lane():
  rng = np.random.default_rng(1)
  roots = rng.standard_normal((3, 6, 6))
  matrices = tf.constant(np.einsum('rij,rkj->rik', roots, roots) + 0.1 * np.eye(6))
  solutions = tf.constant(rng.standard_normal((3, 6)))

  def objective(parameters):
    error = tf.concat([parameters['a'], parameters['b']], axis=1) - solutions
    gradient = tf.linalg.matvec(matrices, error)
    parts = tf.split(gradient, [2, 4], axis=1)
    return tf.reduce_sum(error * gradient, axis=1) / 2, {'a': parts[0], 'b': parts[1]}

  optimizer = Lbfgs()
  parameters = {'a': tf.zeros([3, 2], tf.float64), 'b': tf.zeros([3, 4], tf.float64)}
  results = optimizer.start(parameters)
  step = tf.function(lambda p, r: optimizer.step(objective, p, r))
  for _ in range(30):
    parameters, results = step(parameters, results)
  found = np.concatenate([parameters['a'], parameters['b']], axis=1)
  np.testing.assert_allclose(found, solutions, atol=1e-5)


@pytest.mark.parametrize(
  ('schedule', 'expected'),
  [
    (CosineDecay(), [1.0, 0.5, 0.0]),
    (StepDecay(), [1.0, 0.1, 0.001]),
    (StepDecay(factor=0.5), [1.0, 0.5, 0.125]),
    (StepDecay(factor=0.5, phases=2), [1.0, 1.0, 0.125]),
    (ConstantRate(), [1.0, 1.0, 1.0]),
    (ConstantRate(warm_up=5), [0.2, 1.0, 1.0]),
  ],
)
def test_schedules(schedule, expected):
  found = [schedule(tf.constant(k), 1000, tf.float32) for k in (0, 500, 1000)]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_step_decay_starts_anew_in_every_phase():
  schedule = StepDecay(factor=0.8, phases=2)
  found = [
    float(schedule(tf.constant(k), 1000, tf.float32)) for k in (187, 188, 499, 500, 687, 688)
  ]
  assert found == pytest.approx([1, 0.8, 0.8**3, 1, 1, 0.8])
