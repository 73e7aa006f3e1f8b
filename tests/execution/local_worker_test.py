import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_federated as tff

from tff_shadow.execution import WorkerError, local_worker, local_worker_context

_SCRIPT = """
import sys, time
from tff_shadow.execution import local_worker_context
with local_worker_context() as worker:
  print(worker.pid, flush=True)
  time.sleep(float(sys.argv[1]))
"""


@tff.tensorflow.computation(tff.types.TensorType(np.float32))
def _add_one(x):
  return x + 1.0


@tff.federated_computation(tff.types.FederatedType(np.float32, tff.CLIENTS))
def _mean_plus_one(x):
  return tff.federated_mean(tff.federated_map(_add_one, x))


def _is_running(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def _wait_until_gone(pid, seconds=10.0):
  deadline = time.monotonic() + seconds
  while _is_running(pid) and time.monotonic() < deadline:
    time.sleep(0.05)
  return not _is_running(pid)


def test_runs_computations_and_leaves_nothing_behind():
  with local_worker_context() as worker:
    assert _mean_plus_one([1.0, 2.0, 6.0]) == pytest.approx(4.0)
    assert _add_one(1.0) == pytest.approx(2.0)
    pid, log_path = worker.pid, worker.log_path
    assert _is_running(pid)
  assert not _is_running(pid)
  assert not log_path.exists()


def test_dead_worker_is_an_error_and_not_an_endless_retry():
  with local_worker_context() as worker:
    _mean_plus_one([1.0])
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match='ended with status -9'):
      _mean_plus_one([1.0])


def test_worker_output_goes_to_the_file(tmp_path):
  log_path = tmp_path / 'worker.log'
  with local_worker_context(log_path=log_path):
    pass
  assert log_path.exists()


def test_worker_that_ends_at_its_start_is_named_with_its_output(monkeypatch, tmp_path):
  broken = tmp_path / 'broken'
  broken.write_text('#!/bin/sh\necho cannot open the thing\nexit 3\n')
  broken.chmod(0o755)
  monkeypatch.setattr(local_worker, '_worker_binary', lambda: str(broken))
  with pytest.raises(WorkerError, match='cannot open the thing'), local_worker_context():
    pass


def test_worker_that_never_answers_times_out_and_is_ended(monkeypatch, tmp_path):
  silent = tmp_path / 'silent'
  silent.write_text(f'#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n')
  silent.chmod(0o755)
  monkeypatch.setattr(local_worker, '_worker_binary', lambda: str(silent))
  with (
    pytest.raises(WorkerError, match='did not answer'),
    local_worker_context(start_timeout_secs=1.0),
  ):
    pass
  assert _wait_until_gone(int((tmp_path / 'pid').read_text()))


@pytest.mark.parametrize('end_with', [signal.SIGKILL, signal.SIGINT, None])
def test_worker_never_outlives_its_parent_nor_holds_its_pipe(end_with):
  seconds = '0' if end_with is None else '60'
  parent = subprocess.Popen(
    [sys.executable, '-c', _SCRIPT, seconds],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  worker_pid = int(parent.stdout.readline())
  if end_with is not None:
    parent.send_signal(end_with)
  # communicate() returns only when every holder of the pipe has closed it.
  parent.communicate(timeout=20)
  assert _wait_until_gone(worker_pid)
