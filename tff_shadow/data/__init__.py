"""Federated image data sets: embedded ones, the TFDS catalogue, manifests, partitions."""

from tff_shadow.data.catalog import EMBEDDED, load, load_manifests
from tff_shadow.data.examples import Examples
from tff_shadow.data.federated import FederatedData, digest_of
from tff_shadow.data.images import COLORS, MIN_IMAGE_SIZE
from tff_shadow.data.local_training import client_dataset, local_training_order, most_repeats
from tff_shadow.data.partition import Partition, partition_indices
from tff_shadow.data.published_sets import PUBLISHED_SETS, load_published

__all__ = [
  'COLORS',
  'EMBEDDED',
  'MIN_IMAGE_SIZE',
  'PUBLISHED_SETS',
  'Examples',
  'FederatedData',
  'Partition',
  'client_dataset',
  'digest_of',
  'load',
  'load_manifests',
  'load_published',
  'local_training_order',
  'most_repeats',
  'partition_indices',
]
