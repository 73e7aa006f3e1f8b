import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from attacks.scoring import lpips
from tests.attacks import synthetic_run
from tests.attacks.scoring.lpips_reference import (
  CONVOLUTIONS,
  WIDTHS,
  seeded_images,
  seeded_lpips,
  seeded_weights,
)
from tff_shadow.errors import UserError

# Printed by lpips_reference.py with lpips 0.1.4 and torch 2.13.0 in float64: the distance, its map
# in the first and last pixel, and the mean of the map's upper left quarter.
_REFERENCE = {
  ('alex', (32, 32, 3)): (0.077643409, 0.008695289, 0.068589463, 0.032504631),
  ('alex', (32, 32, 1)): (0.151750078, 0.089534788, 0.051623227, 0.129962567),
  ('alex', (41, 50, 3)): (0.148693168, 0.042370082, 0.173627897, 0.163322256),
  ('vgg', (32, 32, 3)): (0.455820972, 0.499620095, 0.182826306, 0.377466317),
  ('vgg', (32, 32, 1)): (0.480021753, 0.222889015, 0.487221303, 0.433136601),
  ('vgg', (41, 50, 3)): (0.520778972, 0.398788583, 0.429565433, 0.397581970),
}


@pytest.fixture(scope='module')
def metrics(tmp_path_factory):
  return {net: seeded_lpips(tmp_path_factory.mktemp('weights'), net) for net in WIDTHS}


@pytest.mark.parametrize(('net', 'shape'), _REFERENCE)
def test_agrees_with_the_reference(metrics, net, shape):
  value, spatial = metrics[net](*seeded_images(*shape))
  quarter = spatial[: shape[0] // 2, : shape[1] // 2].mean()
  found = (value, spatial[0, 0], spatial[-1, -1], quarter)
  assert spatial.shape == shape[:2]
  assert found == pytest.approx(_REFERENCE[net, shape], rel=2e-5)


def test_layers_are_those_of_the_reference():
  for net, layers in lpips.LAYERS.items():
    found = [(x.index, x.kernel) for x in layers if isinstance(x, lpips._Convolution)]
    assert tuple(found) == CONVOLUTIONS[net]


@pytest.mark.parametrize('net', WIDTHS)
def test_is_zero_for_equal_images_symmetric_and_grows_with_noise(metrics, net):
  image = synthetic_run.photographs(1, 40, 3)
  small, large = (
    synthetic_run.noisy(image, np.array([deviation]), 0)[0] for deviation in (0.05, 0.3)
  )
  metric = metrics[net]
  value, spatial = metric(image[0], image[0])
  assert value == 0
  assert not spatial.any()
  assert 0 < metric(image[0], small)[0] < metric(image[0], large)[0]
  assert metric(image[0], small)[0] == pytest.approx(metric(small, image[0])[0])


@pytest.mark.parametrize('net', WIDTHS)
def test_grey_images_are_repeated(metrics, net):
  grey = synthetic_run.photographs(2, 33, 1)
  colour = np.repeat(grey, 3, axis=-1)
  assert metrics[net](*grey)[0] == metrics[net](*colour)[0]


@pytest.mark.parametrize('net', WIDTHS)
def test_pairwise_agrees_with_pairs_whatever_the_chunk(metrics, net, monkeypatch):
  monkeypatch.setattr(lpips, '_CHUNK', 2)
  first, second = synthetic_run.photographs(2, 32, 3), synthetic_run.photographs(5, 32, 3, seed=1)
  found = metrics[net].pairwise(first, second)
  expected = [[metrics[net](one, other)[0] for other in second] for one in first]
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert metrics[net].pairwise(first, second[:0]).shape == (2, 0)


@pytest.mark.parametrize('net', WIDTHS)
def test_smallest_image(metrics, net):
  side = lpips.MIN_SIDE[net]
  image = synthetic_run.photographs(1, side, 3)[0]
  assert metrics[net](image, 1 - image)[0] > 0
  with pytest.raises(UserError, match=f'at least {side}x{side} pixels, found {side - 1}x{side}'):
    metrics[net](image[1:], image[1:])


def test_what_to_do_with_small_images(metrics):
  image = np.zeros((30, 30, 3), np.float32)
  with pytest.raises(UserError, match='use vgg or leave out --lpips_weights'):
    metrics['alex'](image, image)
  with pytest.raises(UserError, match='15x30; leave out --lpips_weights'):
    metrics['alex'](image[:15], image[:15])


def test_rejects_other_shapes(metrics):
  with pytest.raises(UserError, match='1 or 3 channels'):
    metrics['vgg'](np.zeros((32, 32, 2)), np.zeros((32, 32, 2)))
  with pytest.raises(ValueError, match='share one shape'):
    metrics['vgg'](np.zeros((32, 32, 3)), np.zeros((32, 32, 1)))


def test_digest_tells_weights_apart(metrics, tmp_path):
  path = tmp_path / 'other.safetensors'
  safetensors_numpy.save_file(seeded_weights('alex', seed=1), path)
  other = lpips.load_lpips(path, 'alex')
  assert len(other.digest) == 64
  assert other.digest != metrics['alex'].digest


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('features.6.weight', None, 'tensor features.6.weight is missing'),
    ('features.6.bias', np.zeros(9, np.float32), r'must be float32 \[10\] .* found float32 \[9\]'),
    ('features.3.weight', np.zeros((8, 6, 3, 3), np.float32), r'float32 \[any, 6, 5, 5\]'),
    ('features.0.weight', np.zeros((0, 3, 11, 11), np.float32), r'found float32 \[0, 3, 11, 11\]'),
    ('features.10.bias', np.zeros(5), 'found float64'),
    ('features.8.bias', np.full(7, np.nan, np.float32), 'not finite'),
    ('lin4.model.1.weight', None, 'lin4.model.1.weight is missing, --lpips_net=alex'),
    ('lin2.model.1.weight', np.zeros((10,), np.float32), r'float32 \[1, 10, 1, 1\]'),
  ],
)
def test_one_line_names_file_and_tensor(tmp_path, name, value, message):
  tensors = seeded_weights('alex')
  del tensors[name]
  if value is not None:
    tensors[name] = value
  path = tmp_path / 'weights.safetensors'
  safetensors_numpy.save_file(tensors, path)
  with pytest.raises(UserError, match=message) as caught:
    lpips.load_lpips(path, 'alex')
  assert str(path) in str(caught.value)
  assert name in str(caught.value)
  assert '\n' not in str(caught.value)


def test_weights_of_the_other_net_or_no_weights(tmp_path):
  path = tmp_path / 'weights.safetensors'
  with pytest.raises(UserError, match='no such file'):
    lpips.load_lpips(path, 'vgg')
  safetensors_numpy.save_file(seeded_weights('alex'), path)
  with pytest.raises(UserError, match=r'features.0.weight must be float32 \[any, 3, 3, 3\]'):
    lpips.load_lpips(path, 'vgg')
  with pytest.raises(UserError, match='--lpips_net=squeeze: use one of alex, vgg'):
    lpips.load_lpips(path, 'squeeze')
