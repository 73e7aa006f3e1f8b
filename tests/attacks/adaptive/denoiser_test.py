import numpy as np
import pytest

from attacks.adaptive import denoiser as denoiser_module
from attacks.adaptive.denoiser import DenoiserSettings, RegionDenoiser
from tests.attacks.observed_rounds import smooth_images
from tff_shadow.errors import UserError

_SETTINGS = DenoiserSettings(
  least_deviation=0.1, most_deviation=0.4, steps=150, batch_size=16, filters=8, learning_rate=1e-2
)


def _regions(count):
  regions = np.zeros((count, 8, 8, 1), np.float32)
  regions[:, 2:7, 2:7] = 1
  return regions


@pytest.fixture(scope='module')
def denoiser():
  return RegionDenoiser(smooth_images(64), _regions(64), _SETTINGS)


def test_takes_noise_out_of_images_that_it_has_not_seen(denoiser):
  images, regions = smooth_images(16, seed=5), _regions(16)
  noise = 0.3 * regions * np.random.default_rng(0).standard_normal(images.shape)
  noisy = np.clip(images + noise, 0, 1).astype(np.float32)
  found = denoiser(noisy, np.full(16, 0.3), regions)
  assert found.shape == images.shape
  assert found.min() >= 0
  assert found.max() <= 1
  before, after = (np.mean(np.square(x - images)) for x in (noisy, found))
  assert after < before / 2


def test_does_more_the_more_noise_it_is_told_of(denoiser):
  images, regions = smooth_images(16, seed=5), _regions(16)
  changes = [
    np.mean(np.square(denoiser(images, np.full(16, level), regions) - images))
    for level in (0.1, 0.4)
  ]
  assert changes[0] < changes[1]


def test_training_follows_its_seed_and_tells_its_progress():
  seen = []
  settings = DenoiserSettings(steps=2, batch_size=4, filters=2)
  build = lambda: RegionDenoiser(  # noqa: E731
    smooth_images(8), _regions(8), settings, lambda step, loss: seen.append((step, loss))
  )
  noisy = smooth_images(1, seed=3)
  first, second = (build()(noisy, np.full(1, 0.3), _regions(1)) for _ in range(2))
  np.testing.assert_array_equal(first, second)
  assert [step for step, _ in seen] == [1, 2, 1, 2]
  assert seen[:2] == seen[2:]


def test_sides_that_cannot_be_halved():
  with pytest.raises(UserError, match='10 x 10'):
    RegionDenoiser(np.zeros((2, 10, 10, 1)), np.zeros((2, 10, 10, 1)), _SETTINGS)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('least_deviation', 0.0),
    ('least_deviation', 2.0),
    ('most_deviation', float('inf')),
    ('known_region_share', 1.1),
    ('steps', 0),
    ('filters', 0),
  ],
)
def test_settings_out_of_range(field, value):
  with pytest.raises(ValueError, match='must be'):
    DenoiserSettings(**{field: value})


def test_a_trained_network_is_kept_and_found_again(tmp_path, monkeypatch):
  seen = []

  def build(images, **settings):
    return RegionDenoiser(
      images,
      _regions(8),
      DenoiserSettings(**{'steps': 2, 'batch_size': 4, 'filters': 2, **settings}),
      lambda step, loss: seen.append(step),
      tmp_path,
    )

  noisy = smooth_images(1, seed=3)
  first, again = (build(smooth_images(8))(noisy, np.full(1, 0.3), _regions(1)) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert seen == [1, 2]
  build(smooth_images(8, seed=1))
  build(smooth_images(8), seed=1)
  with monkeypatch.context() as patched:
    patched.setattr(denoiser_module, 'attacks_digest', lambda: 'others')
    build(smooth_images(8))
  assert len(seen) == 8
  kept = sorted(tmp_path.iterdir())
  assert len(kept) == 4
  for path in kept:
    path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(UserError, match=r'denoiser-\w+\.safetensors'):
    build(smooth_images(8))
