import contextlib
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tff_shadow.data import Partition, catalog, load
from tff_shadow.errors import UserError

IID = Partition.parse('iid:3')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Where the histology patches are prepared once for all tests."""
  return str(tmp_path_factory.mktemp('tfds'))


def histology(data_dir, **options):
  return load(
    'histology_patches',
    **({'image_size': 32, 'partition': IID, 'seed': 0, 'data_dir': data_dir} | options),
  )


def test_an_embedded_set(data_dir):
  data = histology(data_dir)
  assert data.name == 'histology_patches/32px/2.0.0'
  assert data.class_names == ('dab_low', 'dab_high')
  assert data.image_shape == (32, 32, 3)
  assert [len(examples) for examples in data.clients.values()] == [267, 267, 266]
  assert (len(data.validation), len(data.test)) == (200, 200)
  np.testing.assert_array_equal((data.test.regions == 255).mean(axis=(1, 2, 3)), 0.25)


def test_the_seed_deals_but_does_not_touch_the_test_split(data_dir):
  data, again, other = (histology(data_dir, seed=seed) for seed in (0, 0, 1))
  assert data.digest() == again.digest()
  assert data.digest() != other.digest()
  np.testing.assert_array_equal(data.test.images, other.test.images)


def test_color_and_number_of_examples(data_dir):
  data = histology(data_dir, color='gray', max_examples=30)
  assert data.image_shape == (32, 32, 1)
  assert [len(examples) for examples in data.clients.values()] == [10, 10, 10]
  assert len(data.test) == 30


def test_any_image_size(data_dir):
  data = histology(data_dir, image_size=40, max_examples=10)
  assert data.name == 'histology_patches/40px/2.0.0'
  assert data.image_shape == (40, 40, 3)


@pytest.fixture
def mocked():
  """Gives every set of the catalogue random images, 100 in each of the named splits."""
  # Undone in reverse order: both patch download_and_prepare.
  with contextlib.ExitStack() as stack:

    def mock_catalogue(splits):
      def prepare(builder, **_):
        infos = [
          tfds.core.SplitInfo(name=split, shard_lengths=[100], num_bytes=0) for split in splits
        ]
        builder.info.set_splits(tfds.core.splits.SplitDict(infos))

      stack.enter_context(tfds.testing.mock_data(num_examples=100))
      stack.enter_context(
        mock.patch.object(tfds.core.DatasetBuilder, 'download_and_prepare', prepare)
      )

    yield mock_catalogue


@pytest.mark.parametrize(
  ('name', 'splits', 'shape', 'num_classes', 'sizes'),
  [
    ('colorectal_histology', ['train'], (24, 24, 3), 8, (72, 13, 15)),
    ('mnist', ['train', 'test'], (24, 24, 1), 10, (85, 15, 100)),
    ('patch_camelyon', ['train', 'validation', 'test'], (24, 24, 3), 2, (100, 100, 100)),
  ],
)
def test_sets_of_the_catalogue(name, splits, shape, num_classes, sizes, mocked, tmp_path):
  mocked(splits)
  data, again, other = (
    load(name, image_size=24, partition=IID, seed=seed, data_dir=str(tmp_path))
    for seed in (0, 0, 1)
  )
  assert data.image_shape == shape
  assert data.num_classes == num_classes
  assert data.digest() == again.digest()
  assert data.digest() != other.digest()
  assert (data.test.regions == 255).all()
  train = {image.tobytes() for part in data.clients.values() for image in part.images}
  found = sum(len(part) for part in data.clients.values()), len(data.validation), len(data.test)
  assert sum(found) == sum(sizes)
  for count, expected in zip(found, sizes, strict=True):
    assert abs(count - expected) <= 6  # The share of each class is rounded.
  for split in {'validation', 'test'} - set(splits):
    # What is held out is taken from the clients.
    assert not train & {image.tobytes() for image in getattr(data, split).images}


class _LabelMaps(tfds.core.GeneratorBasedBuilder):
  """Two images with regions 0 and `full`."""

  VERSION = tfds.core.Version('1.0.0')
  full = 1

  def _info(self):
    features = {
      'image': tfds.features.Image(shape=(16, 16, 1)),
      'label': tfds.features.ClassLabel(names=['a', 'b']),
      'region': tfds.features.Image(shape=(16, 16, 1)),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples() for split in ('train', 'validation', 'test')}

  def _generate_examples(self):
    for label in (0, 1):
      region = np.zeros((16, 16, 1), np.uint8)
      region[:4] = self.full
      yield label, {'image': np.full_like(region, label), 'label': label, 'region': region}


def test_regions_of_a_set_may_be_label_maps(tmp_path, monkeypatch):
  monkeypatch.setattr(catalog, '_builder', lambda *_: _LabelMaps(data_dir=str(tmp_path / 'ones')))
  two = Partition.parse('iid:2')
  data = load('maps', image_size=16, partition=two, seed=0)
  assert (data.test.regions[:, :4] == 255).all()
  assert not data.test.regions[:, 4:].any()
  monkeypatch.setattr(_LabelMaps, 'full', 5)
  monkeypatch.setattr(catalog, '_builder', lambda *_: _LabelMaps(data_dir=str(tmp_path / 'fives')))
  with pytest.raises(UserError, match=r"'__label_maps/1\.0\.0', train example 0: a region"):
    load('maps', image_size=16, partition=two, seed=0)


def test_a_set_without_training_examples(mocked, tmp_path):
  mocked(['test'])
  with pytest.raises(UserError, match='no train split but test'):
    load('mnist', image_size=24, partition=IID, seed=0, data_dir=str(tmp_path))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('chest_fantom', 'did you mean chest_phantom'),
    ('mnst', 'did you mean mnist'),
    ('zzzzqqqq', 'is unknown: try chest_phantom'),
    ('glue', 'not image classification'),
    ('coco', 'not image classification'),
  ],
)
def test_sets_that_cannot_be_used(name, message, tmp_path):
  with pytest.raises(UserError, match=message):
    load(name, image_size=32, partition=IID, seed=0, data_dir=str(tmp_path))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'image_size': 8}, 'image size 8'),
    ({'color': 'blue'}, "color 'blue'"),
    ({'partition': Partition('manifest')}, 'no client column'),
    ({'partition': Partition.parse('sizes:700/200')}, '900 .* 800'),
    ({'validation_fraction': 1.0}, 'validation fraction'),
    ({'max_examples': 0}, 'max examples'),
  ],
)
def test_settings_that_cannot_be_used(data_dir, options, message):
  with pytest.raises(UserError, match=message):
    histology(data_dir, **options)


def test_a_failed_download_is_a_user_error(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise ConnectionError('no route')

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', fail)
  with pytest.raises(UserError, match='cannot be downloaded or written: no route'):
    load('mnist', image_size=32, partition=IID, seed=0, data_dir=str(tmp_path))


def test_importing_the_package_does_not_import_federated():
  program = 'import sys, tff_shadow.data; print("tensorflow_federated" in sys.modules)'
  found = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert found.stdout.strip() == 'False'
  assert set(catalog.EMBEDDED) == {'chest_phantom', 'fundus_patches', 'histology_patches'}
