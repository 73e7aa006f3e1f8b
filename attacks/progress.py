"""Progress on the terminal: a live bar, or plain lines where nobody watches."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from attacks.engine import Progress

_PLAIN_EVERY_SECS = 10.0


@contextlib.contextmanager
def terminal_progress(iterations: int, console: Console | None = None) -> Iterator:
  """Yields a function that shows a `Progress`; `iterations` is the number per restart."""
  console = console or Console(highlight=False)
  if not console.is_terminal:
    yield _PlainLines(iterations, console)
    return
  columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.fields[numbers]}'))
  with RichProgress(*columns, console=console, transient=True) as bar:
    task = bar.add_task('', total=iterations, numbers='')

    def show(progress: Progress) -> None:
      bar.update(
        task,
        completed=progress.iteration,
        description=_position(progress),
        numbers=_numbers(progress),
      )

    yield show


class _PlainLines:
  """One line per target, and one every ten seconds in between."""

  def __init__(self, iterations: int, console: Console):
    self._iterations = iterations
    self._console = console
    self._last = 0.0

  def __call__(self, progress: Progress) -> None:
    done = progress.iteration == self._iterations
    if not done and time.monotonic() - self._last < _PLAIN_EVERY_SECS:
      return
    self._last = time.monotonic()
    self._console.print(
      f'{_position(progress)} iteration {progress.iteration}/{self._iterations}'
      f' {_numbers(progress)}',
      soft_wrap=True,
    )


def _position(progress: Progress) -> str:
  return (
    f'{progress.target} ({progress.target_index + 1} of {progress.num_targets})'
    f' restart {progress.restart + 1}'
  )


def _numbers(progress: Progress) -> str:
  minutes, seconds = divmod(round(progress.seconds_left), 60)
  return (
    f'loss {progress.loss:.2e}, {progress.iterations_per_second:.1f} it/s,'
    f' {minutes}:{seconds:02d} left'
  )
