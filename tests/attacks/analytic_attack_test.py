import numpy as np
import pytest
import tensorflow as tf

from attacks.analytic_attack import recover_observation
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.errors import UserError


def _dense_model():
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input((8, 8, 1))
  x = tf.keras.layers.Dense(64, activation='relu')(tf.keras.layers.Flatten()(inputs))
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(x))


def test_reads_one_image_of_every_client():
  images = smooth_images(2)
  observation = play_round(_dense_model(), [(images[:1], [1]), (images[1:], [0])], steps=3)
  results = recover_observation(observation)
  for result, image in zip(results, images, strict=True):
    assert result.status == 'ok'
    assert psnr(result.reconstructions['attack'][0], image) > 60
    assert set(result.reconstructions) == {'attack', 'prior_only', 'mean_image'}
  assert [result.labels for result in results] == [(1,), (0,)]


def test_an_update_of_zeros_fails_and_another_model_is_refused():
  images = smooth_images(1)
  observation = play_round(_dense_model(), [(images, [1])], learning_rate=0.0)
  observation = observation.__class__(
    **{
      **vars(observation),
      'client_training': play_round(_dense_model(), [(images, [1])]).client_training,
    }
  )
  result = recover_observation(observation)[0]
  assert result.status == 'failed'
  assert 'all zeros' in result.reason
  assert 'attack' not in result.reconstructions
  np.testing.assert_array_equal(
    result.reconstructions['mean_image'][0], observation.public_mean_image
  )
  with pytest.raises(UserError, match='dense'):
    recover_observation(play_round(small_model(), [(images, [1])]))
