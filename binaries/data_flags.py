"""The flags that choose a data set and its clients, for every binary that trains."""

from absl import flags

from tff_shadow.data import COLORS, EMBEDDED, FederatedData, Partition, load, load_manifests
from tff_shadow.errors import UserError

_DATASET = flags.DEFINE_string(
  'dataset',
  'chest_phantom',
  f'{", ".join(EMBEDDED)} (made here, no download), the name of an image classification set of'
  ' the TFDS catalogue, or "manifests" with the flags below.',
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, "Where TFDS keeps its data; TFDS's own default.")
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 32, 'Side of the images in pixels.')
_COLOR = flags.DEFINE_enum('color', 'native', COLORS, 'Channels of the images.')
_PARTITION = flags.DEFINE_string(
  'partition',
  'iid:9',
  'How training images are dealt to clients: iid:CLIENTS, dirichlet:CLIENTS:ALPHA,'
  ' sizes:8/32/128, or manifest (the column client).',
)
_MAX_EXAMPLES = flags.DEFINE_integer(
  'max_examples', None, 'Read only this many images of each split; all by default.', lower_bound=1
)
_TRAIN_MANIFEST = flags.DEFINE_string(
  'train_manifest', None, 'CSV with the columns img_path, label, client.'
)
_VALIDATION_MANIFEST = flags.DEFINE_string(
  'validation_manifest', None, 'CSV with the columns img_path, label.'
)
_TEST_MANIFEST = flags.DEFINE_string('test_manifest', None, 'CSV with the columns img_path, label.')
_IMAGE_ROOT = flags.DEFINE_string(
  'image_root', None, 'Folder to which the paths in the manifests are relative.'
)


def load_data(*, seed: int) -> FederatedData:
  """Loads what the flags name.

  Args:
    seed: Decides the partition and, where a set has no such split, what is held out.

  Raises:
    UserError: Names the flag, file or row at fault.
  """
  manifests = (_TRAIN_MANIFEST, _VALIDATION_MANIFEST, _TEST_MANIFEST, _IMAGE_ROOT)
  if _DATASET.value == 'manifests':
    for flag in manifests:
      if not flag.value:
        raise UserError(f'--{flag.name} is required with --dataset=manifests')
    return load_manifests(
      *(flag.value for flag in manifests),
      image_size=_IMAGE_SIZE.value,
      partition=Partition.parse(_PARTITION.value),
      seed=seed,
      color=_COLOR.value,
    )
  for flag in manifests:
    if flag.value:
      raise UserError(f'--{flag.name} needs --dataset=manifests')
  return load(
    _DATASET.value,
    image_size=_IMAGE_SIZE.value,
    partition=Partition.parse(_PARTITION.value),
    seed=seed,
    data_dir=_DATA_DIR.value,
    color=_COLOR.value,
    max_examples=_MAX_EXAMPLES.value,
  )
