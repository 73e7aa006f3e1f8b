import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.engine import attack_observation
from attacks.presets import PRESETS
from attacks.public_prior import fitted_prior
from attacks.scoring.assignment import in_order
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images


def test_its_weight_is_per_value():
  images = smooth_images(40)
  whole, per_value = (fitted_prior(images, (), 0, value_weight=w) for w in (None, 0.5))
  assert whole.weight == 1
  assert per_value.weight == pytest.approx(0.5 / 64)
  assert whole.source == per_value.source
  tried = tf.constant(images[None, :1])
  found = [float(prior(tried, tf.constant(0), 1)[0]) for prior in (whole, per_value)]
  assert found[1] == pytest.approx(0.5 / 64 * found[0], rel=1e-5)


def test_variations_are_of_the_seed():
  images = smooth_images(40)
  sources = [fitted_prior(images, ('shifts',), seed).source for seed in (0, 0, 1)]
  assert sources[0] == sources[1] != sources[2]
  assert fitted_prior(images, (), 0).source == fitted_prior(images, (), 1).source


def test_too_few_images_have_none():
  images = smooth_images(2)
  assert fitted_prior(images, ('shifts',), 0) is None
  assert fitted_prior(np.repeat(images, 20, axis=0), (), 0) is None


def test_it_tells_apart_what_a_batch_mixes():
  images = smooth_images(6, seed=3)
  observation = play_round(small_model(), [(images, [0, 0, 0, 1, 1, 1])])
  prior = fitted_prior(smooth_images(200, seed=50), (), 0, value_weight=0.03)
  config = dataclasses.replace(
    PRESETS['best_public'].build(), iterations=150, restarts=2, xla='off'
  )
  closeness = {}
  for own in (prior, None):
    settings = dataclasses.replace(config, gaussian_images=own)
    (result,) = attack_observation(observation, settings, controls=False)
    found = in_order(result.reconstructions['attack'], images)
    closeness[own is not None] = np.mean([psnr(*pair) for pair in zip(found, images, strict=True)])
  assert closeness[True] > closeness[False] + 1
