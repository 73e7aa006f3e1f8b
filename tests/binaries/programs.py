"""Programs as processes of their own that share one start: imports take longer than most tests."""

import importlib
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
# Each process is a fork of one that has done these imports and nothing else; a program itself is
# imported in the fork, for two of them may define the same flag.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(
  ['binaries', 'attacks.adaptive.players', 'attacks.audit.page', 'tensorflow_datasets']
)


class Ended(NamedTuple):
  """How a run ended; named as in `subprocess.CompletedProcess`."""

  returncode: int
  stdout: str
  stderr: str


class Running:
  """A run of `binaries.PROGRAM` with these arguments; named as in `subprocess.Popen`."""

  def __init__(self, program: str, *arguments: Any):
    self._directory = tempfile.TemporaryDirectory()
    self._files = [pathlib.Path(self._directory.name) / name for name in ('printed', 'errors')]
    self._process = FORKS.Process(
      target=_run_here, args=(program, list(map(str, arguments)), *map(str, self._files))
    )
    self._process.start()

  def poll(self) -> int | None:
    """The exit code, of a process that has ended."""
    return self._process.exitcode

  def send_signal(self, number: int) -> None:
    """Sends it to the process and to none of its children."""
    os.kill(self._process.pid, number)

  def wait_until(self, condition: Callable[[], bool], timeout: float = 120.0) -> None:
    """Waits for `condition` to hold while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
      assert self.poll() is None, self.wait()
      assert time.monotonic() < deadline, 'timed out'
      time.sleep(0.01)

  def wait(self, timeout: float = 300.0) -> Ended:
    """How the run ended; kills it after `timeout` seconds."""
    self._process.join(timeout)
    in_time = self.poll() is not None
    if not in_time:
      self._process.kill()
      self._process.join()
    ended = Ended(self.poll(), *(path.read_text() for path in self._files))
    self._directory.cleanup()
    assert in_time, f'not ended after {timeout} s: {ended}'
    return ended


def run(program: str, *arguments: Any) -> Ended:
  """Runs `binaries.PROGRAM` to its end."""
  return Running(program, *arguments).wait()


def run_all(program: str, runs: Iterable[Sequence[Any]]) -> list[Ended]:
  """Runs `binaries.PROGRAM` with each list of arguments, one after another."""
  return [run(program, *arguments) for arguments in runs]


def assert_one_error_line(ended: Ended, *parts: str) -> None:
  """The exit code 1 and one line for a user, with all `parts` in it."""
  assert ended.returncode == 1, ended.stderr
  lines = ended.stderr.strip().splitlines()
  assert len(lines) == 1, ended.stderr
  for part in ('error: ', *parts):
    assert part in lines[0]


def _run_here(program, arguments, printed, errors):
  for path, descriptor in ((printed, 1), (errors, 2)):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, descriptor)
    os.close(file)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(ROOT)
  module = importlib.import_module(f'binaries.{program}')
  sys.argv = [module.__file__, *arguments]
  module.run()
