import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.adaptive.players import build_player
from attacks.config import AttackConfig
from attacks.labels import infer_labels
from attacks.local_steps import LocalSteps, local_steps
from attacks.matching import CosineMatching, SquaredMatching
from attacks.rectifiers import ExactRectifier, SurrogateRectifier, surrogate_relu
from attacks.simulator import ClientSimulator
from attacks.solver import Evidence, Solver
from attacks.targets import Targets
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.errors import UserError
from tff_shadow.learning import DpSgd
from tff_shadow.observations import Truth, WeightArrays


def _problem(dtype='float64', batch=2, clip_norm=None, **model_kwargs):
  images = smooth_images(batch)
  labels = [k % 2 for k in range(batch)]
  observation = play_round(small_model(**model_kwargs), [(images, labels)])
  simulator = ClientSimulator(observation, dtype, clip_norm)
  return simulator, images.astype(dtype), tf.constant(labels), observation


def _loss_and_gradient(solver, images, labels, observed):
  images = tf.constant(images)
  with tf.GradientTape() as tape:
    tape.watch(images)
    loss, _ = solver.lane_loss({'images': images}, 0, _evidence(labels, observed), tf.constant(0))
  return float(loss), tape.gradient(loss, images).numpy()


def _evidence(labels, observed):
  gradients = (tuple(tensor[None] for tensor in observed),)
  return Evidence(tf.zeros([1], tf.int32), labels[None], gradients, (), tf.zeros([1, 2], tf.int32))


def _solver(simulator, config):
  return Solver([simulator], [LocalSteps(((0, 1),))], config, matching=True)


@pytest.mark.parametrize('matching', [CosineMatching(), CosineMatching(0.5), SquaredMatching()])
@pytest.mark.parametrize(
  'model',
  [{}, {'activation': 'tanh'}, {'norm': 'batch'}, {'norm': 'group', 'clip_norm': 5.0}],
  ids=['relu', 'tanh', 'batch_norm', 'clipped'],
)
def test_gradient_of_the_matching_loss_equals_differences(matching, model):
  simulator, truth, labels, observation = _problem(**model)
  config = AttackConfig(matching=matching, rectifier=ExactRectifier(), dtype='float64')
  solver = _solver(simulator, config)
  observed = simulator.observed_gradient(observation.clients[0])
  rng = np.random.default_rng(1)
  images = rng.uniform(0.2, 0.8, truth.shape)
  _, gradient = _loss_and_gradient(solver, images, labels, observed)
  assert np.abs(gradient).max() > 1e-4
  for _ in range(4):
    direction = rng.standard_normal(images.shape)
    step = 1e-6
    ahead = _loss_and_gradient(solver, images + step * direction, labels, observed)[0]
    behind = _loss_and_gradient(solver, images - step * direction, labels, observed)[0]
    expected = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('matching', [CosineMatching(), CosineMatching(0.5), SquaredMatching()])
def test_loss_is_zero_at_the_truth_and_moves_with_the_image(matching):
  simulator, truth, labels, observation = _problem()
  solver = _solver(simulator, AttackConfig(matching=matching, dtype='float64'))
  observed = simulator.observed_gradient(observation.clients[0])
  at_truth = _loss_and_gradient(solver, truth, labels, observed)[0]
  near = _loss_and_gradient(solver, np.clip(truth + 0.02, 0, 1), labels, observed)[0]
  far = _loss_and_gradient(solver, np.clip(truth + 0.2, 0, 1), labels, observed)[0]
  assert at_truth < 1e-9
  assert 1e-5 < near < far


def test_surrogate_changes_the_derivative_but_not_the_loss():
  simulator, truth, labels, observation = _problem()
  observed = simulator.observed_gradient(observation.clients[0])
  images = np.clip(truth + 0.1, 0, 1)
  exact, surrogate = (
    _loss_and_gradient(
      _solver(simulator, AttackConfig(rectifier=rectifier, dtype='float64')),
      images,
      labels,
      observed,
    )
    for rectifier in (ExactRectifier(), SurrogateRectifier())
  )
  assert exact[0] == pytest.approx(surrogate[0], rel=1e-12)
  assert np.abs(exact[1] - surrogate[1]).max() > 1e-3 * np.abs(exact[1]).max()


def test_surrogate_relu_has_the_values_and_slope_of_relu():
  z = tf.constant([-2.0, -0.1, 0.1, 3.0])
  with tf.GradientTape() as tape:
    tape.watch(z)
    y = surrogate_relu(z, tf.constant(5.0))
  np.testing.assert_array_equal(y, tf.nn.relu(z))
  np.testing.assert_array_equal(tape.gradient(y, z), [0, 0, 1, 1])


@pytest.mark.parametrize('activation', ['relu', 'layer'])
def test_rectifiers_are_found_in_every_form(activation):
  inputs = tf.keras.Input((4, 4, 1))
  if activation == 'layer':
    x = tf.keras.layers.ReLU()(tf.keras.layers.Conv2D(4, 3)(inputs))
  else:
    x = tf.keras.layers.Conv2D(4, 3, activation='relu')(inputs)
  model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(x)))
  images = smooth_images(1, (4, 4, 1))
  simulator = ClientSimulator(play_round(model, [(images, [0])]))
  images = tf.constant(images)

  def norm_gradient(sharpness):
    with tf.GradientTape() as tape:
      tape.watch(images)
      size = tf.add_n(
        [tf.reduce_sum(g**2) for g in simulator.gradient(images, tf.constant([1]), sharpness)]
      )
    return tape.gradient(size, images).numpy()

  assert np.abs(norm_gradient(None) - norm_gradient(tf.constant(2.0))).max() > 1e-6


@pytest.mark.parametrize('sharing', ['aggregate', 'frozen'])
def test_batch_norm_is_simulated_as_trained_and_its_statistics_stay(sharing):
  model = small_model(norm='batch')
  images = smooth_images(3)
  observation = play_round(model, [(images, [0, 1, 1])], batch_norm_sharing=sharing)
  simulator = ClientSimulator(observation, 'float64')
  before = [v.numpy() for v in simulator.model.non_trainable_variables]
  gradient = simulator.gradient(tf.constant(images, tf.float64), tf.constant([0, 1, 1]))
  for simulated, observed in zip(
    gradient, simulator.observed_gradient(observation.clients[0]), strict=True
  ):
    np.testing.assert_allclose(simulated, observed, atol=3e-6)
  for old, variable in zip(before, simulator.model.non_trainable_variables, strict=True):
    np.testing.assert_array_equal(old, variable)


def test_several_steps_give_the_mean_gradient():
  images = smooth_images(2)
  observation = play_round(
    small_model(), [(images, [0, 1])], learning_rate=1e-4, steps=3, momentum=0.5
  )
  simulator = ClientSimulator(observation)
  gradient = simulator.gradient(tf.constant(images), tf.constant([0, 1]))
  observed = simulator.observed_gradient(observation.clients[0])
  # Three tiny steps at almost the same weights: the mean gradient is that of one step.
  assert float(SquaredMatching()(gradient, observed)) < 1e-3


@pytest.mark.parametrize('norm', ['none', 'batch'])
@pytest.mark.parametrize('memory', ['enough', 'short'])
def test_mean_gradient_of_large_steps_is_the_observed_one(norm, memory, monkeypatch):
  if memory == 'short':
    monkeypatch.setattr('attacks.simulator.CHECKPOINTS_BYTES', 0)
  images = smooth_images(2)
  observation = play_round(
    small_model(norm=norm),
    [(images, [0, 1])],
    learning_rate=0.5,
    steps=4,
    momentum=0.5,
  )
  simulator = ClientSimulator(observation)
  steps = local_steps(observation.clients[0], observation.client_training)
  assert steps == LocalSteps(((0, 1),) * 4)
  observed = simulator.observed_gradient(observation.clients[0])
  simulated = simulator.mean_gradient(tf.constant(images), tf.constant([0, 1]), steps)
  single = simulator.gradient(tf.constant(images), tf.constant([0, 1]))
  assert float(SquaredMatching()(simulated, observed)) < 1e-6
  assert float(SquaredMatching()(single, observed)) > 0.01
  assert simulator._checkpoint_every(4) == (1 if memory == 'enough' else 2)
  soft = simulator.mean_gradient(tf.constant(images), tf.constant([[1.0, 0], [0, 1]]), steps)
  assert float(SquaredMatching()(soft, observed)) < 1e-6


def test_steps_of_a_client_with_a_batch_size_of_its_own():
  images = tf.constant(smooth_images(4))
  labels = tf.constant([0, 1, 1, 0])
  whole = play_round(small_model(), [(images.numpy(), labels.numpy().tolist())], learning_rate=0.5)
  # The same client, in two steps of two images where the protocol has one of four.
  simulator = ClientSimulator(whole)
  first = simulator.gradient(images[:2], labels[:2])
  moved = play_round(small_model(), [(images[:2].numpy(), [0, 1])], learning_rate=0.5)
  start, change = moved.global_weights.trainable, moved.clients[0].update.trainable
  after = WeightArrays(tuple(w + d for w, d in zip(start, change, strict=True)))
  second = ClientSimulator(dataclasses.replace(moved, global_weights=after)).gradient(
    images[2:], labels[2:]
  )
  update = tuple(-0.5 * (a + b).numpy() for a, b in zip(first, second, strict=True))
  client = dataclasses.replace(
    whole.clients[0], num_steps=2, batch_size=2, update=WeightArrays(update)
  )
  observation = dataclasses.replace(whole, clients=(client,))
  target = Targets([observation], AttackConfig()).find('client_00', None)
  assert target.steps == (LocalSteps(((0, 1), (2, 3))),)
  simulated = simulator.mean_gradient(images, labels, target.steps[0])
  observed = simulator.observed_gradient(client)
  assert float(SquaredMatching()(simulated, observed)) < 1e-9
  protocol = dataclasses.replace(client, batch_size=None)
  wrong = local_steps(protocol, observation.client_training)
  assert float(SquaredMatching()(simulator.mean_gradient(images, labels, wrong), observed)) > 1e-3


@pytest.mark.parametrize('position', [0.0, 1.0])
def test_gradient_between_old_and_new_weights(position):
  images, labels = tf.constant(smooth_images(2)), tf.constant([0, 1])
  observation = play_round(small_model(), [(images.numpy(), [0, 1])], learning_rate=0.5)
  simulator = ClientSimulator(observation)
  observed = simulator.observed_gradient(observation.clients[0])
  update = [-simulator.update_over_gradient(1) * tensor for tensor in observed]
  found = simulator.gradient_between(images, labels, update, tf.constant(position))
  for variable, change in zip(simulator.model.trainable_variables, update, strict=True):
    variable.assign_add(position * change)
  for a, b in zip(found, simulator.gradient(images, labels), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_later_rounds_are_not_simulated_in_the_order_of_the_first():
  images, labels = smooth_images(4), tf.constant([0, 0, 1, 1])
  observation = play_round(small_model(seed=1), [(images, labels.numpy().tolist())])
  simulator = ClientSimulator(observation)
  first, second = LocalSteps(((0, 1), (2, 3))), LocalSteps(((0, 2), (1, 3)))
  observed = [
    simulator.mean_gradient(tf.constant(images), labels, steps) for steps in (first, second)
  ]
  evidence = _evidence(labels, observed[0])
  evidence = evidence._replace(gradients=tuple(tuple(t[None] for t in own) for own in observed))
  config = AttackConfig(matching=SquaredMatching())
  solver = Solver([simulator] * 2, [first, first], config, matching=True)
  assert 'position' in solver.start(images[None], [[0, 0]]).parameters
  own = {'images': tf.constant(images), 'position': tf.constant(0.0)}
  loss, _ = solver.lane_loss(own, 0, evidence, tf.constant(0))
  in_the_first_order = SquaredMatching()(observed[0], observed[1]) / 2
  assert float(loss) < 0.2 * float(in_the_first_order)
  # Where every step is on all images there is no order.
  whole = LocalSteps(((0, 1, 2, 3),) * 2)
  solver = Solver([simulator] * 2, [whole, whole], config, matching=True)
  assert 'position' not in solver.start(images[None], [[0, 0]]).parameters


def test_label_probabilities_and_layer_norm_are_differentiated():
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input((6, 6, 1))
  x = tf.keras.layers.Conv2D(4, 3, activation='tanh')(inputs)
  x = tf.keras.layers.LayerNormalization(epsilon=1e-6)(x)
  model = tf.keras.Model(inputs, tf.keras.layers.Dense(3)(tf.keras.layers.Flatten()(x)))
  images = smooth_images(2, (6, 6, 1)).astype('float64')
  observation = play_round(model, [(images.astype('float32'), [0, 1])])
  simulator = ClientSimulator(observation, 'float64')
  observed = simulator.observed_gradient(observation.clients[0])
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 3))
  images = np.clip(images + 0.1 * rng.standard_normal(images.shape), 0, 1)

  def loss(images, logits):
    return SquaredMatching()(simulator.gradient(images, tf.nn.softmax(logits)), observed)

  point = [tf.constant(images), tf.constant(logits)]
  with tf.GradientTape() as tape:
    tape.watch(point)
    value = loss(*point)
  for k, gradient in enumerate(tape.gradient(value, point)):
    direction = rng.standard_normal(gradient.shape)
    ends = []
    for sign in (1, -1):
      moved = list(point)
      moved[k] = moved[k] + sign * 1e-6 * direction
      ends.append(float(loss(*moved)))
    expected = (ends[0] - ends[1]) / 2e-6
    assert abs(expected) > 1e-4
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4)


@pytest.mark.parametrize(
  ('batches', 'clip_norm'),
  [(((0,),), 0.5), (((0, 1, 2),), 5.0), (((0, 1), (2, 3), (4,)), 5.0)],
  ids=['single', 'batch', 'steps'],
)
def test_clipped_gradients_are_those_of_dp_sgd(batches, clip_norm):
  steps = LocalSteps(batches)
  count = sum(map(len, batches))
  images, labels = smooth_images(count), [k % 2 for k in range(count)]
  observation = play_round(small_model(norm='group'), [(images, labels)], learning_rate=0.5)
  defense = DpSgd(clip_norm, 0.0).public_settings()
  player = build_player(dataclasses.replace(observation, defense=defense), False)
  truth = Truth(images, np.array(labels, np.int32), images)
  update = player.update(truth, steps, (0, 0)).trainable
  simulator, without = (ClientSimulator(observation, 'float32', own) for own in (clip_norm, None))
  norms = [
    float(tf.linalg.global_norm(without.gradient(one[None], tf.constant([label]))))
    for one, label in zip(images, labels, strict=True)
  ]
  assert max(norms) > clip_norm
  assert count == 1 or min(norms) < clip_norm
  scale = simulator.update_over_gradient(len(batches))
  images, labels = tf.constant(images), tf.constant(labels)
  for own, other, real in zip(
    simulator.mean_gradient(images, labels, steps),
    without.mean_gradient(images, labels, steps),
    update,
    strict=True,
  ):
    np.testing.assert_allclose(-scale * own, real, rtol=1e-4, atol=1e-6)
    assert np.abs(-scale * other - real).max() > 1e-2 * np.abs(real).max()


def test_an_image_without_a_gradient_is_not_clipped_to_nan():
  simulator, images, *_ = _problem(clip_norm=1.0)
  for variable in simulator.model.trainable_variables[-2:]:
    variable.assign(tf.zeros_like(variable))
  # The prediction is right, so there is nothing to learn.
  even = tf.fill([len(images), 2], tf.constant(0.5, tf.float64))
  images = tf.constant(images)
  with tf.GradientTape() as tape:
    tape.watch(images)
    gradient = simulator.gradient(images, even)
    size = tf.add_n([tf.reduce_sum(tensor**2) for tensor in gradient])
  assert float(size) == 0
  np.testing.assert_array_equal(tape.gradient(size, images), np.zeros(images.shape))


def test_images_that_batch_norm_mixes_are_not_clipped_one_by_one():
  model = small_model(norm='batch')
  with pytest.raises(UserError, match='mixes the images of a batch'):
    ClientSimulator(play_round(model, [(smooth_images(2), [0, 1])]), 'float32', 1.0)
  frozen = play_round(model, [(smooth_images(2), [0, 1])], batch_norm_sharing='frozen')
  ClientSimulator(frozen, 'float32', 1.0)


def test_another_optimizer_is_refused():
  observation = play_round(small_model(), [(smooth_images(1), [0])])
  training = dataclasses.replace(observation.client_training, optimizer='adam')
  with pytest.raises(UserError, match="trained with 'adam'"):
    ClientSimulator(dataclasses.replace(observation, client_training=training))


@pytest.mark.parametrize('softmax', [False, True])
def test_a_head_inside_a_nested_model_is_found(softmax):
  flat = small_model()
  if softmax:
    flat = tf.keras.Sequential([*flat.layers, tf.keras.layers.Softmax()])
  nested = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), tf.keras.layers.Rescaling(1.0), flat])
  images, labels = smooth_images(3), [0, 1, 1]
  of_flat, of_nested = (
    ClientSimulator(play_round(model, [(images, labels)])) for model in (flat, nested)
  )
  gradient = of_nested.gradient(tf.constant(images), tf.constant(labels))
  kernel, bias = of_nested.logits_layer_gradient(gradient)
  np.testing.assert_array_equal(kernel, gradient[-2])
  np.testing.assert_array_equal(bias, gradient[-1])
  for soft in (tf.constant(labels), tf.one_hot(labels, 2)):
    pairs = zip(
      of_nested.gradient(tf.constant(images), soft),
      of_flat.gradient(tf.constant(images), soft),
      strict=True,
    )
    for own, wanted in pairs:
      np.testing.assert_allclose(own, wanted, atol=1e-6)
  prediction = of_nested.mean_probabilities(tf.constant(images))
  np.testing.assert_allclose(prediction, of_flat.mean_probabilities(tf.constant(images)), atol=1e-6)
  assert infer_labels([of_nested], [gradient], 3, images).values.tolist() == labels
