"""Prints ratios of times taken side by side in one run: `BENCH <name> <ratio>`."""

import resource
import time
from collections.abc import Callable

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.benchmark import bench_lines
from binaries import command
from tff_shadow.data import Partition, load
from tff_shadow.execution import LocalWorker, local_worker_context
from tff_shadow.learning import (
  RoundSampler,
  TrainingSettings,
  build_weighted_fed_avg,
  keras_model_fn,
  model_weights,
)
from tff_shadow.learning.keras_task import restore_eager_keras
from tff_shadow.learning.plain_loop import PlainLoop
from tff_shadow.models import build_model
from tff_shadow.observations import ClientTraining

_REPEATS = flags.DEFINE_integer(
  'repeats', 9, 'Pairs of timed runs; the median ratio counts.', lower_bound=1
)
_LOCAL = ClientTraining('sgd', 0.05, 0.0, 8, 1, None)


def paired_ratio(first: Callable[[], None], second: Callable[[], None], repeats: int) -> float:
  """Median over `repeats` of time(first) / time(second), run in turn after one warm-up of each.

  Neighbouring runs share the machine's mood, so the ratio is steadier than either time.
  """
  first()
  second()
  ratios = []
  for _ in range(repeats):
    times = []
    for function in (first, second):
      started = time.perf_counter()
      function()
      times.append(time.perf_counter() - started)
    ratios.append(times[0] / times[1])
  return float(np.median(ratios))


def bench_round(worker: LocalWorker) -> None:
  """A TFF round against the same steps in a plain loop: 9 clients, 576 images of 32 px."""
  data = load(
    'chest_phantom',
    image_size=32,
    partition=Partition.parse('sizes:' + '/'.join(['64'] * 9)),
    seed=0,
  )
  shape = tuple(data.image_shape)
  model = build_model('conv_small', image_shape=shape, num_classes=data.num_classes, seed=0)
  tasks = RoundSampler(data, TrainingSettings(1, _LOCAL)).sample(1)
  datasets = [task.dataset for task in tasks]
  process = build_weighted_fed_avg(
    keras_model_fn(model, shape),
    tff.learning.optimizers.build_sgdm(_LOCAL.learning_rate, _LOCAL.momentum),
  )
  restore_eager_keras(model)
  state = process.set_model_weights(process.initialize(), model_weights(model))
  loop = PlainLoop(model, _LOCAL)
  weights = [float(len(task.truth.labels)) for task in tasks]
  ratio = paired_ratio(
    lambda: process.next(state, datasets),
    lambda: loop.train_round(datasets, weights),
    _REPEATS.value,
  )
  print(f'BENCH tff_round_over_plain {ratio:.2f}', flush=True)
  peak = _peak_memory_gib(worker.pid)
  print(f'BENCH worker_peak_memory_gib {peak:.2f}', flush=True)


def _peak_memory_gib(pid: int) -> float:
  with open(f'/proc/{pid}/status') as file:
    for line in file:
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) / 2**20
  raise RuntimeError(f'/proc/{pid}/status has no VmHWM')


def main() -> None:
  """Runs every benchmark."""
  with local_worker_context() as worker:
    bench_round(worker)
  for line in bench_lines():
    print(line, flush=True)
  own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f'BENCH own_peak_memory_gib {own:.2f}')


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
