import numpy as np
import pytest

from binaries.linearised_release import LinearisedRelease
from tests.attacks.observed_rounds import small_model, smooth_images
from tff_shadow.observations import Truth
from tff_shadow.privacy import region_psnr

_SHAPES = ('isotropic', 'diagonal', 'correlated')


def _release(model, **kwargs):
  regions = np.zeros((2, 1, 8, 8, 1), np.float32)
  regions[0, :, 2:6, 2:6] = 1
  regions[1, :, 1:4, 3:7] = 0.5
  clients = [
    Truth(image[None], np.array([label], np.int32), region)
    for label, (image, region) in enumerate(zip(smooth_images(2), regions, strict=True))
  ]
  return LinearisedRelease(model, clients, smooth_images(20, seed=1), **kwargs)


@pytest.fixture(scope='module')
def release():
  return _release(small_model(activation='tanh'))


@pytest.mark.parametrize('shape', _SHAPES)
def test_noise_of_twice_the_ratio_costs_an_unbiased_attacker_6_db(release, shape):
  weak, strong = (
    [region_psnr(error) for error in release.errors(shape, s)] for s in ('0.2', '0.4')
  )
  assert weak[0] - strong[0] == pytest.approx(20 * np.log10(2), abs=1e-3)
  # Who knows what images look like loses less, and never does worse than one without bias.
  assert 0 < weak[1] - strong[1] < weak[0] - strong[0]
  assert weak[1] > weak[0]
  assert strong[1] > strong[0]


def test_more_noise_leaves_the_prior(release):
  known = release.errors('isotropic', '1e6')[1]
  for shape in _SHAPES:
    unbiased, prior = release.errors(shape, '1e4')
    assert prior == pytest.approx(known, rel=0.01)
    assert unbiased > known


def test_noise_in_the_images_is_bounded_whatever_the_model(release):
  other = _release(small_model(seed=1))
  weak, strong = (release.errors('correlated', f'images:{tau}') for tau in (0.1, 0.2))
  assert other.errors('correlated', 'images:0.1') == weak
  assert strong[0] == pytest.approx(4 * weak[0])
  assert weak[1] < strong[1] < strong[0]


def test_with_nothing_but_the_floor_noise_is_isotropic(release):
  bare = _release(small_model(activation='tanh'), floor=0.9999)
  expected = release.errors('isotropic', '0.2')
  for shape in _SHAPES:
    assert bare.errors(shape, '0.2') == pytest.approx(expected, rel=0.03)
  assert release.errors('correlated', '0.2') != pytest.approx(expected, rel=0.1)


def test_decoy_noise_and_absolute_scales_are_refused(release):
  with pytest.raises(ValueError, match='found scale:'):
    release.errors('correlated', 'scale:0.1')
  with pytest.raises(ValueError, match='decoy'):
    release.errors('decoy', '0.1')
