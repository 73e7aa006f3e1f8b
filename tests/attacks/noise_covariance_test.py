import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.matching import CosineMatching, SquaredMatching
from attacks.noise_covariance import NoiseCovariance
from attacks.shared_solvers import SharedSolvers
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.observations import WeightArrays


def _draws(count=40, entries=200, scales=(9.0, 4.0, 2.0)):
  rng = np.random.default_rng(0)
  spread = np.linalg.qr(rng.standard_normal((entries, len(scales))))[0] * np.array(scales)
  return (rng.standard_normal((count, len(scales))) @ spread.T).astype(np.float32)


def test_distances_are_those_of_the_whole_covariance():
  draws, variance = _draws(), 0.7
  covariance = NoiseCovariance.fitted(draws, variance)
  assert covariance.directions.shape == (200, 3)
  whole = draws.T.astype(np.float64) @ draws / len(draws) + variance * np.eye(200)
  rng = np.random.default_rng(1)
  one, other = rng.standard_normal((2, 200))
  found = covariance.mahalanobis(_cut(one), _cut(other))
  expected = ((one - other) @ np.linalg.solve(whole, one - other)) / (
    other @ np.linalg.solve(whole, other)
  )
  assert found.dtype == tf.float64
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # A direction of the noise is worth less, by as much as there is more of it.
  along = covariance.directions[:, 0].astype(np.float64)
  ratio = along @ whole @ along / variance
  np.testing.assert_allclose(covariance.ratios[0], ratio, rtol=1e-5)


def _cut(vector):
  """As two variables."""
  return [tf.constant(vector[:120].reshape(10, 12)), tf.constant(vector[120:])]


def test_its_gradient_is_that_of_differences():
  covariance = NoiseCovariance.fitted(_draws(), 0.7)
  rng = np.random.default_rng(2)
  point, given, direction = rng.standard_normal((3, 200))
  with tf.GradientTape() as tape:
    tensor = tf.constant(point)
    tape.watch(tensor)
    value = covariance.mahalanobis([tensor], [tf.constant(given)])
  ends = [
    float(covariance.mahalanobis([tf.constant(point + s * direction)], [tf.constant(given)]))
    for s in (1e-6, -1e-6)
  ]
  slope = np.sum(tape.gradient(value, tensor) * direction)
  np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_little_noise_beside_the_white_one_is_white():
  assert len(NoiseCovariance.fitted(_draws(scales=(9.0, 0.1)), 1.0).ratios) == 1
  assert len(NoiseCovariance.fitted(np.zeros((5, 20), np.float32), 1.0).ratios) == 0
  with pytest.raises(ValueError, match='variance must be above 0'):
    NoiseCovariance.fitted(_draws(), 0.0)


def test_an_attack_looks_past_noise_that_it_knows():
  images = smooth_images(1)
  observation = play_round(small_model(), [(images, [1])])
  client = observation.clients[0]
  size = sum(array.size for array in client.update.trainable)
  length = np.sqrt(sum(np.square(array).sum() for array in client.update.trainable))
  rng = np.random.default_rng(0)
  directions = np.linalg.qr(rng.standard_normal((size, 4)))[0].astype(np.float32)
  noise, start, noised = directions @ np.full(4, 2 * length, np.float32), 0, []
  for array in client.update.trainable:
    noised.append(array + noise[start : start + array.size].reshape(array.shape))
    start += array.size
  client = dataclasses.replace(client, update=WeightArrays(tuple(noised)))
  observation = dataclasses.replace(observation, clients=(client,))
  config = AttackConfig(matching=SquaredMatching(), iterations=200, xla='off')
  shared = SharedSolvers([observation])
  closeness = {}
  for name, known in (
    ('told', [NoiseCovariance(directions, np.full(4, 1e6, np.float32))]),
    ('not told', []),
  ):
    (found,) = attack_observation(
      observation,
      config,
      labels={'client_00': [1]},
      covariances=known,
      controls=False,
      shared=shared,
    )
    closeness[name] = psnr(found.reconstructions['attack'][0], images[0])
  assert closeness['told'] > 25
  assert closeness['told'] > closeness['not told'] + 8


@pytest.mark.parametrize('case', ['matching', 'weights', 'rounds'])
def test_covariances_go_with_squared_errors_alone(case):
  observation = play_round(small_model(), [(smooth_images(1), [1])])
  size = sum(array.size for array in observation.clients[0].update.trainable)
  covariance = NoiseCovariance(np.zeros((size, 0), np.float32), np.zeros(0, np.float32))
  matching = CosineMatching() if case == 'matching' else SquaredMatching()
  with pytest.raises(ValueError, match='plain squared errors alone'):
    attack_observation(
      observation,
      AttackConfig(matching=matching),
      covariances=[covariance] * (2 if case == 'rounds' else 1),
      weights={'client_00': [[]]} if case == 'weights' else None,
    )
