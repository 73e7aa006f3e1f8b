"""What a run directory keeps of data that no flags of a program name."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

from tff_shadow.data.examples import Examples
from tff_shadow.data.federated import digest_of
from tff_shadow.errors import UserError
from tff_shadow.observations import load_tensors, save_tensors

# In config.json of such a run, in place of the name of a program.
RECORDED = 'record_round'
_FILE = 'public.safetensors'
_FIELDS = ('images', 'labels', 'regions')


def write_public(run_dir: pathlib.Path, public: Examples) -> None:
  """Writes the public images of a run."""
  save_tensors(run_dir / _FILE, {name: getattr(public, name) for name in _FIELDS})


def read_public(run_dir: pathlib.Path) -> Examples:
  """Reads what `write_public` wrote; UserError if it is missing or damaged."""
  tensors = load_tensors(run_dir / _FILE)
  try:
    return Examples(*(tensors[name] for name in _FIELDS))
  except KeyError as error:
    raise UserError(f'{run_dir / _FILE}: damaged, {error} is missing') from error
  except ValueError as error:
    raise UserError(f'{run_dir / _FILE}: damaged, {error}') from error


def recorded_digest(public: Examples, client_images: Mapping[str, int]) -> str:
  """SHA-256 (hex) of the public images and of how many each client has."""
  described = [digest_of([('public', public)]), dict(client_images)]
  return hashlib.sha256(json.dumps(described).encode()).hexdigest()
