"""A run directory: claimed by one command, continued only with the same settings."""

import json
import pathlib
from typing import Any

from binaries.command import command_line, versions, write_json
from tff_shadow.errors import UserError

_CONFIG = 'config.json'


def read_config(run_dir: pathlib.Path) -> dict[str, Any]:
  """Reads the config.json of a run; UserError if it is missing or damaged."""
  path = run_dir / _CONFIG
  try:
    config = json.loads(path.read_text())
    return {**config, 'flags': dict(config['flags'])}
  except FileNotFoundError as error:
    raise UserError(f'{run_dir}: not a run directory ({_CONFIG} is missing)') from error
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise UserError(f'{path}: damaged ({error})') from error


def check_unclaimed(run_dir: pathlib.Path) -> None:
  """Raises `UserError` unless `run_dir` is new or an empty directory."""
  if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
    raise UserError(f'--run_dir={run_dir}: exists already; add --resume or name another')


def claim(
  run_dir: pathlib.Path,
  config: dict[str, Any],
  *,
  resume: bool,
  may_change: frozenset[str],
) -> None:
  """Makes `run_dir` this command's: writes config.json, or checks it against the one there.

  Args:
    run_dir: New or empty without `resume`; with it, the directory of the run to continue.
    config: Has 'flags'; every other key must stay the same too.
    resume: Whether an earlier run is continued.
    may_change: Flags that need not be the same.

  Raises:
    UserError: If the directory exists without `resume`, is missing with it, or its settings differ.
  """
  path = run_dir / _CONFIG
  if not resume:
    check_unclaimed(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(path, config)
    return
  before = read_config(run_dir)
  for name, value in config['flags'].items():
    old = before['flags'].get(name)
    if name not in may_change and old != json.loads(json.dumps(value)):
      raise UserError(f'--resume: the run was started with --{name}={old!r}, now it is {value!r}')
  for name, value in config.items():
    if name != 'flags' and before.get(name) != value:
      raise UserError(
        f'--resume: {name} of the run is {before.get(name)!r}, now it would be {value!r}; start'
        ' another'
      )
  _write(path, config)


def _write(path: pathlib.Path, config: dict[str, Any]) -> None:
  write_json(path, {**config, 'command': command_line(), 'versions': versions()})
