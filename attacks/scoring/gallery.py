"""Images to pick from beside the attacked ones: those of truth files."""

import pathlib

import numpy as np

from attacks.scoring.results import AttackResult
from tff_shadow.errors import UserError
from tff_shadow.observations import read_truth


def read_gallery(directory: str | pathlib.Path) -> list[np.ndarray]:
  """Every image [H, W, C] of every truth file in `directory`, of all rounds and clients.

  A client that took part in several rounds has its images there several times.

  Raises:
    UserError: If there is no truth file, or one is damaged or of another version.
  """
  directory = pathlib.Path(directory)
  paths = sorted(directory.glob('*.safetensors'))
  if not paths:
    raise UserError(f'--gallery={directory}: no truth file (round_NNNNN.safetensors) here')
  images = []
  for path in paths:
    for client_id, truth in read_truth(path).items():
      if truth.images.ndim != 4 or not np.isfinite(truth.images).all():
        raise UserError(f'{path}: {client_id}/images must be finite, of shape [N, H, W, C]')
      images.extend(truth.images)
  return images


def check_gallery(attack: AttackResult, distractors: list[np.ndarray], name: str) -> None:
  """Raises `UserError` if no image of the gallery `name` has the size of the attacked images."""
  sizes = {image.shape for target in attack.targets for image in target.images}
  if not any(image.shape in sizes for image in distractors):
    wanted = ', '.join(str(list(shape)) for shape in sorted(sizes))
    raise UserError(f'--gallery={name}: no image of the size of those attacked, {wanted}')
