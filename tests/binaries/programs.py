"""Runs a program several times for the price of one start."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
# Each run in a process of its own: two programs may define the same flag, and flags are global.
_SCRIPT = """
import importlib, json, os, sys, tempfile
program = importlib.import_module('binaries.' + sys.argv[1])
results = []
for arguments in json.loads(sys.argv[2]):
  with tempfile.TemporaryFile('w+') as printed, tempfile.TemporaryFile('w+') as errors:
    pid = os.fork()
    if not pid:
      os.dup2(printed.fileno(), 1)
      os.dup2(errors.fileno(), 2)
      sys.argv = [program.__file__, *arguments]
      code = 0
      try:
        program.run()
      except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
      finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for file in (printed, errors):
      file.seek(0)
      texts.append(file.read())
  results.append([code, *texts])
print(json.dumps(results))
"""


class Ended(NamedTuple):
  """How a run ended; named as in `subprocess.CompletedProcess`."""

  returncode: int
  stdout: str
  stderr: str


def run_all(program: str, runs: Sequence[Sequence[str]]) -> list[Ended]:
  """Runs `binaries.PROGRAM` with each list of arguments, one after another.

  For runs that end early, on what is wrong with them: all are forks of one process that has done
  the imports.
  """
  done = subprocess.run(
    [sys.executable, '-c', _SCRIPT, program, json.dumps([list(map(str, run)) for run in runs])],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return [Ended(*result) for result in json.loads(done.stdout.splitlines()[-1])]


def assert_one_error_line(ended: Ended, *parts: str) -> None:
  """The exit code 1 and one line for a user, with all `parts` in it."""
  assert ended.returncode == 1, ended.stderr
  lines = ended.stderr.strip().splitlines()
  assert len(lines) == 1, ended.stderr
  for part in ('error: ', *parts):
    assert part in lines[0]
