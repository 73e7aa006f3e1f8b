"""CSV manifests: which image has which label and belongs to which client."""

import csv
import dataclasses
import hashlib
import io
import logging
import pathlib
import re

import numpy as np

from tff_shadow.data import images
from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE

_CLIENT = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')
_COLUMNS = {'train': ('img_path', 'label', 'client'), 'validation': ('img_path', 'label')}
_COLUMNS['test'] = _COLUMNS['validation']
_OPTIONAL = {'train': ('region_path',), 'validation': ('client', 'region_path')}
_OPTIONAL['test'] = ('region_path',)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a manifest.

  Attributes:
    where: file and row number, as an error message names them; the header is row 1.
    image: absolute path inside the root.
    label: 0 or more.
    client: '' where the manifest has no such column.
    region: absolute path inside the root, or None: the whole image is sensitive.
  """

  where: str
  image: pathlib.Path
  label: int
  client: str
  region: pathlib.Path | None


def read_manifest(
  path: str | pathlib.Path,
  root: str | pathlib.Path,
  split: str,
  *,
  need_clients: bool = True,
  path_prefix: str = '',
) -> list[Row]:
  """Reads one manifest.

  Train has the columns img_path, label, client; validation img_path, label and perhaps client,
  which is checked but not used; test img_path, label. Any may have region_path, a mask of the
  image's size (see `images.as_region`), or nothing where the whole image is sensitive. Paths are
  relative to `root` and may not leave it.

  Args:
    path: the CSV file, UTF-8.
    root: the folder of the images.
    split: 'train', 'validation' or 'test'.
    need_clients: whether train must have the column client.
    path_prefix: what all paths begin with that is not below `root`; it is taken off.

  Raises:
    UserError: names the file, and the row where one is at fault.
  """
  path, root = pathlib.Path(path), pathlib.Path(root)
  if not root.is_dir():
    raise UserError(f'image root {root} is not a folder')
  try:
    text = path.read_text(encoding='utf-8-sig')
  except FileNotFoundError:
    raise UserError(f'manifest {path}: there is no such file') from None
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'manifest {path} cannot be read as UTF-8 text ({error})') from error
  reader = csv.reader(io.StringIO(text, newline=''), strict=True)
  rows = []
  try:
    header = [name.strip() for name in next(reader, [])]
    _check_header(path, header, split, need_clients)
    for fields in reader:
      if not fields:
        continue  # A blank line, as editors leave at the end.
      where = f'manifest {path}, row {reader.line_num}'
      if len(fields) != len(header):
        raise UserError(f'{where}: {len(fields)} fields under {len(header)} columns')
      values = dict(zip(header, (field.strip() for field in fields), strict=True))
      rows.append(_parse_row(where, values, root.resolve(), path_prefix))
  except csv.Error as error:
    raise UserError(f'manifest {path}, row {reader.line_num}: not CSV ({error})') from error
  if not rows:
    raise UserError(f'manifest {path} is empty: it needs at least one row under its header')
  return rows


def _check_header(path, header, split, need_clients):
  required, allowed = _COLUMNS[split], (*_COLUMNS[split], *_OPTIONAL[split])
  if split == 'train' and not need_clients:
    required = required[:2]
  if not any(header):
    raise UserError(f'manifest {path} is empty: it needs the columns {",".join(required)}')
  for name in required:
    if name not in header:
      raise UserError(f'manifest {path}: column {name!r} is missing from {",".join(header)}')
  for name in header:
    if name not in allowed:
      raise UserError(f'manifest {path}: unknown column {name!r}: use {",".join(allowed)}')
    if header.count(name) > 1:
      raise UserError(f'manifest {path}: column {name!r} appears twice')


def _parse_row(where, values, root, path_prefix):
  label = values['label']
  if not re.fullmatch(r'[0-9]{1,6}', label):
    raise UserError(f'{where}: label {label!r} is not a whole number from 0')
  client = values.get('client', '')
  if 'client' in values and not _CLIENT.fullmatch(client):
    raise UserError(f"{where}: client {client!r} must be letters, digits, '.', '_' or '-'")
  if client == AGGREGATE:
    raise UserError(f'{where}: client {client!r} is the name of the mean of all: use another')
  region = values.get('region_path', '')
  return Row(
    where=where,
    image=_inside(where, _without_prefix(where, values['img_path'], path_prefix), root),
    label=int(label),
    client=client,
    region=_inside(where, _without_prefix(where, region, path_prefix), root) if region else None,
  )


def _without_prefix(where, name, prefix):
  if not name.startswith(prefix):
    raise UserError(f'{where}: path {name!r} does not begin with {prefix!r}')
  return name[len(prefix) :]


def _inside(where, name, root):
  if not name or '\0' in name:
    raise UserError(f'{where}: the path {name!r} is not a file name')
  # Either kind of separator: the check must not depend on where the manifest was written.
  parts = re.split(r'[/\\]', name)
  if pathlib.PurePosixPath(name).is_absolute() or pathlib.PureWindowsPath(name).drive:
    raise UserError(f'{where}: path {name!r} is absolute: write it relative to the image root')
  if '..' in parts or parts[0] == '':
    raise UserError(f'{where}: path {name!r} leaves the image root')
  try:
    resolved = (root / name).resolve()
  except (OSError, RuntimeError) as error:
    raise UserError(f'{where}: path {name!r} cannot be followed ({error})') from error
  if not resolved.is_relative_to(root):
    raise UserError(f'{where}: path {name!r} is a link that leaves the image root')
  return resolved


def check_splits(rows: dict[str, list[Row]], *, repeats: bool = False) -> int:
  """Checks the splits against each other and returns the number of classes.

  Args:
    rows: of each split.
    repeats: whether several clients of a split may have the same image.

  Raises:
    UserError: an image is listed twice, in one split or (a leak) in two; the training labels are
      not 0..K-1 with K >= 2; a held-out label is not among them.
  """
  seen = {}
  for split, listed in rows.items():
    for row in listed:
      if row.image in seen:
        other, first = seen[row.image]
        if repeats and split == other and row.client != first.client:
          continue
        leak = '' if split == other else f', which leaks {other} into {split}'
        raise UserError(f'{row.where}: {row.image.name} is already listed in {first.where}{leak}')
      seen[row.image] = (split, row)
  known = {row.label for row in rows['train']}
  count = max(known) + 1
  if len(known) != count or count < 2:
    raise UserError(
      f'{rows["train"][0].where.split(", row")[0]}: labels must be 0..K-1, each at least once, '
      f'K at least 2; found {", ".join(map(str, sorted(known)[:10]))}'
    )
  for split in rows:
    for row in rows[split]:
      if row.label not in known:
        raise UserError(f'{row.where}: label {row.label} is unknown: train has 0..{count - 1}')
  return count


def read_rows(
  rows: dict[str, list[Row]], image_size: int, *, repeats: bool = False
) -> dict[str, tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
  """Reads the images and regions of all splits, in order, at `image_size`.

  Args:
    rows: of each split.
    image_size: side in pixels.
    repeats: whether the same content may be in two splits under two names; it is a warning then.

  Returns:
    Per split: images, each uint8 [H, W, 1 or 3]; labels int32 [N]; regions uint8 [N, H, W, 1].

  Raises:
    UserError: an image cannot be read, or the same file is in two splits under two names.
  """
  contents = {}
  result = {}
  for split, listed in rows.items():
    pictures, regions = [], []
    for row in listed:
      picture = _read(row, row.image)
      digest = hashlib.sha256(row.image.read_bytes()).digest()
      other, first = contents.setdefault(digest, (split, row))
      if other != split:
        leak = (
          f'{row.where}: {row.image.name} has the same content as {first.image.name} in '
          f'{first.where}, which leaks {other} into {split}'
        )
        if not repeats:
          raise UserError(leak)
        logging.warning('%s', leak)
      pictures.append(images.fit(picture, image_size))
      regions.append(_region(row, picture.shape, image_size))
    labels = np.array([row.label for row in listed], np.int32)
    result[split] = (pictures, labels, np.stack(regions))
  return result


def _read(row, path, read=images.read_image):
  try:
    return read(path)
  except UserError as error:
    raise UserError(f'{row.where}: {path.name}: {error}') from error


def _region(row, shape, image_size):
  if row.region is None:
    return np.full((image_size, image_size, 1), 255, np.uint8)
  region = _read(row, row.region, images.read_region)
  if region.shape[:2] != shape[:2]:
    raise UserError(
      f'{row.where}: region {row.region.name} is {region.shape[1]}x{region.shape[0]} px, '
      f'its image {shape[1]}x{shape[0]}'
    )
  return images.fit_region(region, image_size)
