"""What every binary does around its own work: flags in, one clear line out on a mistake."""

import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import app, flags, logging

from tff_shadow.errors import UserError

_RECORDED_PACKAGES = (
  'tff-shadow',
  'tensorflow',
  'tensorflow-federated',
  'tensorflow-datasets',
  'numpy',
)


def run(main: Callable[[], None]) -> None:
  """Runs `main` under absl: rejects extra arguments, turns `UserError` into exit code 1.

  Ctrl-C ends with exit code 130 and no traceback; anything else keeps its traceback, for it is
  our mistake.
  """

  def wrapped(argv: list[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}: this program takes only --flags')
      main()
    except UserError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(1)
    except KeyboardInterrupt:
      print('interrupted; what was saved can be continued with --resume', file=sys.stderr)
      sys.exit(130)

  def parse(argv: list[str]) -> list[str]:
    if not {'-h', '-help', '--help', '--helpshort'}.isdisjoint(argv[1:]):
      print(help_text(main))
      sys.exit(0)
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
      sys.exit(1)

  app.run(wrapped, flags_parser=parse)


def help_text(main: Callable[[], None]) -> str:
  """What the program does, and all flags of ours that it takes.

  absl's own --help knows only those of the module that was run, and of a console script none.
  """
  ours = sorted(name for name in flags.FLAGS.flags_by_module_dict() if 'binaries' in name)
  program = sys.modules[main.__module__]
  texts = [program.__doc__.strip(), *(flags.FLAGS.module_help(name) for name in ours)]
  return '\n\n'.join(texts)


def check_directory_name(name: str, given: str) -> None:
  """Raises `UserError` if the value of the flag `name` is not the name of one directory."""
  if given in ('', '.', '..') or '/' in given:
    raise UserError(f'--{name}={given}: must be the name of one directory')


def check_choices(name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
  """Raises `UserError` for the first value of the flag `name` that is not among `allowed`."""
  allowed = list(allowed)
  for value in given:
    if value not in allowed:
      raise UserError(f'--{name}={value}: use some of {", ".join(allowed)}')


def check_unused(module: Any, needed: str, prefix: str = '') -> None:
  """Raises `UserError` if a flag of `module` was given that has no use.

  Args:
    module: Defines the flags.
    needed: What would make use of them, such as '--defense=shadow'.
    prefix: Only of flags whose names begin so.
  """
  for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
    if flag.present and flag.name.startswith(prefix):
      raise UserError(f'--{flag.name}: needs {needed}')


def flag_values(module: Any) -> dict[str, Any]:
  """The values of all flags that `module` defines, ready for JSON."""
  return {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)}


def command_line() -> str:
  """The command that runs now, as one would type it."""
  program = pathlib.Path(sys.argv[0])
  name = f'python -m binaries.{program.stem}' if program.suffix == '.py' else program.name
  return shlex.join([*name.split(), *sys.argv[1:]])


def versions() -> dict[str, str]:
  """Versions of the packages that decide a run's numbers."""
  return {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES}


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` so that a reader sees either the old file or the whole new one."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + '\n')
  os.replace(temporary, path)
