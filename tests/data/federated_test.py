import numpy as np
import pytest

from tff_shadow.data.examples import Examples
from tff_shadow.data.federated import FederatedData


def make_examples(count, seed=0, channels=1):
  rng = np.random.default_rng(seed)
  return Examples(
    images=rng.integers(0, 256, (count, 8, 8, channels), np.uint8),
    labels=(np.arange(count) % 2).astype(np.int32),
    regions=rng.integers(0, 256, (count, 8, 8, 1), np.uint8),
  )


def make_data(**changes):
  fields = {
    'name': 'toy',
    'class_names': ('no', 'yes'),
    'image_shape': (8, 8, 1),
    'clients': {'client_00': make_examples(3, 1), 'client_01': make_examples(2, 2)},
    'validation': make_examples(2, 3),
    'test': make_examples(2, 4),
  }
  return FederatedData(**(fields | changes))


def test_take_keeps_images_labels_and_regions_together():
  examples = make_examples(5)
  taken = examples.take([4, 1, 1])
  assert len(taken) == 3
  np.testing.assert_array_equal(taken.images[0], examples.images[4])
  np.testing.assert_array_equal(taken.labels, examples.labels[[4, 1, 1]])
  np.testing.assert_array_equal(taken.regions[2], examples.regions[1])


def test_floats_span_zero_to_one():
  images = np.zeros((2, 4, 4, 3), np.uint8)
  images[1] = 255
  examples = Examples(images, np.zeros(2, np.int32), images[..., :1].copy())
  for array in (examples.float_images(), examples.float_regions()):
    assert array.dtype == np.float32
    assert array[0].max() == 0
    assert array[1].min() == 1


@pytest.mark.parametrize(
  'change',
  [
    {'images': np.zeros((2, 8, 8, 1), np.float32)},
    {'images': np.zeros((2, 8, 8, 2), np.uint8)},
    {'labels': np.zeros(2, np.int64)},
    {'labels': np.zeros(3, np.int32)},
    {'regions': np.zeros((2, 8, 8, 3), np.uint8)},
  ],
)
def test_wrong_arrays_are_refused(change):
  good = make_examples(2)
  fields = {'images': good.images, 'labels': good.labels, 'regions': good.regions}
  with pytest.raises(ValueError, match=next(iter(change))):
    Examples(**(fields | change))


def test_digest_is_stable_and_sees_every_part():
  digests = {make_data().digest()}
  assert digests == {make_data().digest()}
  one = make_examples(3, 1)
  for name in ('images', 'labels', 'regions'):
    arrays = {key: getattr(one, key).copy() for key in ('images', 'labels', 'regions')}
    arrays[name].flat[0] ^= 1
    clients = {'client_00': Examples(**arrays), 'client_01': make_examples(2, 2)}
    digests.add(make_data(clients=clients).digest())
  digests.add(make_data(clients={'a': one, 'client_01': make_examples(2, 2)}).digest())
  digests.add(make_data(test=make_examples(2, 5)).digest())
  digests.add(make_data(clients={'client_01': make_examples(2, 2), 'client_00': one}).digest())
  assert len(digests) == 7


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'clients': {}}, 'clients is empty'),
    ({'test': make_examples(0)}, 'test has no examples'),
    ({'validation': make_examples(2, channels=3)}, 'validation has images'),
    ({'class_names': ('only',)}, 'labels outside'),
  ],
)
def test_inconsistent_data_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    make_data(**change)
