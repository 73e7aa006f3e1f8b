import hashlib

import numpy as np
import pytest
import sklearn.linear_model
import tensorflow_datasets as tfds

from tff_shadow.data import chest_render
from tff_shadow.data.chest_phantom import ChestPhantom, ChestPhantomConfig, draw_public_films
from tff_shadow.data.fundus_patches import FundusPatches
from tff_shadow.data.histology_patches import HistologyPatches

SMALL = ChestPhantomConfig(
  name='test', description='small', image_size=32, num_train=24, num_validation=6, num_test=6
)


def prepare(builder, config, path):
  builder = builder(config=config, data_dir=path)
  builder.download_and_prepare()
  return builder


def read(builder, split):
  examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


# Of what the tables in results/ were measured on. If it changes, so must the builder's VERSION:
# TFDS reads what an earlier version of the code prepared under the same one.
CONTENT = {
  (FundusPatches, '2.0.0'): 'fa10566bfec3a123',
  (HistologyPatches, '2.0.0'): '499aa4315e70c791',
}


@pytest.mark.parametrize('builder', [FundusPatches, HistologyPatches])
def test_photographs(builder, tmp_path):
  prepared = prepare(builder, '32px', tmp_path)
  content = hashlib.sha256()
  seen = set()
  for split, count in (('train', 800), ('validation', 200), ('test', 200)):
    arrays = read(prepared, split)
    assert arrays['image'].shape == (count, 32, 32, 3)
    assert np.bincount(arrays['label']).tolist() == [count // 2, count // 2]
    assert set(np.unique(arrays['region'])) == {0, 255}
    # Exactly a quarter in every patch: the area cannot tell the label.
    np.testing.assert_array_equal((arrays['region'] == 255).sum(axis=(1, 2, 3)), 256)
    hashes = {image.tobytes() for image in arrays['image']}
    assert len(hashes) == count
    assert not hashes & seen
    seen |= hashes
    # Patches have structure: an empty one would measure nothing.
    assert arrays['image'].std(axis=(1, 2)).mean(axis=1).min() > 2
    content.update(arrays['image'].tobytes() + arrays['label'].astype('<i8').tobytes())
  assert content.hexdigest()[:16] == CONTENT[builder, str(prepared.version)]


def test_photographs_of_another_size(tmp_path):
  prepared = prepare(HistologyPatches, '128px', tmp_path)
  arrays = read(prepared, 'test')
  assert arrays['image'].shape == (200, 128, 128, 3)
  np.testing.assert_array_equal((arrays['region'] == 255).sum(axis=(1, 2, 3)), 128 * 128 // 4)


@pytest.mark.parametrize('builder', [FundusPatches, HistologyPatches])
def test_every_size_has_enough_patches_of_both_classes(builder, tmp_path):
  built = [builder(config=f'{size}px', data_dir=tmp_path) for size in (32, 64, 128, 224)]
  photograph = built[0].photograph()
  for sized in built:
    low, high = np.quantile(sized.candidates(photograph, 'train')[1], sized.QUANTILES)
    for split, half in (('train', 400), ('validation', 100), ('test', 100)):
      scores = sized.candidates(photograph, split)[1]
      assert (scores < low).sum() >= half
      assert (scores > high).sum() >= half


def test_the_label_of_histology_is_the_stain(tmp_path):
  arrays = read(prepare(HistologyPatches, '32px', tmp_path), 'test')
  # DAB is brown, that is: it takes blue light away.
  blue = arrays['image'][..., 2].mean(axis=(1, 2))
  assert blue[arrays['label'] == 1].mean() < blue[arrays['label'] == 0].mean() - 20


def test_phantom(tmp_path):
  prepared = prepare(ChestPhantom, SMALL, tmp_path / 'a')
  first, again = (
    read(built, 'train') for built in (prepared, prepare(ChestPhantom, SMALL, tmp_path / 'b'))
  )
  assert first['image'].shape == (24, 32, 32, 1)
  assert np.bincount(first['label']).tolist() == [12, 12]
  for key in first:
    np.testing.assert_array_equal(first[key], again[key])
  everything = [read(prepared, split)['image'] for split in ('train', 'validation', 'test')]
  images = {image.tobytes() for split in everything for image in split}
  assert len(images) == 36
  # As in `CONTENT`, but for rounding.
  assert str(prepared.version) == '1.0.0'
  assert np.mean([split.mean() for split in everything]) == pytest.approx(118.43, abs=0.01)
  public = draw_public_films(5, image_size=32, seed=0)
  assert (public.shape, public.dtype) == ((5, 32, 32, 1), np.uint8)
  assert not {film.tobytes() for film in public} & images
  np.testing.assert_array_equal(public[:3], draw_public_films(3, image_size=32, seed=0))


def render(label, index, size=32):
  return chest_render.render(size, label, np.random.default_rng([0, index]))


@pytest.mark.parametrize('size', [32, 96])
def test_the_lesion_is_inside_its_region_and_nothing_else_changes(size):
  for index in range(4):
    without, with_lesion = render(False, index, size), render(True, index, size)
    np.testing.assert_array_equal(without.lesion, with_lesion.lesion)
    assert without.lesion.max() == 1
    change = np.abs(with_lesion.image - without.image)
    # Noise depends on the grey level, so compare means over many pixels.
    inside, outside = with_lesion.lesion == 1, with_lesion.lesion == 0
    assert change[inside].mean() > 5 * change[outside].mean() + 0.03


def test_films_stay_in_range_and_differ():
  films = [render(False, index).image for index in range(8)]
  for film in films:
    assert film.min() >= 0
    assert film.max() <= 1
    assert film.std() > 0.1
  assert np.std(films, axis=0).mean() > 0.03


def test_phantom_regions_do_not_tell_the_label():
  films = [(render(bool(i % 2), i), i % 2) for i in range(600)]
  rows, columns = np.mgrid[:32, :32]
  features = []
  for film, _ in films:
    mask = film.lesion
    area = mask.sum()
    y, x = (mask * rows).sum() / area, (mask * columns).sum() / area
    spread = (mask * ((rows - y) ** 2 + (columns - x) ** 2)).sum() / area
    features.append([area, y, x, spread, area**2, y * y, x * x, x * y])
  features = np.array(features)
  features = (features - features.mean(0)) / features.std(0)
  labels = np.array([label for _, label in films])
  model = sklearn.linear_model.LogisticRegression().fit(features[:300], labels[:300])
  # Chance is 0.5 with a standard deviation of 0.029.
  assert abs(model.score(features[300:], labels[300:]) - 0.5) < 0.1
