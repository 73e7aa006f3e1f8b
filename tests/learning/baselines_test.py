"""The baselines in a training run: what the server is said to see is what it sees."""

import csv

import numpy as np
import pytest

from tff_shadow.learning import TopK, TrainingRun, TrainingSettings
from tff_shadow.models import build_model
from tff_shadow.observations import ClientTraining, read_observation

pytestmark = pytest.mark.usefixtures('tff_worker')


def _train(data, run_dir, defense, norm='none', rounds=1, **kwargs):
  """Runs rounds of one local step, and returns the first observation, figures and the model."""
  model = build_model('conv_small', image_shape=(8, 8, 1), num_classes=2, norm=norm, seed=1)
  local = ClientTraining('sgd', 0.1, 0.0, batch_size=4, local_epochs=1, max_local_steps=1)
  settings = TrainingSettings(rounds, local, seed=5, defense=defense, **kwargs)
  TrainingRun(data, model, settings, run_dir).train(resume=False)
  with (run_dir / 'metrics.csv').open() as file:
    figures = next(iter(csv.DictReader(file)))
  return read_observation(run_dir / 'observations' / 'round_00001'), figures, model


def _flat(arrays):
  return np.concatenate([np.ravel(a) for a in (*arrays.trainable, *arrays.non_trainable)])


def test_changed_updates_are_observed(tiny_data, tmp_path):
  """For one of those that change a finished update; their factories have tests of their own."""
  defense = TopK(0.2)
  observation, figures, _ = _train(tiny_data, tmp_path, defense, norm='batch')
  assert observation.defense == {'name': 'top_k', 'fraction': 0.2}
  for client in observation.clients:
    sent = _flat(client.update)
    assert np.count_nonzero(sent) == round(0.2 * sent.size)
    assert (client.weight, client.dropped) == (4.0, False)
  mean = np.mean([_flat(client.update) for client in observation.clients], axis=0)
  np.testing.assert_allclose(_flat(observation.aggregate), mean, atol=1e-7)
  assert 0 < float(figures['defense/distortion']) < 1
