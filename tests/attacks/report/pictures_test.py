import base64
import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from attacks.report import pictures, reading
from tests.attacks import synthetic_run


def _decode(uri):
  prefix = 'data:image/png;base64,'
  assert uri.startswith(prefix)
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[len(prefix) :]))))


@pytest.mark.parametrize('channels', [1, 3])
def test_image_survives_the_embedding(channels):
  image = synthetic_run.photographs(1, 16, channels)[0]
  pixels = _decode(pictures.image_uri(image)).reshape(16, 16, channels)
  assert np.abs(pixels / 255 - image).max() <= 0.5 / 255 + 1e-6


def test_error_map_is_on_a_fixed_scale():
  truth = np.zeros((8, 8, 3))
  image = truth.copy()
  image[:4] = [0.25, 0.25, 0.25]
  image[4:, 4:] = [1.0, 1.0, 1.0]
  pixels = _decode(pictures.error_uri(image, truth))
  magma = matplotlib.colormaps['magma']
  assert tuple(pixels[0, 0]) == magma(0.5, bytes=True)[:3]
  assert tuple(pixels[7, 0]) == magma(0.0, bytes=True)[:3]
  assert tuple(pixels[7, 7]) == magma(1.0, bytes=True)[:3]
  bar = _decode(pictures.error_scale_uri())
  assert tuple(bar[0, 0]) == magma(0.0, bytes=True)[:3]
  assert tuple(bar[0, -1]) == magma(1.0, bytes=True)[:3]


def _points(path):
  pairs = path.replace('M', ' ').replace('L', ' ').replace('Z', ' ').split()
  return np.array(pairs, float).reshape(-1, 2)


def test_region_outline_runs_along_pixel_edges():
  region = np.zeros((10, 20, 1))
  region[2:5, 8:16] = 1
  points = _points(pictures.region_path(region))
  assert tuple(points.min(axis=0)) == (8.0, 2.0)
  assert tuple(points.max(axis=0)) == (16.0, 5.0)


def test_region_at_the_border_is_closed():
  region = np.zeros((10, 10, 1))
  region[:, :4] = 1
  path = pictures.region_path(region)
  assert path.count('M') == path.count('Z') == 1
  points = _points(path)
  assert tuple(points.min(axis=0)) == (0.0, 0.0)
  assert tuple(points.max(axis=0)) == (4.0, 10.0)


def test_two_regions_two_outlines():
  region = np.zeros((12, 12, 1))
  region[1:3, 1:3], region[7:10, 7:10] = 1, 1
  assert pictures.region_path(region).count('M') == 2


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_no_outline_where_there_is_no_region(value):
  assert pictures.region_path(np.full((8, 8, 1), value)) == ''


def test_curves_are_grouped_and_limited():
  curves = {'train/loss': [2.0, 1.0], 'bytes': [1e6, 1e6]}
  curves.update({f'score_{index}': [0.1, None] for index in range(9)})
  groups = dict(pictures.curve_groups(reading.Training([1, 2], curves)))
  assert list(groups['loss']) == ['train/loss']
  assert list(groups['score, 0 to 1']) == [f'score_{index}' for index in range(6)]


def test_training_picture_is_transparent_and_fits_each_theme():
  training = reading.Training([1, 2, 3], {'loss': [1.0, None, 0.5]})
  light = _decode(pictures.training_uri(training, dark=False))
  dark = _decode(pictures.training_uri(training, dark=True))
  assert light[0, 0, 3] == dark[0, 0, 3] == 0
  assert light[light[..., 3] > 200][:, :3].min() < dark[dark[..., 3] > 200][:, :3].max()
  assert not np.array_equal(light, dark)
  assert pictures.training_uri(reading.Training([1], {'bytes': [5.0]}), dark=False) is None


def test_points_of_a_name_look_the_same_in_all_panels():
  first = [pictures.Point('one', 0.0, 1.0, 0.5, 1.5), pictures.Point('two', 0.1, 2.0, 1.5, 2.5)]
  panels = {'both': first, 'the second alone': first[1:]}
  pixels = _decode(pictures.scatter_uri(panels, 'x', 'y', dark=False))
  half = pixels.shape[1] // 2
  seen = {}
  for name, color in zip(('one', 'two'), pictures._CURVE_COLORS, strict=False):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    drawn = (pixels[..., :3] == rgb).all(-1) & (pixels[..., 3] == 255)
    # Above the legend.
    drawn = drawn[: int(0.8 * len(drawn))]
    seen[name] = bool(drawn[:, :half].any()), bool(drawn[:, half:].any())
  assert seen == {'one': (True, False), 'two': (True, True)}
