"""TFF's C++ worker on this machine, started so that it never outlives this process.

The stock local context starts the same binary, but lets it inherit standard output (a pipe then
never closes) and leaves it running when the interpreter is killed; and once the worker is dead it
retries for ever. Here the kernel ends the worker with its parent, its output goes to a file, and a
worker that dies is an error.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

import grpc
import portpicker
import tensorflow_federated as tff
from tensorflow_federated.python.core.backends.native import compiler
from tensorflow_federated.python.core.environments.tensorflow_frontend import (
  tensorflow_computation,
)
from tensorflow_federated.python.core.impl.execution_contexts import sync_execution_context
from tensorflow_federated.python.core.impl.executor_stacks import python_executor_stacks
from tensorflow_federated.python.core.impl.executors import (
  remote_executor,
  remote_executor_grpc_stub,
)

_MAX_MESSAGE_BYTES = 2 * 1000 * 1000 * 1000
_CHANNEL_OPTIONS = (
  ('grpc.max_receive_message_length', _MAX_MESSAGE_BYTES),
  ('grpc.max_send_message_length', _MAX_MESSAGE_BYTES),
)
_PR_SET_PDEATHSIG = 1
# Loaded here and not after the fork, where taking the loader's lock could hang.
_LIBC = ctypes.CDLL(None, use_errno=True)


class WorkerError(RuntimeError):
  """The worker did not start, or died; the message holds the end of its output."""


class LocalWorker:
  """One `worker_binary` process and the connection to it.

  The binary has no option to listen on loopback only and asks for no credentials: do not run it on
  a machine whose ports others can reach.
  """

  def __init__(
    self,
    *,
    log_path: pathlib.Path | None = None,
    max_concurrent_calls: int | None = None,
    start_timeout_secs: float = 60.0,
  ):
    """Starts the worker and waits until it answers.

    Args:
      log_path: File that takes the worker's output; by default a temporary file.
      max_concurrent_calls: How many clients train at once; by default the number of cores, for
        each holds its own activations in memory.
      start_timeout_secs: How long it may take to answer.

    Raises:
      WorkerError: If it does not answer in time, or ends before.
    """
    if log_path is None:
      handle, name = tempfile.mkstemp(prefix='tff_worker_', suffix='.log')
      os.close(handle)
      log_path = pathlib.Path(name)
      self._owned_log: pathlib.Path | None = log_path
    else:
      self._owned_log = None
    self.log_path = log_path
    port = portpicker.pick_unused_port()
    parent = os.getpid()

    def die_with_parent() -> None:
      _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
      if os.getppid() != parent:  # The parent died between the fork and the line above.
        os._exit(1)

    with log_path.open('ab') as log:
      self._process = subprocess.Popen(
        [
          _worker_binary(),
          f'--port={port}',
          f'--max_concurrent_computation_calls={max_concurrent_calls or os.cpu_count() or 1}',
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '2'},
        # Ctrl-C reaches only the parent, which then ends the round it is in and stops the worker.
        start_new_session=True,
        preexec_fn=die_with_parent,  # One system call, safe after a fork: see _LIBC.
      )
    self._channel = grpc.insecure_channel(f'localhost:{port}', _CHANNEL_OPTIONS)
    self._stub = remote_executor_grpc_stub.RemoteExecutorGrpcStub(self._channel)
    deadline = time.monotonic() + start_timeout_secs
    while not self._stub.is_ready:
      if self._process.poll() is not None or time.monotonic() > deadline:
        reason = 'ended' if self._process.poll() is not None else 'did not answer'
        message = f'TFF worker {reason} within {start_timeout_secs:g} s of its start'
        tail = self._log_tail()
        self.stop()
        raise WorkerError(f'{message}; end of its output: {tail}')
      time.sleep(0.02)

  @property
  def pid(self) -> int:
    """Process id of the worker."""
    return self._process.pid

  def check_alive(self) -> None:
    """Raises `WorkerError` if the worker has ended."""
    status = self._process.poll()
    if status is not None:
      raise WorkerError(f'TFF worker ended with status {status}; its output: {self._log_tail()}')

  def executor(self, cardinalities: dict) -> remote_executor.RemoteExecutor:
    """An executor on the worker; `WorkerError` instead of an endless retry if it is dead."""
    self.check_alive()
    executor = remote_executor.RemoteExecutor(self._stub)
    executor.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
    return executor

  def stop(self) -> None:
    """Ends the worker; may be called twice."""
    self._channel.close()
    if self._process.poll() is None:
      self._process.kill()  # It holds nothing that must be saved.
      self._process.wait()
    if self._owned_log is not None:
      self._owned_log.unlink(missing_ok=True)

  def _log_tail(self) -> str:
    try:
      lines = self.log_path.read_text(errors='replace').strip().splitlines()
    except OSError:
      lines = []
    return ' | '.join(lines[-5:]) or '(none)'


@contextlib.contextmanager
def local_worker_context(
  *,
  log_path: pathlib.Path | None = None,
  max_concurrent_calls: int | None = None,
  start_timeout_secs: float = 60.0,
) -> Iterator[LocalWorker]:
  """Runs the body's TFF computations, of this thread, on a local worker.

  Secure sums, which the worker does not know, are simulated: it computes them in the clear, as all
  that the clients do.

  Args:
    log_path: See `LocalWorker`.
    max_concurrent_calls: See `LocalWorker`.
    start_timeout_secs: See `LocalWorker`.

  Yields:
    The worker.
  """
  worker = LocalWorker(
    log_path=log_path,
    max_concurrent_calls=max_concurrent_calls,
    start_timeout_secs=start_timeout_secs,
  )
  try:
    factory = python_executor_stacks.ResourceManagingExecutorFactory(worker.executor)
    context = sync_execution_context.SyncExecutionContext(
      executor_fn=factory,
      compiler_fn=_compile,
      transform_args=tensorflow_computation.transform_args,
      transform_result=tensorflow_computation.transform_result,
    )
    with tff.framework.get_context_stack().install(context):
      yield worker
  finally:
    worker.stop()


def _compile(computation: tff.Computation) -> tff.Computation:
  # The walk through a computation that has none would add a sixth to the time of compiling it.
  if b'federated_secure_' in tff.framework.serialize_computation(computation).SerializeToString():
    computation = tff.backends.test.replace_secure_intrinsics_with_bodies(computation)
  return compiler.desugar_and_transform_to_native(computation)


def _worker_binary() -> str:
  path = pathlib.Path(tff.__file__).parent / 'data' / 'worker_binary'
  if not path.is_file():
    raise WorkerError(f'{path}: the TFF installation has no worker binary')
  return str(path)
