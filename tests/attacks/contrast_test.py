import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.contrast import hides_contrast, with_contrast
from attacks.engine import attack_observation
from attacks.simulator import ClientSimulator
from attacks.threat_model import threat_model
from tests.attacks.observed_rounds import play_round, smooth_images
from tff_shadow.models import build_model

_SHAPE = (16, 16, 1)


def _observation(norm, sharing='local'):
  model = build_model('conv_small', image_shape=_SHAPE, num_classes=2, norm=norm, seed=0)
  return play_round(model, [(smooth_images(1, _SHAPE), [1])], batch_norm_sharing=sharing)


@pytest.mark.parametrize(
  ('norm', 'sharing', 'hidden'),
  [
    ('group', 'local', True),
    ('batch', 'local', True),
    ('none', 'local', False),
    # Running statistics stay what they are, and do not follow the image.
    ('batch', 'frozen', False),
  ],
)
def test_only_normalised_networks_hide_contrast(norm, sharing, hidden):
  simulator = ClientSimulator(_observation(norm, sharing))
  image = smooth_images(1, _SHAPE, seed=1)[0]
  assert hides_contrast(simulator, image, 0.5) == hidden
  # About black, where padding is not, contrast shows.
  assert not hides_contrast(simulator, image, 0.0)


def test_scales_the_images_of_a_lane_together():
  images = tf.constant(np.random.default_rng(0).uniform(size=(2, 3, 4, 4, 1)))
  scaled = with_contrast(images, 0.1, 0.5).numpy() - 0.5
  np.testing.assert_allclose(np.sqrt(np.mean(scaled**2, axis=(1, 2, 3, 4))), 0.1, rtol=1e-4)
  ratio = scaled / (images.numpy() - 0.5)
  np.testing.assert_allclose(ratio, ratio[:, :1, :1, :1] * np.ones_like(ratio))
  flat = tf.fill([1, 1, 2, 2, 1], 0.5)
  np.testing.assert_array_equal(with_contrast(flat, 0.1, 0.5), flat)


def _rms(images):
  return float(np.sqrt(np.mean(np.square(images - 0.5))))


def test_held_where_it_is_hidden():
  observation = _observation('group')
  config = AttackConfig(iterations=100, xla='off')
  held, free = (
    attack_observation(observation, dataclasses.replace(config, hold_contrast=hold))[0]
    for hold in (True, False)
  )
  public = _rms(observation.public_mean_image)
  for name in ('attack', 'prior_only'):
    assert _rms(held.reconstructions[name]) == pytest.approx(public, rel=0.05)
  assert _rms(free.reconstructions['attack']) > 1.2 * public
  facts = ' '.join(threat_model(observation, config, labels_known=False))
  assert 'that of the public mean image.' in facts


def test_left_alone_where_it_shows():
  observation = _observation('none')
  config = AttackConfig(iterations=20, xla='off')
  held, free = (
    attack_observation(observation, dataclasses.replace(config, hold_contrast=hold))[0]
    for hold in (True, False)
  )
  for name, images in held.reconstructions.items():
    np.testing.assert_array_equal(images, free.reconstructions[name])
