"""Prints ratios of times taken side by side in one run: `BENCH <name> <ratio>`."""

import time
from collections.abc import Callable

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.benchmark import bench_lines
from binaries import command
from binaries.peak_memory import peak_memory_gib
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.data import Partition, load
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import (
  RoundSampler,
  ShadowDefense,
  ShadowNoise,
  TrainingSettings,
  build_shadow_fed_avg,
  build_weighted_fed_avg,
  keras_model_fn,
  model_weights,
)
from tff_shadow.learning.keras_task import restore_eager_keras
from tff_shadow.learning.plain_loop import PlainLoop
from tff_shadow.models import build_model, model_from_config, model_to_config
from tff_shadow.observations import ClientTraining
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.noise_keys import draw_secret

_REPEATS = flags.DEFINE_integer(
  'repeats', 9, 'Pairs of timed runs; the median ratio counts.', lower_bound=1
)
_RATIO = NoiseStrength('ratio', 0.3)
_SCALE = NoiseStrength('scale', 0.1)
_GIVEN = SaliencyConfig(kind='given')
_DEFENDED = {
  'isotropic': ShadowNoise('isotropic', _RATIO),
  'isotropic_image_ratio': ShadowNoise('isotropic', NoiseStrength('image_ratio', 30.0)),
  'diagonal': ShadowNoise('diagonal', _RATIO),
  'correlated': ShadowNoise('correlated', _RATIO),
  # Without a saliency map of the client's own making: what is left is noise and derivatives.
  'correlated_given_region': ShadowNoise('correlated', _RATIO, _GIVEN),
  'correlated_local_training': ShadowNoise('correlated', _RATIO, propagation='local_training'),
  'correlated_images': ShadowNoise('correlated', _SCALE, propagation='images'),
  'correlated_images_given_region': ShadowNoise('correlated', _SCALE, _GIVEN, 'images'),
  'decoy': ShadowNoise('decoy', NoiseStrength('scale', 3.0)),
}
# Some probe as many batches however many there are.
_DEFENDED_LARGE = {
  name: _DEFENDED[name] for name in ('isotropic_image_ratio', 'diagonal', 'correlated', 'decoy')
}
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


def bench_rounds(clients: int, images: int, noises: dict[str, ShadowNoise], suffix: str) -> None:
  """A TFF round against the same steps in a plain loop, and defended rounds against it.

  Args:
    clients: Number of clients.
    images: Of each, 32 px, in batches of 8.
    noises: The defences by name.
    suffix: Of the printed names.
  """
  data = load(
    'chest_phantom',
    image_size=32,
    partition=Partition.parse('sizes:' + '/'.join([str(images)] * clients)),
    seed=0,
  )
  shape = tuple(data.image_shape)
  model = build_model('conv_small', image_shape=shape, num_classes=data.num_classes, seed=0)
  tasks = RoundSampler(data, TrainingSettings(1, _LOCAL)).sample(1)
  datasets = [task.dataset for task in tasks]
  initial = model_weights(model)
  arguments = {
    'model_fn': keras_model_fn(model, shape),
    'client_optimizer_fn': tff.learning.optimizers.build_sgdm(_LOCAL.learning_rate),
  }
  config = model_to_config(model)
  undefended = _round_fn(build_weighted_fed_avg(**arguments), initial, datasets)
  defended = {}
  for name, noise in noises.items():
    process = build_shadow_fed_avg(
      **arguments,
      noise=noise,
      shadow_model_fn=lambda: model_from_config(config),
      decoys=data.validation,
    )
    secrets = {client_id: draw_secret() for client_id in data.clients}
    settings = TrainingSettings(1, _LOCAL, defense=ShadowDefense(noise, True, secrets))
    noised = [task.dataset for task in RoundSampler(data, settings).sample(1)]
    defended[name] = _round_fn(process, initial, noised)
  restore_eager_keras(model)
  loop = PlainLoop(model, _LOCAL)
  weights = [float(len(task.truth.labels)) for task in tasks]
  ratio = paired_ratio(
    undefended,
    lambda: loop.train_round(datasets, weights),
    _REPEATS.value,
  )
  print(f'BENCH tff_round_over_plain{suffix} {ratio:.2f}', flush=True)
  for name, defended_round in defended.items():
    ratio = paired_ratio(defended_round, undefended, _REPEATS.value)
    print(f'BENCH defended_over_undefended_{name}{suffix} {ratio:.2f}', flush=True)


def _round_fn(process, weights, datasets) -> Callable[[], None]:
  state = process.set_model_weights(process.initialize(), weights)
  return lambda: process.next(state, datasets)


def main() -> None:
  """Runs every benchmark."""
  with local_worker_context() as worker:
    bench_rounds(9, 64, _DEFENDED, '')
    bench_rounds(2, 512, _DEFENDED_LARGE, '_512_images')
    print(f'BENCH worker_peak_memory_gib {peak_memory_gib(worker.pid):.2f}', flush=True)
  for line in bench_lines():
    print(line, flush=True)
  print(f'BENCH own_peak_memory_gib {peak_memory_gib():.2f}')


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
