"""The flags that choose a data set and its clients, for every binary that trains."""

import sys

from absl import flags

from binaries import command
from binaries.recorded_data import load_recorded
from tff_shadow.data import COLORS, EMBEDDED, FederatedData

flags.DEFINE_string(
  'dataset',
  'chest_phantom',
  f'{", ".join(EMBEDDED)} (made here, no download), the name of an image classification set of'
  ' the TFDS catalogue, or "manifests" with the flags below.',
)
flags.DEFINE_string('data_dir', None, "Where TFDS keeps its data; TFDS's own default.")
flags.DEFINE_integer('image_size', 32, 'Side of the images in pixels.')
flags.DEFINE_enum('color', 'native', COLORS, 'Channels of the images.')
flags.DEFINE_string(
  'partition',
  'iid:9',
  'How training images are dealt to clients: iid:CLIENTS, dirichlet:CLIENTS:ALPHA,'
  ' sizes:8/32/128, or manifest (the column client).',
)
flags.DEFINE_integer(
  'max_examples', None, 'Read only this many images of each split; all by default.', lower_bound=1
)
flags.DEFINE_string(
  'train_manifest',
  None,
  'CSV with the columns img_path, label, client. Each of the three manifests may also have'
  ' region_path: for each image a mask of its size, an image of 0 and 255 (or 0 and 1, a label map)'
  ' that marks what is sensitive; empty where all of it is.',
)
flags.DEFINE_string(
  'validation_manifest', None, 'CSV with the columns img_path, label and, if wanted, region_path.'
)
flags.DEFINE_string(
  'test_manifest', None, 'CSV with the columns img_path, label and, if wanted, region_path.'
)
flags.DEFINE_string('image_root', None, 'Folder to which the paths in the manifests are relative.')


def load_data(*, seed: int) -> FederatedData:
  """Loads what the flags name.

  Args:
    seed: Decides the partition and, where a set has no such split, what is held out.

  Raises:
    UserError: Names the flag, file or row at fault.
  """
  return load_recorded(command.flag_values(sys.modules[__name__]), seed=seed)
