"""Where TFF computations run."""

from tff_shadow.execution.local_worker import LocalWorker, WorkerError, local_worker_context

__all__ = ['LocalWorker', 'WorkerError', 'local_worker_context']
