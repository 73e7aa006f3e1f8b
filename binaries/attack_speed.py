"""Times the attack against the same attack in PyTorch eager, side by side in one run.

Prints `BENCH attack_over_torch_<case> <ratio>`: our seconds per iteration over torch's, the median
of alternating runs with the same number of threads. The attack is plain: cosine matching of the
gradient of all weights, total variation, Adam on the pixels, exact derivatives. Before anything is
timed, both sides must agree on its loss and its gradient.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import flags

from attacks.benchmark import TimedAttack, bench_lines
from attacks.config import AttackConfig
from attacks.matching import CosineMatching
from attacks.optimizers import Adam, ConstantRate
from attacks.parametrizations import PixelParametrization
from attacks.priors import TotalVariation
from attacks.rectifiers import ExactRectifier
from attacks.threads import share_cores
from binaries import command
from tff_shadow.errors import UserError

_TORCH_PYTHON = flags.DEFINE_string(
  'torch_python', '.venv-torch/bin/python', 'Interpreter that has torch; `make` sets one up.'
)
_REPEATS = flags.DEFINE_integer(
  'repeats', 7, 'How often every contestant is timed, in turn.', lower_bound=5
)
_OP_THREADS = flags.DEFINE_integer(
  'op_threads',
  None,
  'Threads that share one of our operations; by default as in tff-shadow-attack.',
  lower_bound=1,
)
_SCRIPT = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'torch_attack.py'
_ATTACK = AttackConfig(
  matching=CosineMatching(),
  total_variation=TotalVariation(weight=0.1),
  parametrization=PixelParametrization(),
  rectifier=ExactRectifier(),
  optimizer=Adam(0.1),
  schedule=ConstantRate(),
)
# What torch's threads do at a barrier: by default they spin for a while, which is many times slower
# where other programs want the cores; the better one of the day is compared with. Never 'active':
# such threads spin on after their turn, and take a core from whoever is timed next.
_WAITING = (None, 'passive')
_LOSS_TOLERANCE = 1e-4
_LEAST_COSINE = 0.999
# Timing what is so many times slower, such as torch's spinning threads on a busy machine, would
# take minutes and change nothing.
_HOPELESS = 4

# Elapsed and of all CPUs.
Seconds = tuple[float, float]


class _Case(NamedTuple):
  """What is timed.

  Attributes:
    model: Its name.
    image_size: Side in pixels.
    restarts: That run side by side.
    iterations: In each timed run.
  """

  model: str
  image_size: int
  restarts: int
  iterations: int


_CASES = {
  'conv_small_32_restarts8': _Case('conv_small', 32, 8, 10),
  'resnet18_224': _Case('resnet18', 224, 1, 1),
}


_CASE = flags.DEFINE_enum('case', 'conv_small_32_restarts8', sorted(_CASES), 'What is timed.')


class _Torch:
  """The other side, in a process of its own.

  Attributes:
    variants: The ways to write the attack that it knows.
    version: Of torch.
  """

  def __init__(self, process: subprocess.Popen):
    self._process = process
    hello = self._answer()
    self.variants, self.version = hello['variants'], hello['version']

  def evaluate(self, variant: str, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """As `TimedAttack.evaluate`; `path` is overwritten."""
    self._ask(command='evaluate', variant=variant, path=str(path))
    with np.load(path, allow_pickle=False) as file:
      return file['losses'], file['gradients']

  def seconds(self, variant: str, iterations: int) -> Seconds:
    """Of so many iterations of all restarts from the start."""
    return tuple(self._ask(command='time', variant=variant, iterations=iterations)['seconds'])

  def _ask(self, **request: Any) -> dict[str, Any]:
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'{_SCRIPT.name} ended with exit code {self._process.wait()}')
    return json.loads(line)


@contextlib.contextmanager
def _torch(problem: pathlib.Path, threads: int, waiting: str | None) -> Iterator[_Torch]:
  """Starts the other side on a problem that `write_problem` wrote."""
  arguments = [_TORCH_PYTHON.value, str(_SCRIPT), f'--problem={problem}', f'--threads={threads}']
  environment = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
  if waiting:
    environment['OMP_WAIT_POLICY'] = waiting
  pipe = subprocess.PIPE
  try:
    process = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True, env=environment)
  except OSError as error:
    raise UserError(f'--torch_python={_TORCH_PYTHON.value}: {error.strerror}') from error
  with process:
    try:
      yield _Torch(process)
    finally:
      process.kill()


def write_problem(path: pathlib.Path, model_name: str, attack: TimedAttack) -> None:
  """Writes what the other side has to know to run `attack`, in Keras' layout, without pickle."""
  arrays = {
    f'{layer.name}.{name}': getattr(layer, name).numpy()
    for layer in attack.model.layers
    for name in ('kernel', 'bias')
    if hasattr(layer, name)
  }
  np.savez(
    path,
    model=np.array(model_name),
    classes=np.array(attack.model.output_shape[-1]),
    images=attack.images,
    labels=attack.labels,
    starts=attack.starts,
    tv_weight=np.array(_ATTACK.total_variation.weight),
    learning_rate=np.array(_ATTACK.optimizer.learning_rate),
    **arrays,
  )


def check_agreement(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]):
  """Raises `RuntimeError` unless losses [R] and image gradients [R, B, H, W, C] agree."""
  losses, gradients = ours
  other_losses, other_gradients = theirs
  if not np.allclose(losses, other_losses, rtol=_LOSS_TOLERANCE, atol=0):
    raise RuntimeError(f'the losses differ: ours {losses}, torch {other_losses}')
  cosines = [
    np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    for a, b in zip(gradients, other_gradients, strict=True)
  ]
  # Not (least < ...), which a NaN would pass.
  if not min(cosines) > _LEAST_COSINE:
    raise RuntimeError(f'the image gradients differ: cosines {cosines}')


def take_turns(
  contestants: Mapping[str, Callable[[int], Seconds]], iterations: int, repeats: int
) -> dict[str, np.ndarray]:
  """Seconds [repeats, 2] that each contestant takes for so many iterations, run in turn.

  Neighbouring runs share the machine's mood, so ratios within a turn are steadier than times. One
  that is hopelessly slower than another of its side after a warm-up does not take part.
  """
  for run in contestants.values():
    run(1)
  first = {name: run(1)[0] for name, run in contestants.items()}
  kept = {}
  for name, run in contestants.items():
    best = min(secs for other, secs in first.items() if _side(other) == _side(name))
    if first[name] > _HOPELESS * best:
      print(f'#   {name}: out after an iteration of {1e3 * first[name]:.0f} ms', flush=True)
    else:
      kept[name] = run
  turns = np.array([[run(iterations) for run in kept.values()] for _ in range(repeats)])
  return {name: turns[:, index] for index, name in enumerate(kept)}


def _side(name: str) -> str:
  return name.split(',')[0]


def fastest(seconds: Mapping[str, np.ndarray], side: str) -> str:
  """The contestant of 'ours' or 'torch' with the least median of elapsed time."""
  names = [name for name in seconds if _side(name) == side]
  return min(names, key=lambda name: np.median(seconds[name][:, 0]))


def report(case_name: str, seconds: Mapping[str, np.ndarray], iterations: int) -> list[str]:
  """Lines that tell what `take_turns` measured; the last is the ratio of the two fastest."""
  lines = [f'# {case_name}: milliseconds per iteration, elapsed (median, least) and CPU (median)']
  for name, turns in seconds.items():
    millis = turns / iterations * 1e3
    (elapsed, cpu), least = np.median(millis, axis=0), np.min(millis[:, 0])
    lines.append(f'#   {name}: {elapsed:.1f}, {least:.1f}; {cpu:.1f}')
  ours, theirs = fastest(seconds, 'ours'), fastest(seconds, 'torch')
  elapsed, cpu = np.median(seconds[ours] / seconds[theirs], axis=0)
  lines.append(f'#   {ours} over {theirs}: {elapsed:.2f} of the elapsed, {cpu:.2f} of the CPU time')
  return [*lines, f'BENCH attack_over_torch_{case_name} {elapsed:.2f}']


def _seconds_of(attack: TimedAttack, iterations: int) -> Seconds:
  cpu_begin = time.process_time()
  return attack.seconds(iterations), time.process_time() - cpu_begin


def _time(name: str, case: _Case, threads: int, directory: pathlib.Path) -> None:
  """Checks that both sides agree, times them and prints the lines."""
  contestants: dict[str, Callable[[int], Seconds]] = {}
  for label, use_xla in (('plain', False), ('XLA', True)):
    attack = TimedAttack(case.model, case.image_size, _ATTACK, lanes=case.restarts, use_xla=use_xla)
    contestants[f'ours, {label}'] = functools.partial(_seconds_of, attack)
  problem = directory / f'{name}.npz'
  write_problem(problem, case.model, attack)
  ours = attack.evaluate()
  with contextlib.ExitStack() as stack:
    for waiting in _WAITING:
      torch = stack.enter_context(_torch(problem, threads, waiting))
      for variant in torch.variants:
        check_agreement(ours, torch.evaluate(variant, directory / 'seen.npz'))
        contestants[f'torch, {variant}, {waiting or "default"} waiting'] = functools.partial(
          torch.seconds, variant
        )
    seconds = take_turns(contestants, case.iterations, _REPEATS.value)
  for line in report(name, seconds, case.iterations):
    print(line, flush=True)


def main() -> None:
  """Runs one case, for the threads of a process cannot be changed once it works."""
  name = _CASE.value
  case, threads = _CASES[name], len(os.sched_getaffinity(0))
  tf.config.threading.set_inter_op_parallelism_threads(threads)
  op_threads = share_cores(case.restarts, _OP_THREADS.value)
  print(
    f'# {threads} threads on both sides, {op_threads} for one of our operations;'
    f' load average {os.getloadavg()[0]:.1f}',
    flush=True,
  )
  with tempfile.TemporaryDirectory() as directory:
    _time(name, case, threads, pathlib.Path(directory))
  if case.restarts == 1:
    for line in bench_lines():
      print(line, flush=True)


def run() -> None:
  """Console script."""
  command.run(main)


if __name__ == '__main__':
  run()
