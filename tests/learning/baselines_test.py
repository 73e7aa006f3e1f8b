"""The baselines in a training run: what the server is said to see is what it sees."""

import csv

import numpy as np
import pytest
import tensorflow_federated as tff

from tff_shadow.aggregators import observation_tap_factory
from tff_shadow.learning import (
  BaselineDefense,
  DpFedAvg,
  DpSgd,
  Soteria,
  TopK,
  TrainingRun,
  TrainingSettings,
  UpdateTransform,
)
from tff_shadow.models import build_model
from tff_shadow.observations import ClientTraining, read_observation

pytestmark = pytest.mark.usefixtures('tff_worker')


def _train(data, run_dir, defense, steps=1):
  """Runs a round of one local step or more; returns its observation and figures, and the model."""
  model = build_model('conv_small', image_shape=(8, 8, 1), num_classes=2, seed=1)
  local = ClientTraining('sgd', 0.1, 0.0, batch_size=4, local_epochs=1, max_local_steps=steps)
  settings = TrainingSettings(1, local, seed=5, defense=defense)
  TrainingRun(data, model, settings, run_dir).train(resume=False)
  with (run_dir / 'metrics.csv').open() as file:
    figures = next(iter(csv.DictReader(file)))
  return read_observation(run_dir / 'observations' / 'round_00001'), figures, model


def _flat(arrays):
  return np.concatenate([np.ravel(a) for a in (*arrays.trainable, *arrays.non_trainable)])


def test_changed_updates_are_observed(tiny_data, tmp_path):
  """For one of those that change a finished update; their factories have tests of their own."""
  defense = TopK(0.2)
  observation, figures, _ = _train(tiny_data, tmp_path, defense)
  assert observation.defense == {'name': 'top_k', 'fraction': 0.2}
  for client in observation.clients:
    sent = _flat(client.update)
    assert np.count_nonzero(sent) == round(0.2 * sent.size)
    assert (client.weight, client.dropped) == (4.0, False)
  mean = np.mean([_flat(client.update) for client in observation.clients], axis=0)
  np.testing.assert_allclose(_flat(observation.aggregate), mean, atol=1e-7)
  assert 0 < float(figures['defense/distortion']) < 1


class TestDpFedAvg:
  def test_clients_clip_and_the_server_adds_noise_to_the_mean(self):
    defense = DpFedAvg(clip_norm=2.0, noise_multiplier=0.5)
    size = 4000
    rng = np.random.default_rng(0)
    updates = [scale * rng.normal(size=size).astype(np.float32) for scale in (0.01, 1.0)]
    updates += [np.full(size, 1e30, np.float32), np.zeros(size, np.float32)]
    process = defense.aggregator(observation_tap_factory, 4).create(
      tff.types.to_type([(np.float32, (size,))]), tff.types.TensorType(np.float32)
    )
    state, noises = process.initialize(), []
    for _ in range(2):
      output = process.next(state, [[update] for update in updates], [1.0, 9.0, 1.0, 1.0])
      state = output.state
      seen = defense.observed(output.measurements)
      norm = np.linalg.norm(updates[1])
      # Its norm overflows: sent as zeros.
      expected = [updates[0], 2.0 * updates[1] / norm, np.zeros(size), np.zeros(size)]
      np.testing.assert_allclose(seen['updates'][0], expected, rtol=1e-5)
      np.testing.assert_allclose(seen['aggregate'][0], np.mean(expected, axis=0), atol=1e-6)
      np.testing.assert_array_equal(seen['weights'], np.ones(4))
      noises.append(output.result[0] - np.mean(expected, axis=0))
    # clip_norm noise_multiplier / clients; standard error 1.1 %.
    np.testing.assert_allclose(np.std(noises, axis=1), 0.25, rtol=0.05)
    assert abs(np.corrcoef(noises)[0, 1]) < 5 / np.sqrt(size)
    event = output.state.dp_event
    assert event.class_name == b'GaussianDpEvent'
    assert event.noise_multiplier == pytest.approx(0.5)

  def test_observation_is_before_the_noise_and_the_model_after(self, tiny_data, tmp_path):
    defense = DpFedAvg(clip_norm=0.01, noise_multiplier=3.0)
    observation, _, model = _train(tiny_data, tmp_path, defense)
    assert observation.defense == {'name': 'dp_fedavg', 'clip_norm': 0.01, 'noise_multiplier': 3.0}
    sent = [_flat(client.update) for client in observation.clients]
    np.testing.assert_allclose(np.linalg.norm(sent, axis=1), 0.01, rtol=1e-4)
    assert [client.weight for client in observation.clients] == [1.0] * 3
    np.testing.assert_allclose(_flat(observation.aggregate), np.mean(sent, axis=0), atol=1e-8)
    initial = np.concatenate([np.ravel(w) for w in observation.global_weights.trainable])
    trained = np.concatenate([np.ravel(w) for w in model.get_weights()])
    noise = trained - initial - _flat(observation.aggregate)
    assert noise.std() == pytest.approx(0.01, rel=0.05)


class TestDpSgd:
  def test_each_client_and_step_has_its_own_noise(self, tiny_data, tmp_path):
    # Clipped until next to nothing is left but noise.
    defense = DpSgd(clip_norm=1e-5, noise_multiplier=1000.0)
    observation, _, _ = _train(tiny_data, tmp_path, defense, steps=2)
    assert observation.defense['name'] == 'dp_sgd'
    sent = [_flat(client.update) for client in observation.clients]
    # Learning rate, clip_norm noise_multiplier / batch, two steps; standard error 0.3 %.
    np.testing.assert_allclose(np.std(sent, axis=1), 0.1 * 1e-2 / 4 * np.sqrt(2), rtol=0.02)
    correlations = np.corrcoef(sent) - np.eye(3)
    assert np.abs(correlations).max() < 5 / np.sqrt(sent[0].size)
    assert [client.weight for client in observation.clients] == [8.0] * 3


def test_soteria_prunes_the_last_layer(tiny_data, tmp_path):
  observation, _, _ = _train(tiny_data, tmp_path, Soteria(60.0))
  assert observation.defense == {'name': 'soteria', 'percentile': 60.0}
  for client in observation.clients:
    kernel = client.update.trainable[-2]
    assert kernel.shape == (64, 2)
    # Of 64 scores 38 are below the 60th percentile.
    assert np.count_nonzero(np.all(kernel == 0, axis=1)) == 38
    assert np.all(client.update.trainable[-1] != 0)


class TestOwnDefense:
  """What the attacker who knows it plays must be what the clients do."""

  @pytest.mark.parametrize('alone', ['aggregator', 'sent'])
  def test_half_of_it_is_refused(self, alone):
    with pytest.raises(TypeError, match=f"Half overrides '{alone}' alone"):
      type('Half', (BaselineDefense,), {'name': 'half', alone: lambda self, *args: None})

  def test_a_transform_needs_both_sides(self):
    with pytest.raises(TypeError, match="Half overrides 'aggregator' alone"):
      type('Half', (UpdateTransform,), {'name': 'half', 'on_client': lambda self, inner: None})

  def test_gradients_alone_are_a_defence(self):
    type('Own', (BaselineDefense,), {'name': 'own', 'gradients': lambda self, model: None})
