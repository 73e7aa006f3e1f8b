import numpy as np
import pytest

from tff_shadow.data import patches
from tff_shadow.data.fundus_patches import FundusPatches
from tff_shadow.data.histology_patches import HistologyPatches

SPLITS = ('train', 'validation', 'test')


@pytest.mark.parametrize(
  ('builder', 'side'), [(FundusPatches, 1411), (HistologyPatches, 512)], ids=['fundus', 'histology']
)
@pytest.mark.parametrize('size', [32, 64, 128, 224])
def test_splits_never_share_a_pixel(builder, side, size, tmp_path):
  patch = builder(config=f'{size}px', data_dir=tmp_path).patch_size(size)
  owner = np.zeros((side, side), np.uint8)
  for bit, split in enumerate(SPLITS):
    corners = patches.patch_corners(builder.ZONES, split, patch, stride=2)
    assert corners.min() >= 0
    assert corners.max() + patch <= side
    for y, x in corners:
      owner[y : y + patch, x : x + patch] |= 1 << bit
  assert set(np.unique(owner)) <= {0, 1, 2, 4}
  assert {1, 2, 4} <= set(np.unique(owner))


def test_corners_of_a_small_layout():
  zones = patches.Zones(('tv', 'st'), 3)
  assert patches.patch_corners(zones, 'train', 3).tolist() == [[0, 0], [3, 3]]
  assert patches.patch_corners(zones, 'validation', 2).tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]
  assert patches.patch_corners(zones, 'test', 1, stride=2).tolist() == [
    [3, 0],
    [3, 2],
    [5, 0],
    [5, 2],
  ]
  with pytest.raises(ValueError, match='4 px'):
    patches.patch_corners(zones, 'test', 4)


def test_patch_means_match_slicing():
  image = np.random.default_rng(0).random((20, 30))
  corners = np.array([[0, 0], [3, 7], [15, 25]])
  expected = [image[y : y + 5, x : x + 5].mean() for y, x in corners]
  np.testing.assert_allclose(patches.patch_means(image, corners, 5), expected)


def test_choice_is_balanced_and_leaves_out_the_ambiguous():
  scores = np.linspace(0, 1, 101)
  chosen, labels = patches.balanced_choice(scores, (0.4, 0.6), 40, np.random.default_rng(0))
  assert np.bincount(labels).tolist() == [20, 20]
  assert len(set(chosen)) == 40
  assert (scores[chosen[labels == 0]] < 0.4).all()
  assert (scores[chosen[labels == 1]] > 0.6).all()
  few, labels = patches.balanced_choice(scores, (0.4, 0.955), 40, np.random.default_rng(0))
  assert len(few) == 10
  assert labels.sum() == 5


@pytest.mark.parametrize('constant', [False, True])
def test_top_fraction_has_the_same_area_for_every_image(constant):
  scores = np.zeros((8, 8)) if constant else np.random.default_rng(0).random((8, 8))
  mask = patches.top_fraction(scores, 0.25)
  assert (mask == 255).sum() == 16
  assert (mask == 0).sum() == 48
  assert scores[mask == 255].min() >= scores[mask == 0].max()
