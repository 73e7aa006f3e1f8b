import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.shadow.augmentation import AUGMENTATIONS, augment, check_augmentations


def _images(count=64, size=16):
  """Smooth, and unlike any of their mirror images and turns."""
  y, x = np.mgrid[:size, :size] / size
  image = 0.2 + 0.3 * np.exp(-8 * ((x - 0.2) ** 2 + (y - 0.3) ** 2)) + 0.2 * x**2
  return tf.constant(np.tile(image[None, ..., None], (count, 1, 1, 1)), tf.float32)


def _seed(value=0):
  return tf.constant([3, value])


def _distinct(images):
  return {image.round(4).tobytes() for image in images.numpy()}


@pytest.mark.parametrize(
  ('names', 'count'), [((), 1), (('mirror',), 2), (('turns',), 4), (('mirror', 'turns'), 8)]
)
def test_mirror_images_and_turns_are_all_there_and_nothing_else(names, count):
  images = _images()
  varied = augment(images, names, _seed())
  assert len(_distinct(varied)) == count
  image = images[0].numpy()
  turned = [np.rot90(image, k) for k in range(4)]
  allowed = turned + [turn[:, ::-1] for turn in turned]
  for one in varied.numpy():
    assert min(np.abs(one - other).max() for other in allowed) == 0
  if names == ('mirror',):
    assert any(np.array_equal(one, image[:, ::-1]) for one in varied.numpy())


@pytest.mark.parametrize(('name', 'most'), [('shifts', 0.15), ('brightness', 0.12)])
def test_small_changes_of_each_image(name, most):
  images = _images()
  varied = augment(images, [name], _seed())
  changes = np.abs(varied - images).max(axis=(1, 2, 3))
  assert len(_distinct(varied)) == len(images)
  assert 0.02 < changes.max() < most
  assert abs(np.mean(varied - images)) < 0.01


def test_seed_decides_and_a_graph_gives_the_same():
  names = tuple(AUGMENTATIONS)
  images = _images(8)
  once = augment(images, names, _seed())
  np.testing.assert_array_equal(once, augment(images, names, _seed()))
  assert np.abs(once - augment(images, names, _seed(1))).max() > 0.01
  graph = tf.function(lambda images, seed: augment(images, names, seed))
  np.testing.assert_allclose(graph(images, _seed()), once, atol=1e-6)


def test_values_stay_in_range():
  images = tf.constant(np.random.default_rng(0).integers(0, 2, (32, 8, 8, 3)), tf.float32)
  varied = augment(images, tuple(AUGMENTATIONS), _seed()).numpy()
  assert varied.shape == images.shape
  assert varied.min() == 0
  assert varied.max() == 1


def test_unknown_name():
  with pytest.raises(UserError, match='--augment=flips: use a list of mirror'):
    check_augmentations(['mirror', 'flips'])


def test_images_that_are_not_square_keep_their_shape():
  images = _images(size=24)[:, :16]
  varied = augment(images, list(AUGMENTATIONS), _seed())
  assert varied.shape == images.shape
  turned = augment(images, ['turns'], _seed())
  halves = [images[0].numpy(), np.rot90(images[0].numpy(), 2)]
  for one in turned.numpy():
    assert min(np.abs(one - other).max() for other in halves) == 0
  # Shifts are by shares of each side.
  moved = augment(images, ['shifts'], _seed()).numpy()
  assert 0 < np.abs(moved - images.numpy()).mean() < 0.1
