import dataclasses

import numpy as np
import pytest

from tff_shadow.errors import UserError
from tff_shadow.shadow.augmentation import AUGMENTATIONS
from tff_shadow.shadow.generator_training import GeneratorSettings, GeneratorTraining, _batch

_SETTINGS = GeneratorSettings(
  latent_size=4, channels=2, steps=8, batch_size=3, augmentations=tuple(AUGMENTATIONS)
)


def _images(count=7, size=32):
  """Blobs, uint8 [N, H, W, 1]."""
  rng = np.random.default_rng(1)
  y, x = np.mgrid[:size, :size] / size
  centres = rng.uniform(0.2, 0.8, (count, 2, 1, 1))
  distance = (x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2
  return (255 * np.exp(-20 * distance)).astype(np.uint8)[..., None]


def _weights(training):
  return [array.copy() for array in training.generator.get_weights()]


def _equal(first, second):
  return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
  whole = GeneratorTraining(_images(), _SETTINGS, tmp_path)
  start = _weights(whole)
  figures = [whole.train() for _ in range(4)]
  whole.save()
  figures += [whole.train() for _ in range(4)]  # Lost, if it is killed here.
  assert whole.step == 8
  assert not _equal(start, _weights(whole))
  again = GeneratorTraining(_images(), _SETTINGS, tmp_path)
  again.restore()
  assert again.step == 4
  assert [again.train() for _ in range(4)] == figures[4:]
  assert _equal(_weights(whole), _weights(again))


def test_learns_images_and_stops_at_nan(tmp_path):
  settings = dataclasses.replace(
    _SETTINGS, latent_size=16, channels=4, steps=100, batch_size=3, augmentations=(), kl_weight=0.0
  )
  images = _images(3)
  training = GeneratorTraining(images, settings, tmp_path)
  figures = [training.train() for _ in range(settings.steps)]
  pixels = images / np.float32(255)
  error = np.mean((training.reconstruct(pixels) - pixels) ** 2)
  assert error < 0.5 * np.mean((pixels.mean(axis=0) - pixels) ** 2)
  assert figures[-1]['loss'] < 0.2 * figures[0]['loss']
  kernel = training.generator.trainable_variables[0]
  kernel.assign(np.full(kernel.shape, np.nan))
  with pytest.raises(UserError, match='loss of step 101 is not finite'):
    training.train()


def test_divergence_presses_the_latents(tmp_path):
  settings = dataclasses.replace(_SETTINGS, kl_weight=10.0, learning_rate=0.03, steps=30)
  training = GeneratorTraining(_images(), settings, tmp_path)
  kl = [training.train()['kl'] for _ in range(settings.steps)]
  assert kl[-1] < 0.3 * kl[0]


def test_every_image_is_taken_once_before_any_twice():
  settings = dataclasses.replace(_SETTINGS, batch_size=3)
  taken = np.concatenate([_batch(step, 7, settings) for step in range(7)]).reshape(3, 7)
  assert (np.sort(taken, axis=1) == np.arange(7)).all()
  assert len({row.tobytes() for row in taken}) == 3
  # More images in a batch than there are.
  assert sorted(_batch(0, 2, dataclasses.replace(_SETTINGS, batch_size=4))) == [0, 0, 1, 1]


def test_missing_damaged_and_other_checkpoints(tmp_path):
  training = GeneratorTraining(_images(), _SETTINGS, tmp_path)
  with pytest.raises(UserError, match='no checkpoint to resume from'):
    training.restore()
  training.save()
  other = GeneratorTraining(_images(), dataclasses.replace(_SETTINGS, channels=3), tmp_path)
  with pytest.raises(UserError, match='ckpt-0: damaged, or of other settings'):
    other.restore()
  next(tmp_path.glob('*.data*')).write_bytes(b'')
  with pytest.raises(UserError, match='ckpt-0: damaged'):
    training.restore()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'steps': 0}, '--steps=0: must be at least 1'),
    ({'latent_size': -1}, '--latent_size=-1'),
    ({'learning_rate': float('nan')}, '--learning_rate=nan'),
    ({'kl_weight': -0.1}, '--kl_weight=-0.1'),
    ({'augmentations': ('flips',)}, '--augment=flips'),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(_SETTINGS, **change)


def test_images_that_no_generator_draws(tmp_path):
  with pytest.raises(UserError, match=r'\(50, 50, 1\)'):
    GeneratorTraining(_images(size=50), _SETTINGS, tmp_path)
