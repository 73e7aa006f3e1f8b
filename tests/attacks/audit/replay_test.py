import dataclasses

import numpy as np
import pytest

from attacks.audit.replay import is_single_image_round, single_images, without_defense
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.observations import Truth, WeightArrays


def _round(steps=1, **options):
  images = smooth_images(4)
  clients = [(images[:3], [0, 1, 1]), (images[3:], [1])]
  observation = play_round(small_model(**options), clients, steps=steps, momentum=0.5)
  # With as many epochs as steps each step is on all images, as it was played.
  truth = {
    f'client_{k:02d}': Truth(x, np.array(y, np.int32), np.ones((len(x), 8, 8, 1), np.float32))
    for k, (x, y) in enumerate(clients)
  }
  return observation, truth


def _noised(observation):
  clients = [
    dataclasses.replace(
      own,
      update=WeightArrays(
        tuple(array + 1 for array in own.update.trainable), own.update.non_trainable
      ),
    )
    for own in observation.clients
  ]
  return dataclasses.replace(observation, clients=tuple(clients), defense={'name': 'shadow'})


@pytest.mark.parametrize('steps', [1, 3])
def test_without_the_defense_clients_send_what_they_would_have(steps):
  observation, truth = _round(steps)
  if steps > 1:
    training = dataclasses.replace(observation.client_training, batch_size=3)
    observation = dataclasses.replace(observation, client_training=training)
  replayed = without_defense(_noised(observation), truth, ['client_00', 'client_01'])
  assert replayed.defense == {'name': 'none'}
  for own, expected in zip(replayed.clients, observation.clients, strict=True):
    assert own.client_id == expected.client_id
    for array, clean in zip(own.update.trainable, expected.update.trainable, strict=True):
      np.testing.assert_allclose(array, clean, atol=2e-6)


def test_the_positive_control_is_one_step_on_one_image():
  observation, truth = _round()
  assert not is_single_image_round(observation, ['client_00', 'client_01'])
  assert is_single_image_round(observation, ['client_01'])
  single, shown = single_images(_noised(observation), truth, ['client_00', 'client_01'])
  assert is_single_image_round(single, ['client_00', 'client_01'])
  np.testing.assert_array_equal(shown['client_00'].images, truth['client_00'].images[:1])
  alone = play_round(small_model(), [(truth['client_00'].images[:1], [0])])
  for array, clean in zip(
    single.clients[0].update.trainable, alone.clients[0].update.trainable, strict=True
  ):
    np.testing.assert_allclose(array, clean, atol=2e-6)
  # That of one image sent alone is the same already.
  for array, clean in zip(
    single.clients[1].update.trainable, observation.clients[1].update.trainable, strict=True
  ):
    np.testing.assert_allclose(array, clean, atol=2e-6)


def test_shared_statistics_are_replayed_too():
  observation, truth = _round(norm='batch')
  shared = [a for a in observation.global_weights.non_trainable if a.dtype.kind == 'f']
  zeros = tuple(np.zeros_like(array) for array in shared)
  sharing = [
    dataclasses.replace(own, update=WeightArrays(own.update.trainable, zeros))
    for own in observation.clients
  ]
  replayed = without_defense(
    dataclasses.replace(observation, clients=tuple(sharing)), truth, ['client_00']
  )
  model = small_model(norm='batch')
  layer = next(own for own in model.layers if own.name.startswith('batch_norm'))
  inputs = model.layers[1](truth['client_00'].images).numpy()
  expected = (1 - layer.momentum) * inputs.mean(axis=(0, 1, 2))
  np.testing.assert_allclose(replayed.clients[0].update.non_trainable[0], expected, atol=1e-6)
