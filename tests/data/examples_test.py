"""One split of images: what is checked, and what is filled in."""

import numpy as np
import pytest

from tests.conftest import make_examples
from tff_shadow.data import Examples

_GIVEN = make_examples(4, 0)


def test_where_no_region_is_named_the_whole_image_is_sensitive():
  examples = Examples(_GIVEN.images, _GIVEN.labels)
  assert examples.regions.shape == (4, 8, 8, 1)
  np.testing.assert_array_equal(examples.float_regions(), 1)


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('images', _GIVEN.float_images(), r'uint8 \[N, H, W, 1 or 3\], got float32 \[4, 8, 8, 1\]'),
    ('images', _GIVEN.images[..., 0], r'got uint8 \[4, 8, 8\]'),
    ('labels', _GIVEN.labels[:3], r'labels must be int32 \[4\], got int32 \[3\]'),
    ('labels', _GIVEN.labels.astype(np.int64), 'got int64'),
    ('regions', _GIVEN.regions[:, :4], r'regions must be uint8 \[4, 8, 8, 1\], got uint8'),
    ('regions', _GIVEN.float_regions(), 'got float32'),
  ],
)
def test_arrays_of_another_kind_are_refused(name, value, message):
  arrays = {'images': _GIVEN.images, 'labels': _GIVEN.labels, 'regions': _GIVEN.regions}
  with pytest.raises(ValueError, match=message):
    Examples(**{**arrays, name: value})
