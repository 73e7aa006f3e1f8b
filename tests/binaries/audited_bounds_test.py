import contextlib
import dataclasses

import numpy as np
import pytest

from binaries.audited_bounds import bounds_of
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.data import Examples
from tff_shadow.learning import ShadowDefense, ShadowNoise
from tff_shadow.observations import Truth
from tff_shadow.shadow import SaliencyConfig


@contextlib.contextmanager
def _unwatched(*_):
  yield lambda *_: None


def _bounds(noise, *, images=1, norm='none', watch=_unwatched, sensitive=(0, 1)):
  clients = [(smooth_images(images), [0] * images), (smooth_images(images, seed=2), [1] * images)]
  observation = dataclasses.replace(
    play_round(small_model(activation='tanh', norm=norm), clients),
    defense=ShadowDefense(noise, frozen=False, secrets=None).public_settings()
    if noise
    else {'name': 'none'},
  )
  region = np.zeros((images, 8, 8, 1), np.float32)
  region[:, 2:6, 2:6] = 1
  truth = {
    client.client_id: Truth(pixels, np.array(labels, np.int32), region * (k in sensitive))
    for k, (client, (pixels, labels)) in enumerate(zip(observation.clients, clients, strict=True))
  }
  public = Examples(
    (255 * smooth_images(20, seed=1)).astype(np.uint8),
    np.arange(20, dtype=np.int32) % 2,
    np.full((20, 8, 8, 1), 255, np.uint8),
  )
  return bounds_of(observation, truth, list(truth), public, watch)


def _noise(shape, kind='ratio', value=1.0, saliency='gradcam', **kwargs):
  return ShadowNoise(shape, NoiseStrength(kind, value), SaliencyConfig(kind=saliency), **kwargs)


@pytest.mark.parametrize(('shape', 'kind'), [('isotropic', 'image_ratio'), ('decoy', 'scale')])
def test_noise_without_a_shadow_is_bounded_whatever_the_shadow(shape, kind, monkeypatch):
  # How near to its limit the covariance of decoys is, is none of this test.
  monkeypatch.setattr('binaries.linearised_release._DECOY_SAMPLES', 32)
  monkeypatch.setattr('binaries.linearised_release._DRAWS', 4)
  found = _bounds(_noise(shape, kind))
  assert [bound['name'] for bound in found] == ['Best linear estimate', 'Without bias']
  assert found == _bounds(_noise(shape, kind, saliency='given'))
  # How loud relative noise is tells of the update, and does not enter.
  assert [bound['holds_here'] for bound in found] == [kind == 'scale', False]
  assert ('How loud' in found[0]['rests_on']) == (kind != 'scale')


@pytest.mark.parametrize('shape', ['diagonal', 'correlated'])
def test_noise_of_a_shadow_is_bounded_where_its_region_is_given(shape):
  assert len(_bounds(_noise(shape, saliency='given'))) == 2
  assert not _bounds(_noise(shape))
  assert not _bounds(_noise(shape, saliency='given', propagation='local_training'))


def test_an_image_without_a_region_has_no_bound():
  noise = _noise('isotropic')
  for bound in _bounds(noise, sensitive=(1,)):
    assert len(bound['clients']) == 1
  assert _bounds(noise, sensitive=()) == []


def test_noise_in_the_images_is_bounded():
  noise = _noise('correlated', 'scale', 0.1, 'given', propagation='images')
  assert _bounds(noise)[0]['holds_here']


@pytest.mark.parametrize(
  'case',
  [
    {'noise': None},
    {'noise': _noise('isotropic'), 'images': 2},
    {'noise': _noise('isotropic'), 'norm': 'batch'},
    {'noise': _noise('correlated', 'scale', saliency='given')},
    {'noise': _noise('isotropic', 'ratio', 0.0)},
  ],
)
def test_nothing_is_computed_where_there_is_no_bound(case):
  def watch(*_):
    raise AssertionError('something was computed')

  assert _bounds(**case, watch=watch) == []
