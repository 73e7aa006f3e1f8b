import numpy as np
import pytest

from tests.attacks.observed_rounds import small_model
from tff_shadow.learning import RoundSampler, TrainingRun, TrainingSettings, evaluate
from tff_shadow.learning.plain_loop import PlainLoop, train_centrally
from tff_shadow.observations import ClientTraining


def _model():
  return small_model(norm='batch')


@pytest.mark.usefixtures('tff_worker')
@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_round_equals_the_federated_one(tiny_data, tmp_path, momentum):
  local = ClientTraining('sgd', 0.05, momentum, 4, 1, None)
  settings = TrainingSettings(1, local, observed_rounds=())
  federated, plain = _model(), _model()
  TrainingRun(tiny_data, federated, settings, tmp_path).train(resume=False)
  tasks = RoundSampler(tiny_data, settings).sample(1)
  PlainLoop(plain, local).train_round(
    [task.dataset for task in tasks], [len(task.truth.labels) for task in tasks]
  )
  for actual, wanted in zip(plain.get_weights(), federated.get_weights(), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_central_training_learns(tiny_data):
  model = _model()
  train_centrally(model, tiny_data, ClientTraining('sgd', 0.05, 0.0, 4, 1, None), steps=80, seed=0)
  assert evaluate(model, tiny_data.test.float_images(), tiny_data.test.labels)['f1'] > 0.9
