"""Progress of long work: a live bar on a terminal, a line now and then anywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

_PLAIN_EVERY_SECS = 10.0


class Progress:
  """Shows how much is done, the rate, the time left and the figures that matter.

  On a terminal a bar is redrawn in place. In a file or a pipe a plain line is printed at most every
  ten seconds, and always for the last step, so that a log stays readable.
  """

  def __init__(self, description: str, total: int, unit: str, *, done: int = 0):
    """Starts the clock.

    Args:
      description: What is going on.
      total: Number of steps in all.
      unit: Name of one step, for the rate.
      done: Steps that an earlier run did; they do not count for the rate.
    """
    self._description = description
    self._total = total
    self._unit = unit
    self._first = done
    self._started = time.monotonic()
    self._last_line = float('-inf')
    self._bar: rich.progress.Progress | None = None
    if sys.stdout.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn('{task.fields[figures]}'),
      )
      self._task = self._bar.add_task(description, total=total, completed=done, figures='')

  def __enter__(self) -> 'Progress':
    """Shows the bar."""
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *exc_info) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.stop()

  def update(self, done: int, figures: str = '') -> None:
    """Tells that `done` steps are done; `figures` are shown as they are."""
    elapsed = time.monotonic() - self._started
    rate = (done - self._first) / elapsed if elapsed > 0 else 0.0
    left = (self._total - done) / rate if rate > 0 else 0.0
    text = f'{rate:.3g} {self._unit}/s, {_duration(left)} left  {figures}'.rstrip()
    if self._bar is not None:
      self._bar.update(self._task, completed=done, figures=text)
    elif done >= self._total or time.monotonic() - self._last_line >= _PLAIN_EVERY_SECS:
      self._last_line = time.monotonic()
      print(f'{self._description} {done}/{self._total}  {text}', flush=True)


def _duration(seconds: float) -> str:
  minutes, secs = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{secs:02d}' if hours else f'{minutes}:{secs:02d}'


@contextlib.contextmanager
def watch(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
  """Shows progress of `what`; what it gives is called with the steps done and a detail."""
  with Progress(what, total, 'it') as progress:
    yield progress.update
