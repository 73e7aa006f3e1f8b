"""A round of any TFF program, from the tap to an attack."""

import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from attacks.config import AttackConfig
from attacks.engine import attack_observation
from tests.attacks.observed_rounds import small_model, smooth_images
from tff_shadow.aggregators import observation_tap_factory
from tff_shadow.learning import (
  Participant,
  build_weighted_fed_avg,
  keras_model_fn,
  model_weights,
  observation_of,
)
from tff_shadow.learning.keras_task import restore_eager_keras
from tff_shadow.models import classification_loss, freeze_batch_norm
from tff_shadow.observations import ClientTraining, read_observation, write_observation

_SHAPE = (8, 8, 1)
_RATE = 0.05
_TRAINING = ClientTraining('sgd', _RATE, 0.0, batch_size=1, local_epochs=1, max_local_steps=None)
_IMAGES = smooth_images(2)
_LABELS = np.array([1, 0], np.int32)
_CLIENTS = [Participant('north', 1), Participant('south', 1)]


def _seen(model, build):
  """What the tap of a round of two clients with one image each says, and the weights before it."""
  process = build(
    keras_model_fn(model, _SHAPE),
    tff.learning.optimizers.build_sgdm(_RATE),
    model_aggregator=observation_tap_factory(tff.aggregators.MeanFactory()),
  )
  datasets = [
    tf.data.Dataset.from_tensor_slices(
      collections.OrderedDict(x=_IMAGES[k : k + 1], y=_LABELS[k : k + 1])
    ).batch(1)
    for k in range(2)
  ]
  state = process.set_model_weights(process.initialize(), model_weights(model))
  output = process.next(state, datasets)
  restore_eager_keras(model)
  return output.metrics['aggregator']['observation'], process.get_model_weights(state)


@pytest.mark.usefixtures('tff_worker')
@pytest.mark.parametrize('stock', [True, False])
def test_what_was_tapped_is_written_and_attacked(tmp_path, stock):
  model = small_model(norm='batch')
  build = tff.learning.algorithms.build_weighted_fed_avg if stock else build_weighted_fed_avg
  observation = observation_of(*_seen(model, build), model, _TRAINING, _CLIENTS)
  assert observation.batch_norm_sharing == ('local' if stock else 'aggregate')
  loss_fn = classification_loss(model)
  for k, client in enumerate(observation.clients):
    assert (client.client_id, client.num_images, client.num_steps) == (_CLIENTS[k][0], 1, 1)
    assert (client.weight, client.dropped) == (1.0, False)
    with tf.GradientTape() as tape:
      loss = loss_fn(_LABELS[k : k + 1], model(_IMAGES[k : k + 1], training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    # Trained minus initial, so against the gradient.
    for sent, gradient in zip(client.update.trainable, gradients, strict=True):
      np.testing.assert_allclose(sent, -_RATE * gradient, atol=2e-6)
    assert len(client.update.non_trainable) == (0 if stock else 2)
  mean = np.mean([client.update.trainable[-1] for client in observation.clients], axis=0)
  np.testing.assert_allclose(observation.aggregate.trainable[-1], mean, atol=1e-7)
  for sent, variable in zip(
    observation.global_weights.trainable, model.trainable_variables, strict=True
  ):
    np.testing.assert_array_equal(sent, variable)

  write_observation(tmp_path, observation)
  config = AttackConfig(iterations=3, xla='off')
  results = attack_observation([read_observation(tmp_path)], config, ['north', 'south'])
  assert [result.status for result in results] == ['ok', 'ok']
  assert [result.labels for result in results] == [(1,), (0,)]


def _made_up(model, clients=2, **changes):
  weights = model_weights(model)
  updates = [np.stack([k * array for k in range(clients)]) for array in weights.trainable]
  seen = {'updates': updates, 'aggregate': weights.trainable, **changes}
  return seen, weights


def test_defaults_follow_from_model_and_training():
  model = small_model(num_classes=3)
  training = ClientTraining('sgd', 0.1, 0.0, batch_size=4, local_epochs=3, max_local_steps=5)
  participants = [Participant('a', 6), Participant('b', 6, batch_size=2, dropped=True)]
  observation = observation_of(*_made_up(model), model, training, participants)
  # 18 images in batches of 4, the last one short; 9 batches cut to 5.
  assert [client.num_steps for client in observation.clients] == [5, 5]
  assert observation.clients[1].dropped
  assert observation.image_shape == observation.public_mean_image.shape == _SHAPE
  assert observation.class_names == ('class 0', 'class 1', 'class 2')
  assert observation.defense == {'name': 'none'}
  # Of an unweighted aggregation, which may be a sum.
  assert [client.weight for client in observation.clients] == [1.0, 1.0]
  np.testing.assert_allclose(
    observation.aggregate.trainable[0], -0.5 * model.trainable_variables[0], rtol=1e-6
  )
  frozen = small_model(norm='batch')
  freeze_batch_norm(frozen)
  observation = observation_of(*_made_up(frozen), frozen, training, participants)
  assert observation.batch_norm_sharing == 'frozen'


def test_what_does_not_fit_is_named():
  model = small_model()
  seen, weights = _made_up(model)
  with pytest.raises(ValueError, match='participants: 1 given, 2 clients'):
    observation_of(seen, weights, model, _TRAINING, _CLIENTS[:1])
  other = small_model(num_classes=3)
  with pytest.raises(ValueError, match='global_weights: of shapes'):
    observation_of(seen, weights, other, _TRAINING, _CLIENTS)
  with pytest.raises(ValueError, match=r"seen\['updates'\]: of shapes"):
    observation_of(seen, model_weights(other), other, _TRAINING, _CLIENTS)
  for names, message in ((['a', 'a'], 'same client_id'), (['a', 'aggregate'], 'mean of all')):
    with pytest.raises(ValueError, match=f'participants: .*{message}'):
      observation_of(seen, weights, model, _TRAINING, [Participant(name, 1) for name in names])


def test_models_that_attacks_cannot_simulate_are_named():
  for model, message in (
    (small_model(num_classes=1), 'has 1 output; attacks simulate'),
    (
      tf.keras.Sequential([small_model(), tf.keras.layers.Activation('sigmoid')]),
      'ends with a sigmoid',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      observation_of(*_made_up(model), model, _TRAINING, _CLIENTS)


@pytest.mark.parametrize(
  ('weights', 'is_doubtful'),
  [([8.0, 4.0], True), ([4.0, 8.0], False), ([12.0, 24.0], False), ([1.0, 1.0], False)],
)
def test_participants_in_another_order_are_doubted(weights, is_doubtful, caplog):
  model = small_model()
  seen, sent = _made_up(model)
  seen = {**seen, 'weights': np.array(weights, np.float32), 'aggregate': seen['updates']}
  participants = [Participant('north', 4), Participant('south', 8)]
  observation_of(seen, sent, model, _TRAINING, participants)
  assert ('in the order of the data?' in caplog.text) == is_doubtful
