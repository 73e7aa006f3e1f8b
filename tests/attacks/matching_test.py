import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.matching import (
  MATCHINGS,
  AbsoluteMatching,
  AngularMatching,
  CosineMatching,
  NormMatching,
  SquaredMatching,
)
from attacks.simulator import ClientSimulator
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.errors import UserError

_SETTINGS = [{}, {'balance': 0.5}, {'depth': (0.4, 1.0)}, {'depth_slope': -0.7}]
_ALL = [
  pytest.param(cls(**kwargs), id=f'{name}-{"".join(kwargs) or "plain"}')
  for name, cls in MATCHINGS.items()
  for kwargs in _SETTINGS
]


def _random(seed, shapes=((3, 4), (4,), (4, 2), (2,), (2, 2))):
  rng = np.random.default_rng(seed)
  # Sizes of very different scale, as in a network.
  return [tf.constant(rng.standard_normal(shape) * 10.0**k) for k, shape in enumerate(shapes)]


def _numpy(tensors):
  return np.concatenate([np.ravel(t) for t in tensors])


@pytest.fixture(scope='module')
def problem():
  images = smooth_images(2)
  observation = play_round(small_model(num_classes=3, activation='tanh'), [(images, [0, 2])])
  simulator = ClientSimulator(observation, 'float64')
  labels = tf.constant([0, 2])
  observed = simulator.gradient(tf.constant(images, tf.float64), labels)
  return simulator, images.astype('float64'), labels, observed


@pytest.mark.parametrize('matching', _ALL)
class TestEveryMatching:
  def test_moves_with_the_image_through_a_model(self, matching, problem):
    simulator, truth, labels, observed = problem
    rng = np.random.default_rng(1)
    start = np.clip(truth + 0.1 * rng.standard_normal(truth.shape), 0, 1)

    def loss_at(images):
      return matching(simulator.gradient(images, labels), observed)

    images = tf.constant(start)
    with tf.GradientTape() as tape:
      tape.watch(images)
      loss = loss_at(images)
    gradient = tape.gradient(loss, images).numpy()
    assert float(loss_at(tf.constant(truth))) == pytest.approx(0, abs=1e-8)
    assert float(loss) > 1e-4
    assert np.abs(gradient).max() > 1e-4
    # Down the gradient is down.
    downhill = start - 1e-4 * gradient / np.linalg.norm(gradient)
    assert float(loss_at(tf.constant(downhill))) < float(loss) - 1e-7
    direction, step = rng.standard_normal(truth.shape), 1e-6
    ahead, behind = (float(loss_at(tf.constant(start + k * step * direction))) for k in (1, -1))
    expected = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4, atol=1e-7)

  def test_at_a_match_it_is_zero_and_its_gradient_finite(self, matching):
    observed = _random(0)
    simulated = [tf.identity(tensor) for tensor in observed]
    with tf.GradientTape() as tape:
      tape.watch(simulated)
      loss = matching(simulated, observed)
    gradient = _numpy(tape.gradient(loss, simulated, unconnected_gradients='zero'))
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert np.isfinite(gradient).all()

  def test_tensors_outside_its_depth_do_not_count(self, matching):
    observed, simulated = _random(0), _random(1)
    half = dataclasses.replace(matching, depth=(0.5, 1.0))
    other = _random(2)
    elsewhere, inside = other[:3] + simulated[3:], simulated[:3] + other[3:]
    assert float(half(elsewhere, observed)) == float(half(simulated, observed))
    assert float(half(inside, observed)) != float(half(simulated, observed))


def test_values_without_weights():
  simulated, observed = _random(0), _random(1)
  a, b = _numpy(simulated), _numpy(observed)
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  expected = {
    CosineMatching(): 1 - cosine,
    AngularMatching(): np.arccos(cosine),
    SquaredMatching(): np.sum((a - b) ** 2) / np.sum(b**2),
    AbsoluteMatching(): np.sum(np.abs(a - b)) / np.sum(np.abs(b)),
  }
  norms = [np.linalg.norm(a - b) for a, b in zip(simulated, observed, strict=True)]
  expected[NormMatching(weight=0.5)] = 0.5 * sum(norms)
  for matching, value in expected.items():
    assert float(matching(simulated, observed)) == pytest.approx(value, rel=1e-6)


def test_balance_is_the_norm_of_the_observed_tensor_to_that_power():
  simulated, observed = _random(0), _random(1)
  scales = [np.linalg.norm(tensor) ** -0.5 for tensor in observed]
  a = _numpy([t * s for t, s in zip(simulated, scales, strict=True)])
  b = _numpy([t * s for t, s in zip(observed, scales, strict=True)])
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert float(CosineMatching(0.5)(simulated, observed)) == pytest.approx(1 - cosine, rel=1e-9)


def test_slope_weights_the_terms_linearly():
  observed, simulated = _random(0), _random(1)
  weights = np.linspace(1.6, 0.4, 5)

  def ratio(measure):
    difference = [measure(a - b) for a, b in zip(simulated, observed, strict=True)]
    return weights @ difference / (weights @ [measure(b) for b in observed])

  squared = SquaredMatching(depth_slope=-0.6)(simulated, observed)
  absolute = AbsoluteMatching(depth_slope=-0.6)(simulated, observed)
  assert float(squared) == pytest.approx(ratio(lambda t: np.sum(np.square(t))), rel=1e-9)
  assert float(absolute) == pytest.approx(ratio(lambda t: np.sum(np.abs(t))), rel=1e-9)


@pytest.mark.parametrize('angle', [1e-4, 0.3, 2.0, np.pi])
def test_angle_and_its_slope(angle):
  observed = [tf.constant([1.0, 0.0]), tf.constant([0.0])]
  turned = tf.Variable(angle, dtype=tf.float32)
  with tf.GradientTape() as tape:
    simulated = [3 * tf.stack([tf.cos(turned), tf.sin(turned)]), tf.constant([0.0])]
    loss = AngularMatching()(simulated, observed)
  assert float(loss) == pytest.approx(angle, rel=2e-2 if angle < 1e-3 else 1e-5)
  if angle < 3:
    # The cosine's slope would be sin(angle): next to nothing close to the match.
    assert float(tape.gradient(loss, turned)) == pytest.approx(1, rel=2e-2)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'depth': (0.5, 0.5)}, r'depth \(0\.5, 0\.5\): use two shares'),
    ({'depth': (0.0, 1.5)}, r'use two shares'),
    ({'depth': (0.0, 0.5, 1.0)}, r'use two shares'),
    ({'depth_slope': 1.5}, r'slope 1\.5: must be in \[-1, 1\]'),
  ],
)
@pytest.mark.parametrize('name', sorted(MATCHINGS))
def test_settings_are_checked(name, kwargs, message):
  with pytest.raises(UserError, match=message):
    MATCHINGS[name](**kwargs)


def test_a_depth_without_tensors_is_refused():
  tensors = _random(0)
  with pytest.raises(UserError, match='none of the 5 weight tensors'):
    SquaredMatching(depth=(0.05, 0.15))(tensors, tensors)


def test_a_shorter_update_is_refused():
  with pytest.raises(ValueError, match='4 simulated tensors for 5'):
    SquaredMatching()(_random(0)[:4], _random(0))
