"""The clients' secrets of a simulated run: drawn once, kept with the run, sent to nobody.

In a federation each client keeps its own; a simulation plays all clients, so their secrets lie in
one file, apart from the server's state and the observations.
"""

import json
import os
import pathlib
from collections.abc import Iterable

from tff_shadow.errors import UserError


def write_client_secrets(path: pathlib.Path, client_secrets: dict[str, bytes]) -> None:
  """Writes the secrets, readable by their owner only, whole or not at all.

  Raises:
    FileExistsError: If there are secrets already; others would not give the same noise.
  """
  if path.exists():
    raise FileExistsError(f'{path}: there are secrets already')
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.unlink(missing_ok=True)  # Of a run that was killed here.
  descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
  with os.fdopen(descriptor, 'w') as file:
    json.dump({client_id: secret.hex() for client_id, secret in client_secrets.items()}, file)
    file.flush()
    os.fsync(file.fileno())  # No state that rests on them is on the disk before them.
  os.replace(temporary, path)


def read_client_secrets(path: pathlib.Path, client_ids: Iterable[str]) -> dict[str, bytes]:
  """Reads the secrets of `client_ids`.

  Raises:
    UserError: If the file is missing or damaged: without it frozen noise cannot be drawn again.
  """
  try:
    written = json.loads(path.read_text())
    return {client_id: bytes.fromhex(written[client_id]) for client_id in client_ids}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{path}: the clients' secrets cannot be read ({type(error).__name__}: {error}), so their"
      ' noise cannot be frozen any longer; start a new run'
    ) from error
