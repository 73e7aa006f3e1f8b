"""What each client of the published defence keeps to itself between rounds, and its files.

In a federation every client keeps its own. A simulation plays all clients, so their files lie side
by side below `client_state/`, apart from the server's state and the observations:

* `latents/client_000.safetensors`: latents and the digests of the images they were fitted to,
* `round_00005/client_000.safetensors`: after round 5, the maps and the weights of the shadow.

Files are named by position, never by a client's id, which is in their metadata.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil

import numpy as np
from safetensors import safe_open

from tff_shadow.errors import UserError
from tff_shadow.observations import round_directory_name
from tff_shadow.observations.files import load_tensors, save_tensors

_KEEP = 3
_SYNTHESIS = 'synthesis'


@dataclasses.dataclass
class ClientState:
  """One client's.

  Attributes:
    maps: float32 [N, H, W, C], momentum map of every image of the client (step 5).
    has_map: bool [N], which images have one yet.
    synthesis: The shadow's weights that are updated.
    changed: Whether it differs from what was last saved.
  """

  maps: np.ndarray
  has_map: np.ndarray
  synthesis: list[np.ndarray]
  changed: bool = True


class ClientStateFiles:
  """The files of all clients below one directory."""

  def __init__(self, directory: pathlib.Path, client_ids: list[str]):
    """Uses or creates `directory` when something is written."""
    self._directory = directory
    self._names = {name: f'client_{index:03d}.safetensors' for index, name in enumerate(client_ids)}
    self._last_saved: pathlib.Path | None = None

  def save(self, states: dict[str, ClientState], round_num: int) -> None:
    """Saves every client's state after `round_num`; of older rounds the last two are kept."""
    directory = self._directory / round_directory_name(round_num)
    for client_id, state in states.items():
      path = directory / self._names[client_id]
      last = self._last_saved / self._names[client_id] if self._last_saved else None
      if not state.changed and last and last != path and last.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(last, path)
        continue
      tensors = {'maps': state.maps, 'has_map': state.has_map}
      for index, weights in enumerate(state.synthesis):
        tensors[f'{_SYNTHESIS}/{index:04d}'] = weights
      save_tensors(path, tensors, {'client_id': client_id})
      state.changed = False
    self._last_saved = directory
    for old in sorted(self._directory.glob('round_*'))[:-_KEEP]:
      shutil.rmtree(old)

  def load(self, states: dict[str, ClientState], round_num: int) -> None:
    """Puts what was saved after `round_num` into `states`, which tell the shapes.

    Raises:
      UserError: If a file is gone, damaged or of another model or data set.
    """
    directory = self._directory / round_directory_name(round_num)
    for client_id, state in states.items():
      path = directory / self._names[client_id]
      if not path.is_file():
        raise UserError(
          f'{path}: the state that {client_id} kept after round {round_num} is gone, so its noise'
          ' cannot be continued; start a new run'
        )
      tensors = load_tensors(path)
      synthesis = [tensors[name] for name in sorted(tensors) if name.startswith(f'{_SYNTHESIS}/')]
      found = ClientState(
        tensors.get('maps', np.zeros(0)), tensors.get('has_map', np.zeros(0)), synthesis, False
      )
      if _metadata(path).get('client_id') != client_id or _shapes(found) != _shapes(state):
        raise UserError(f'{path}: not the state of {client_id} with this data and generator')
      states[client_id] = found
    self._last_saved = directory

  def has_latents(self, client_id: str) -> bool:
    """Whether `client_id`'s are saved."""
    return (self._directory / 'latents' / self._names[client_id]).is_file()

  def save_latents(
    self, client_id: str, latents: np.ndarray, digests: list[str], generator_digest: str
  ) -> None:
    """Saves one client's latents [N, ...] beside the digests of its images."""
    save_tensors(
      self._directory / 'latents' / self._names[client_id],
      {'latents': latents, 'digests': _packed(digests)},
      {'client_id': client_id, 'generator': generator_digest},
    )

  def load_latents(self, generator_digest: str) -> dict[str, np.ndarray]:
    """Image digest -> latent, of all clients whose latents are there.

    Raises:
      UserError: If a file is damaged, or was fitted with another generator.
    """
    found = {}
    for path in sorted((self._directory / 'latents').glob('client_*.safetensors')):
      tensors = load_tensors(path)
      if _metadata(path).get('generator') != generator_digest:
        raise UserError(
          f'{path}: these latents were fitted with another generator; give that one, or leave them'
          ' out to fit new ones'
        )
      if len(tensors.get('latents', ())) != len(tensors.get('digests', ())):
        raise UserError(f'{path}: damaged, needs one latent per digest')
      for digest, latent in zip(tensors['digests'], tensors['latents'], strict=True):
        found[digest.tobytes().hex()] = latent
    return found


def image_digests(images: np.ndarray) -> list[str]:
  """SHA-256 of every image of [N, H, W, C] of one type."""
  return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images]


def _packed(digests: list[str]) -> np.ndarray:
  return np.frombuffer(bytes.fromhex(''.join(digests)), np.uint8).reshape(len(digests), -1)


def _metadata(path: pathlib.Path) -> dict[str, str]:
  with safe_open(path, framework='numpy') as file:
    return file.metadata() or {}


def _shapes(state: ClientState) -> list[tuple[int, ...]]:
  return [np.shape(array) for array in (state.maps, state.has_map, *state.synthesis)]
