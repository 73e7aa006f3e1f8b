"""The two data sets of the published method, as its authors dealt them to clients."""

import dataclasses
import pathlib

from tff_shadow.data.catalog import load_manifests
from tff_shadow.data.federated import FederatedData
from tff_shadow.errors import UserError


@dataclasses.dataclass(frozen=True)
class _PublishedSet:
  """Where the authors' files are, below the folder of the set.

  Attributes:
    stem: Of the manifests' names: STEM_train.csv, STEM_val.csv and STEM_test.csv.
    path_prefix: What the paths in them begin with: the folder itself, seen from their code.
    download: Where the images are from.
  """

  stem: str
  path_prefix: str
  download: str


# Manifests: repository tekap404/ShadowDef, data/.
_SETS = {
  'chestxray': _PublishedSet(
    'Chest_Xray', '../data/Chest_X-ray/', 'the COVID-19 Radiography Database (Kaggle)'
  ),
  'eyepacs': _PublishedSet('eye', '../data/EyePACS_AIROGS/', 'EyePACS-AIROGS-light (Zenodo)'),
}
PUBLISHED_SETS = tuple(_SETS)


def load_published(name: str, data_dir: str | pathlib.Path, *, image_size: int) -> FederatedData:
  """Loads 'chestxray' or 'eyepacs' with the authors' nine clients, '0' to '8'.

  In 'chestxray' the one image of client 8 is also one of client 0, and their validation images are
  the same 200; the lists are taken as they are.

  Args:
    name: one of `PUBLISHED_SETS`.
    data_dir: the folder that holds the three manifests and, at the paths in them (COVID/images/...,
      RG/...), the images.
    image_size: side of the images in pixels; they have three channels.

  Raises:
    UserError: a file is missing or not what it should be; names it, and the row at fault.
  """
  if name not in _SETS:
    raise UserError(f'data set {name!r} is unknown: use one of {", ".join(_SETS)}')
  known = _SETS[name]
  data_dir = pathlib.Path(data_dir)
  paths = [data_dir / f'{known.stem}_{split}.csv' for split in ('train', 'val', 'test')]
  for path in paths:
    if not path.is_file():
      raise UserError(
        f'--data_dir={data_dir}: {path.name} is missing; it must hold the manifests of {name} and'
        f' the images of {known.download}'
      )
  data = load_manifests(
    *paths,
    data_dir,
    image_size=image_size,
    color='rgb',
    name=name,
    path_prefix=known.path_prefix,
    repeats=True,
  )
  # The manifests are in no order of clients.
  return dataclasses.replace(data, clients={key: data.clients[key] for key in sorted(data.clients)})
