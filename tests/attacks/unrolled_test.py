import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from attacks.functional_model import FunctionalModel
from attacks.matching import CosineMatching, SquaredMatching
from attacks.unrolled import unrolled_sgd
from tests.attacks.observed_rounds import smooth_images

_RATE = 0.3
_SHAPE = (6, 6, 2)


def _model(dtype='float64', batch_norm=False) -> tf.keras.Model:
  tf.keras.utils.set_random_seed(0)
  layers = tf.keras.layers
  inputs = tf.keras.Input(_SHAPE, dtype=dtype)
  x = layers.Conv2D(4, 3, strides=2, dtype=dtype)(inputs)
  if batch_norm:
    x = layers.BatchNormalization(momentum=1.0, dtype=dtype)(x)
  x = layers.Flatten(dtype=dtype)(layers.Activation('tanh', dtype=dtype)(x))
  return tf.keras.Model(inputs, layers.Dense(2, dtype=dtype)(x))


def _loss(probabilities, outputs):
  # Not the fused operation: its second derivative with respect to the labels is missing.
  return -tf.reduce_mean(tf.reduce_sum(probabilities * tf.nn.log_softmax(outputs), axis=1))


def _gradient_fn(model):
  functional = FunctionalModel(model)

  def gradient(weights, inputs):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(weights)
      loss = _loss(inputs['probabilities'], functional(weights, inputs['images']))
    return tape.gradient(loss, weights)

  return gradient


def _weights(model):
  return [tf.convert_to_tensor(variable) for variable in model.trainable_variables]


def _data(dtype='float64', count=5, seed=0):
  rng = np.random.default_rng(seed)
  probabilities = rng.dirichlet((1, 1), count)
  return tf.constant(smooth_images(count, _SHAPE, seed), dtype), tf.constant(probabilities, dtype)


# Two epochs over five images in batches of two: every image is used twice, and a batch is short.
_BATCHES = [[0, 1], [2, 3], [4], [3, 0], [4, 1], [2]]


def _segments(images, probabilities, batches=_BATCHES):
  """Consecutive batches of one size make a segment."""
  groups = []
  for batch in batches:
    if groups and len(groups[-1][0]) == len(batch):
      groups[-1].append(batch)
    else:
      groups.append([batch])
  return [
    {'images': tf.gather(images, group), 'probabilities': tf.gather(probabilities, group)}
    for group in groups
  ]


def _train_with_keras(model, images, probabilities, rate, momentum, batches=_BATCHES):
  optimizer = tf.keras.optimizers.SGD(rate, momentum)
  for batch in batches:
    with tf.GradientTape() as tape:
      loss = _loss(tf.gather(probabilities, batch), model(tf.gather(images, batch), training=True))
    gradient = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradient, model.trainable_variables, strict=True))


def _train_with_tff(model, images, probabilities, rate, momentum):
  optimizer = tff.learning.optimizers.build_sgdm(rate, momentum)
  weights = _weights(model)
  state = optimizer.initialize([tf.TensorSpec(w.shape, w.dtype) for w in weights])
  for batch in _BATCHES:
    with tf.GradientTape() as tape:
      loss = _loss(tf.gather(probabilities, batch), model(tf.gather(images, batch), training=True))
    gradient = tape.gradient(loss, model.trainable_variables)
    state, weights = optimizer.next(state, weights, gradient)
    for variable, weight in zip(model.trainable_variables, weights, strict=True):
      variable.assign(weight)


# Keras, and TFF without momentum, round rates to float32: only such as 0.25 are exact in float64.
@pytest.mark.parametrize(
  ('train', 'rate', 'momentum'),
  [
    (_train_with_keras, 0.25, 0.0),
    (_train_with_keras, 0.25, 0.875),
    (_train_with_tff, 0.25, 0.0),
    (_train_with_tff, 0.3, 0.9),
  ],
  ids=['keras', 'keras_momentum', 'tff', 'tff_momentum'],
)
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-6), ('float64', 1e-12)])
def test_equals_real_training(train, rate, momentum, dtype, tolerance):
  model = _model(dtype)
  images, probabilities = _data(dtype)
  start = _weights(model)

  @tf.function
  def simulate(images, probabilities):
    segments = _segments(images, probabilities)
    return unrolled_sgd(_gradient_fn(model), start, segments, rate, momentum)

  simulated = simulate(images, probabilities)
  train(model, images, probabilities, rate, momentum)
  for a, before, after in zip(simulated, start, model.trainable_variables, strict=True):
    assert np.abs(a).max() > 0.01
    np.testing.assert_allclose(a, before - after, rtol=0, atol=tolerance)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_equals_real_training_with_batch_norm_and_changes_no_variable(momentum):
  model = _model('float32', batch_norm=True)
  batches = [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 1]]
  images, probabilities = _data('float32')
  start = model.get_weights()

  gradient_fn = _gradient_fn(model)

  def update_and_derivative(update_fn, images):
    with tf.GradientTape() as tape:
      tape.watch(images)
      update = update_fn(_weights(model), _segments(images, probabilities, batches))
      value = tf.add_n([tf.reduce_sum(u**2) for u in update])
    return update, tf.convert_to_tensor(tape.gradient(value, images))

  simulated, derivative = tf.function(update_and_derivative)(
    lambda w, s: unrolled_sgd(gradient_fn, w, s, _RATE, momentum), images
  )
  _, expected = update_and_derivative(lambda w, s: _naive(gradient_fn, w, s, momentum), images)
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_allclose(derivative, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
  for old, new in zip(start, model.get_weights(), strict=True):
    np.testing.assert_array_equal(old, new)
  before = _weights(model)
  _train_with_keras(model, images, probabilities, _RATE, momentum, batches)
  for a, b, c in zip(simulated, before, model.trainable_variables, strict=True):
    np.testing.assert_allclose(a, b - c, rtol=0, atol=2e-6)


def _naive(gradient_fn, weights, segments, momentum):
  """The same in plain Python, all of it on the caller's tape."""
  present, velocity = list(weights), [tf.zeros_like(w) for w in weights]
  for segment in segments:
    for k in range(segment['images'].shape[0]):
      gradient = gradient_fn(present, {name: x[k] for name, x in segment.items()})
      velocity = [momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
      present = [w - _RATE * v for w, v in zip(present, velocity, strict=True)]
  return [a - b for a, b in zip(weights, present, strict=True)]


def _derivatives(update_fn, model, batches=_BATCHES):
  """Of a function of the update, with respect to images, label probabilities and weights."""
  images, probabilities = _data()
  with tf.GradientTape() as tape:
    sources = (images, probabilities, _weights(model))
    tape.watch(sources)
    update = update_fn(sources[2], _segments(images, probabilities, batches))
    value = tf.add_n([tf.reduce_sum(tf.sin(40 * u)) for u in update])
  return [tf.convert_to_tensor(d) for d in tf.nest.flatten(tape.gradient(value, sources))]


@pytest.mark.parametrize('traced', [False, True], ids=['eager', 'traced'])
@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('every', [1, 2, 9])
def test_derivative_equals_that_of_a_naive_loop(every, momentum, traced):
  model = _model()
  gradient_fn = _gradient_fn(model)
  batches = [[0, 1], [2, 3], [4, 1], [1, 3], [0, 2], [4], [2], [0]]
  expected = _derivatives(lambda w, s: _naive(gradient_fn, w, s, momentum), model, batches)

  def derivatives():
    return _derivatives(
      lambda w, s: unrolled_sgd(gradient_fn, w, s, _RATE, momentum, checkpoint_every=every),
      model,
      batches,
    )

  actual = tf.function(derivatives)() if traced else derivatives()
  for a, b in zip(actual, expected, strict=True):
    assert np.abs(b).max() > 1e-2
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('batches', [[[0, 1]], [[0], [1]], [[0, 1], [2]]])
def test_derivative_of_few_steps(batches):
  model = _model()
  gradient_fn = _gradient_fn(model)
  expected = _derivatives(lambda w, s: _naive(gradient_fn, w, s, 0.5), model, batches)
  actual = _derivatives(lambda w, s: unrolled_sgd(gradient_fn, w, s, _RATE, 0.5), model, batches)
  for a, b in zip(actual, expected, strict=True):
    assert np.abs(b).max() > 1e-2
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
  ('matching', 'every'), [(CosineMatching(), 1), (SquaredMatching(), 2)], ids=['cosine', 'l2']
)
def test_gradient_of_the_matching_loss_equals_differences(matching, every):
  model = _model()
  gradient_fn = _gradient_fn(model)
  truth = _data()
  observed = unrolled_sgd(gradient_fn, _weights(model), _segments(*truth), _RATE, 0.5)

  @tf.function
  def loss_and_gradient(images, probabilities):
    with tf.GradientTape() as tape:
      tape.watch((images, probabilities))
      update = unrolled_sgd(
        gradient_fn,
        _weights(model),
        _segments(images, probabilities),
        _RATE,
        0.5,
        checkpoint_every=every,
      )
      loss = matching(update, observed)
    return loss, *map(tf.convert_to_tensor, tape.gradient(loss, (images, probabilities)))

  assert loss_and_gradient(*truth)[0] < 1e-12
  points = _data(seed=3)
  _, *gradients = loss_and_gradient(*points)
  rng = np.random.default_rng(1)
  for which, gradient in enumerate(gradients):
    assert np.abs(gradient).max() > 1e-3
    for _ in range(3):
      direction = np.zeros(2, object)
      direction[which] = rng.standard_normal(points[which].shape)
      step = 1e-5
      ahead, behind = (
        float(loss_and_gradient(*[p + s * d for p, d in zip(points, direction, strict=True)])[0])
        for s in (step, -step)
      )
      np.testing.assert_allclose(
        np.sum(gradient * direction[which]), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9
      )


def _attack_step(model, steps, every, jit_compile=False):
  """One attack iteration on `steps` local steps with integer labels, traced."""
  functional = FunctionalModel(model)

  def gradient_fn(weights, inputs):
    images, labels = inputs
    with tf.GradientTape() as tape:
      tape.watch(weights)
      losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, functional(weights, images))
      loss = tf.reduce_mean(losses)
    return tape.gradient(loss, weights)

  labels = np.ones((steps, 2), np.int32)

  def iteration(images, labels=labels):
    with tf.GradientTape() as tape:
      tape.watch(images)
      update = unrolled_sgd(
        gradient_fn, _weights(model), [(images, labels)], _RATE, 0.9, checkpoint_every=every
      )
      loss = tf.add_n([tf.reduce_sum(u**2) for u in update])
    return loss, tape.gradient(loss, images)

  images = tf.constant(smooth_images(2 * steps, _SHAPE).reshape(steps, 2, *_SHAPE))
  function = tf.function(iteration, jit_compile=jit_compile)
  return function, images


def _num_ops(graph_def) -> int:
  return len(graph_def.node) + sum(len(f.node_def) for f in graph_def.library.function)


@pytest.mark.parametrize('every', [1, 3])
def test_graph_does_not_grow_with_the_steps(every):
  model = _model('float32')
  few, many = (
    _num_ops(function.get_concrete_function(images).graph.as_graph_def())
    for function, images in (_attack_step(model, steps, every) for steps in (10, 40))
  )
  assert few == many > 100


@pytest.mark.parametrize('every', [1, 2])
def test_compiled_equals_plain(every):
  model = _model('float32')
  (plain, images), (compiled, _) = (_attack_step(model, 3, every, jit) for jit in (False, True))
  for a, b in zip(plain(images), compiled(images), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_descends_inside_a_loop_of_iterations():
  function, images = _attack_step(_model('float32'), 3, 2)

  @tf.function
  def many(images):
    def body(k, images):
      return k + 1, images - 0.05 * function(images)[1]

    return tf.while_loop(lambda k, _: k < 5, body, (0, images))[1]

  assert function(many(images))[0] < 0.9 * function(images)[0]


@pytest.mark.parametrize(
  ('segments', 'options', 'message'),
  [
    ([(np.zeros((3, 1)), np.zeros((2, 1)))], {}, 'one known leading axis'),
    ([(np.zeros((3, 1)), np.zeros(()))], {}, 'one known leading axis'),
    ([np.zeros((3, 1))], {'momentum': 1.0}, 'momentum: 1.0'),
    ([np.zeros((3, 1))], {'checkpoint_every': 0}, 'checkpoint_every: 0'),
  ],
)
def test_bad_arguments_are_refused(segments, options, message):
  with pytest.raises(ValueError, match=message):
    unrolled_sgd(lambda w, x: w, [tf.zeros(2)], segments, 0.1, **options)


def test_unknown_number_of_steps_is_refused():
  @tf.function(input_signature=[tf.TensorSpec((None, 1))])
  def simulate(inputs):
    return unrolled_sgd(lambda w, x: w, [tf.zeros(2)], [inputs], 0.1)

  with pytest.raises(ValueError, match='one known leading axis'):
    simulate(tf.zeros((3, 1)))
