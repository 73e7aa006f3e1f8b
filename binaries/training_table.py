"""Compares federated with central training on the embedded data sets: results/training.csv.

From the same initial weights, with the same learning rate and batch size, central training on the
pooled images takes as many steps as one client takes in all rounds (`central_f1`), or as all
clients together take (`central_all_passes_f1`): as many passes over the images as the federation
makes, and 9 times the sequential steps.
"""

import pathlib
import tempfile

import numpy as np
import tensorflow_federated as tff
from absl import flags

from binaries import command
from binaries.progress import Progress
from binaries.tables import write_table
from tff_shadow.data import EMBEDDED, Partition, load
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import TrainingRun, TrainingSettings, evaluate
from tff_shadow.learning.plain_loop import train_centrally
from tff_shadow.models import NORMS, build_model
from tff_shadow.observations import ClientTraining

_OUTPUT = flags.DEFINE_string('output', 'results/training.csv', 'CSV file to write.')
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'Rounds of federated training.', lower_bound=1)
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs with different seeds to average.', lower_bound=1)
_MODEL = flags.DEFINE_string('model', 'conv_small', 'A built-in model.')
_NORM = flags.DEFINE_enum('norm', 'group', NORMS, 'Its normalisation.')
_CLIENTS = 9
_LOCAL = ClientTraining('sgd', 0.1, 0.0, 8, 1, None)
_COLUMNS = (
  'dataset',
  'model',
  'federated_f1',
  'central_f1',
  'central_all_passes_f1',
  'rounds',
  'seeds',
)


def main() -> None:
  """Trains every set both ways."""
  rows = []
  with (
    local_worker_context(),
    Progress('training', len(EMBEDDED) * _SEEDS.value, 'runs') as progress,
  ):
    for dataset in EMBEDDED:
      scores = []
      for seed in range(_SEEDS.value):
        scores.append(_f1_scores(dataset, seed))
        shown = ', '.join(f'{score:.4f}' for score in scores[-1])
        progress.update(len(rows) * _SEEDS.value + seed + 1, f'{dataset} F1 {shown}')
      means = [f'{mean:.4f}' for mean in np.mean(scores, axis=0)]
      model = f'{_MODEL.value}/{_NORM.value}'
      values = (dataset, model, *means, _ROUNDS.value, _SEEDS.value)
      rows.append(dict(zip(_COLUMNS, values, strict=True)))
  path = pathlib.Path(_OUTPUT.value)
  write_table(path, _COLUMNS, rows)
  print(path.read_text(), end='')


def _f1_scores(dataset: str, seed: int) -> tuple[float, float, float]:
  """Federated, central with a client's steps, central with all clients' steps."""
  data = load(dataset, image_size=32, partition=Partition.parse(f'iid:{_CLIENTS}'), seed=seed)
  test_images = data.test.float_images()

  def fresh_model():
    return build_model(
      _MODEL.value,
      image_shape=tuple(data.image_shape),
      num_classes=data.num_classes,
      norm=_NORM.value,
      seed=seed,
    )

  settings = TrainingSettings(_ROUNDS.value, _LOCAL, observed_rounds=(), seed=seed)
  federated = fresh_model()
  with tempfile.TemporaryDirectory() as directory:
    TrainingRun(
      data,
      federated,
      settings,
      pathlib.Path(directory),
      evaluate_every_rounds=_ROUNDS.value,
      save_every_rounds=_ROUNDS.value,
    ).train(resume=False)
  scores = [evaluate(federated, test_images, data.test.labels)['f1']]
  steps = [-(-len(own) // _LOCAL.batch_size) for own in data.clients.values()]
  for steps_per_round in (max(steps), sum(steps)):
    central = fresh_model()
    train_centrally(central, data, _LOCAL, steps=_ROUNDS.value * steps_per_round, seed=seed)
    scores.append(evaluate(central, test_images, data.test.labels)['f1'])
  return tuple(scores)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
