"""Loading a data set by name or from manifests, and dealing it to clients."""

import difflib
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from tff_shadow.data import images, manifests, photograph_builder
from tff_shadow.data.chest_phantom import ChestPhantom, ChestPhantomConfig
from tff_shadow.data.examples import Examples
from tff_shadow.data.federated import FederatedData
from tff_shadow.data.fundus_patches import FundusPatches
from tff_shadow.data.histology_patches import HistologyPatches
from tff_shadow.data.partition import Partition, partition_indices
from tff_shadow.errors import UserError

_EMBEDDED = {
  'chest_phantom': (ChestPhantom, ChestPhantomConfig),
  'fundus_patches': (FundusPatches, photograph_builder.PatchConfig),
  'histology_patches': (HistologyPatches, photograph_builder.PatchConfig),
}
EMBEDDED = tuple(_EMBEDDED)
# Streams of the seed: what is held out must not depend on how the rest is dealt.
_HOLD_OUT, _PARTITION = 0, 1


def load(
  name: str,
  *,
  image_size: int,
  partition: Partition,
  seed: int,
  data_dir: str | None = None,
  color: str = 'native',
  validation_fraction: float = 0.15,
  max_examples: int | None = None,
) -> FederatedData:
  """Loads an embedded set or an image classification set of the TFDS catalogue.

  The embedded sets ('chest_phantom', 'fundus_patches', 'histology_patches') are made on first
  use and need no download. A set of the catalogue ('name' or 'name/config') must have the
  features 'image' and 'label', and may have 'region' (see `images.as_region`); where it has no
  validation or test split, that share of the train split is held out.

  Args:
    name: the set.
    image_size: side of the images in pixels; see `images.fit` for other aspect ratios.
    partition: how the train split is dealt to clients.
    seed: decides the held-out examples and the partition.
    data_dir: where TFDS keeps its data; None is TFDS's own default.
    color: 'native' (as the set has it), 'gray' or 'rgb'.
    validation_fraction: held out where a split is missing, in (0, 1).
    max_examples: reads only this many of each split, the first in TFDS's order.

  Raises:
    UserError: the set is unknown, cannot be had or is not image classification, or a setting is
      out of range.
  """
  images.check_size_and_color(image_size, color)
  if not 0 < validation_fraction < 1:
    raise UserError(f'validation fraction must be between 0 and 1, got {validation_fraction}')
  if max_examples is not None and max_examples < 1:
    raise UserError(f'max examples must be at least 1, got {max_examples}')
  if partition.kind == 'manifest':
    raise UserError(f"partition 'manifest' belongs to manifests; {name!r} has no client column")
  builder = _builder(name, image_size, data_dir)
  class_names = _check_features(name, builder)
  _prepare(name, builder)
  splits = {
    split: _read_split(builder, split, image_size, color, max_examples)
    for split in ('train', 'validation', 'test')
    if split in builder.info.splits
  }
  if 'train' not in splits:
    raise UserError(f'data set {name!r} has no train split but {", ".join(builder.info.splits)}')
  rng = np.random.default_rng([seed, _HOLD_OUT])
  for split in ('test', 'validation'):
    if split not in splits:
      splits['train'], splits[split] = _hold_out(splits['train'], validation_fraction, rng)
  return _federate(builder.info.full_name, class_names, splits, partition, seed)


def _builder(name, image_size, data_dir):
  if name in _EMBEDDED:
    builder, config = _EMBEDDED[name]
    # TFDS refuses a new config under the name of a ready one.
    size = config(name=f'{image_size}px', description=f'{image_size} px', image_size=image_size)
    ready = f'{image_size}px' in builder.builder_configs
    return builder(config=size.name if ready else size, data_dir=data_dir)
  try:
    return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    # The embedded sets have registered themselves with TFDS.
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name.split('/')[0], known, n=3)
    hint = f'did you mean {" or ".join(close)}?' if close else f'try {", ".join(_EMBEDDED)}'
    raise UserError(f'data set {name!r} is unknown: {hint}') from None
  except ValueError as error:  # TFDS's word for an unknown config or version.
    raise UserError(f'data set {name!r} cannot be opened: {error}') from error


def _check_features(name, builder):
  features = builder.info.features
  image, label = (
    features[key] if isinstance(features, tfds.features.FeaturesDict) and key in features else None
    for key in ('image', 'label')
  )
  is_image = isinstance(image, tfds.features.Image) and image.shape[-1] in (1, 3)
  if not (is_image and isinstance(label, tfds.features.ClassLabel) and label.num_classes):
    raise UserError(
      f"data set {name!r} is not image classification: it needs the features 'image' "
      "(grey or RGB) and 'label' (a class)"
    )
  return tuple(label.names)


def _prepare(name, builder):
  try:
    builder.download_and_prepare()
  except AssertionError as error:  # How TFDS asks for a manual download.
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
      raise
    raise UserError(f'data set {name!r} must be downloaded by hand: {error}') from error
  except (OSError, tfds.download.DownloadError) as error:
    raise UserError(f'data set {name!r} cannot be downloaded or written: {error}') from error


def _read_split(builder, split, image_size, color, max_examples):
  dataset = builder.as_dataset(split=split, shuffle_files=False)
  pictures, labels, regions = [], [], []
  for example in tfds.as_numpy(dataset.take(-1 if max_examples is None else max_examples)):
    if example['label'] < 0:
      raise UserError(f'data set {builder.info.full_name!r} has no labels in its {split} split')
    pictures.append(images.fit(_eight_bit(example['image']), image_size))
    labels.append(example['label'])
    if 'region' in builder.info.features:
      regions.append(images.fit_region(_region(builder, split, len(regions), example), image_size))
  pictures = images.stack(pictures, color)
  regions = np.stack(regions) if regions else None
  return Examples(pictures, np.asarray(labels, np.int32), regions)


def _region(builder, split, index, example):
  try:
    return images.as_region(example['region'])
  except UserError as error:
    name = builder.info.full_name
    raise UserError(f'data set {name!r}, {split} example {index}: {error}') from error


def _eight_bit(image):
  return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)


def _hold_out(examples, fraction, rng):
  """Splits off a stratified share."""
  held = []
  for label in np.unique(examples.labels):
    members = rng.permutation(np.flatnonzero(examples.labels == label))
    held.extend(members[: round(fraction * len(members))])
  keep = np.setdiff1d(np.arange(len(examples)), held)
  if not (len(held) and len(keep)):
    raise UserError(f'{len(examples)} training examples are too few to hold out {fraction:.0%}')
  return examples.take(keep), examples.take(np.sort(held))


def load_manifests(
  train_csv: str | pathlib.Path,
  validation_csv: str | pathlib.Path,
  test_csv: str | pathlib.Path,
  root: str | pathlib.Path,
  *,
  image_size: int,
  partition: Partition = Partition('manifest'),  # noqa: B008 - frozen.
  seed: int = 0,
  color: str = 'native',
  name: str = 'manifests',
  path_prefix: str = '',
  repeats: bool = False,
) -> FederatedData:
  """Loads images listed in CSV manifests; see `manifests.read_manifest` for their form.

  Args:
    train_csv: columns img_path, label, client (needed for the partition 'manifest'); as the others,
      perhaps region_path, a mask of what is sensitive in the image.
    validation_csv: columns img_path, label; a column client is checked but not used.
    test_csv: columns img_path, label.
    root: the folder to which image paths are relative, and which they may not leave.
    image_size: side of the images in pixels; see `images.fit` for other aspect ratios.
    partition: how the training examples are dealt to clients.
    seed: decides the partition.
    color: 'native' (RGB if any image has colour), 'gray' or 'rgb'.
    name: what reports call the set.
    path_prefix: what the paths in all manifests begin with that is not below `root`.
    repeats: takes lists that repeat images: the same image for several clients of a split, and,
      with a warning, the same content in two splits.

  Raises:
    UserError: names the file, and the row where one is at fault.
  """
  images.check_size_and_color(image_size, color)
  rows = {
    split: manifests.read_manifest(
      path, root, split, need_clients=partition.kind == 'manifest', path_prefix=path_prefix
    )
    for split, path in (('train', train_csv), ('validation', validation_csv), ('test', test_csv))
  }
  num_classes = manifests.check_splits(rows, repeats=repeats)
  read = manifests.read_rows(rows, image_size, repeats=repeats)
  # One decision for all splits: a model has one number of channels.
  pictures = images.stack([image for split in read.values() for image in split[0]], color)
  ends = np.cumsum([len(split[0]) for split in read.values()])[:-1]
  splits = {
    split: Examples(part, labels, regions)
    for (split, (_, labels, regions)), part in zip(
      read.items(), np.split(pictures, ends), strict=True
    )
  }
  class_names = tuple(map(str, range(num_classes)))
  column = [row.client for row in rows['train']]
  return _federate(name, class_names, splits, partition, seed, column)


def _federate(name, class_names, splits, partition, seed, client_column=None):
  train = splits['train']
  rng = np.random.default_rng([seed, _PARTITION])
  dealt = partition_indices(partition, train.labels, rng, client_column)
  return FederatedData(
    name=name,
    class_names=class_names,
    image_shape=train.images.shape[1:],
    clients={client: train.take(indices) for client, indices in dealt.items()},
    validation=splits['validation'],
    test=splits['test'],
  )
