import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.priors import (
  VARIATION_COLORS,
  VARIATION_KINDS,
  BatchNormStatistics,
  Box,
  GaussianImages,
  GroupConsistency,
  ImageNorm,
  TotalVariation,
  reweighted,
)
from tff_shadow.privacy import fit_gaussian_prior


def _images(*shape, seed=0, dtype=np.float64):
  return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def _variations(weight=1.0, **kwargs):
  return [
    TotalVariation(weight, kind=kind, color=color, **kwargs)
    for kind in VARIATION_KINDS
    for color in VARIATION_COLORS
  ]


def _label(prior):
  return '-'.join([prior.name, getattr(prior, 'kind', ''), getattr(prior, 'color', '')])


PRIORS = [
  *_variations(),
  ImageNorm(0.7, center=0.5),
  ImageNorm(0.7, center=0.5, kind='norm'),
  GroupConsistency(2.0, start=0.0),
]


@pytest.mark.parametrize('prior', PRIORS, ids=_label)
@pytest.mark.parametrize('channels', [1, 2, 3])
def test_gradient_equals_differences(prior, channels):
  images = _images(3, 2, 5, 4, channels)
  groups = tf.constant([7, 3, 7])

  def penalty(values):
    return prior(values, tf.constant(3), 10, groups)

  lane_weights = np.array([1.0, 2.0, 3.0])
  x = tf.constant(images)
  with tf.GradientTape() as tape:
    tape.watch(x)
    value = tf.reduce_sum(lane_weights * penalty(x))
  gradient = tape.gradient(value, x).numpy()
  assert np.abs(gradient).max() > 1e-4
  rng = np.random.default_rng(1)
  for _ in range(3):
    step = 1e-6 * rng.standard_normal(images.shape)
    change = lane_weights @ (penalty(tf.constant(images + step)) - penalty(images - step)).numpy()
    np.testing.assert_allclose(2 * np.sum(gradient * step), change, rtol=1e-5)


@pytest.mark.parametrize(
  'prior',
  [*_variations(0.3, decay=0.1), ImageNorm(0.3, decay=0.1)],
  ids=_label,
)
def test_lanes_do_not_depend_on_each_other(prior):
  images = _images(3, 2, 6, 5, 3, dtype=np.float32)
  together = prior(tf.constant(images), tf.constant(4), 8)
  assert together.shape == (3,)
  alone = [float(prior(tf.constant(images[k : k + 1]), tf.constant(4), 8)[0]) for k in range(3)]
  np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize('prior', [*_variations(), GroupConsistency(1.0, start=0.0)], ids=_label)
def test_constant_images_cost_nothing_and_keep_a_finite_gradient(prior):
  images = tf.ones((2, 1, 4, 4, 3)) * 0.25
  with tf.GradientTape() as tape:
    tape.watch(images)
    penalty = prior(images, tf.constant(0), 1)
  np.testing.assert_allclose(penalty, 0, atol=1e-3)
  np.testing.assert_array_equal(tape.gradient(penalty, images), 0)


def test_isotropic_variation_is_the_mean_length_of_the_gradient():
  image = _images(5, 4, 2)
  down, right = image[1:, :-1] - image[:-1, :-1], image[:-1, 1:] - image[:-1, :-1]
  expected = np.hypot(down, right).mean()
  value = TotalVariation(0.15)(tf.constant(image[None, None]), tf.constant(0), 10)
  np.testing.assert_allclose(value, [0.15 * expected], rtol=1e-5)


def test_other_kinds_of_variation_by_hand():
  image = np.array([[0, 0.3], [0.4, 0.9]]).reshape(1, 1, 2, 2, 1)

  def value(kind):
    return float(TotalVariation(1.0, kind=kind)(tf.constant(image), tf.constant(0), 1)[0])

  assert value('isotropic') == pytest.approx(0.5, abs=1e-6)
  assert value('anisotropic') == pytest.approx(0.7)
  assert value('squared') == pytest.approx(0.25)
  # Down: 0.4, 0.6; right: 0.3, 0.5; diagonals: 0.9 and 0.1.
  assert value('norm') == pytest.approx(np.sqrt(0.52) + np.sqrt(0.34) + 0.9 + 0.1, abs=1e-6)


@pytest.mark.parametrize('kind', ['isotropic', 'anisotropic'])
def test_joint_color_prefers_edges_at_one_place(kind):
  def cost(columns, color):
    image = np.zeros((1, 1, 6, 6, 3))
    for channel, column in enumerate(columns):
      image[..., column:, channel] = 1
    prior = TotalVariation(1.0, kind=kind, color=color)
    return float(prior(tf.constant(image), tf.constant(0), 1)[0])

  # Apart from the smoothing of the square root.
  assert cost((3, 3, 3), 'joint') == pytest.approx(cost((3, 3, 3), 'separate'), abs=1e-3)
  assert cost((2, 3, 4), 'joint') > 1.5 * cost((3, 3, 3), 'joint')
  assert cost((2, 3, 4), 'separate') == pytest.approx(cost((3, 3, 3), 'separate'))


@pytest.mark.parametrize('field', ['kind', 'color'])
def test_unknown_variation_is_refused(field):
  with pytest.raises(ValueError, match=f'{field} must be one of'):
    TotalVariation(1.0, **{field: 'purple'})


@pytest.mark.parametrize('make', [TotalVariation, ImageNorm])
def test_weight_decays_geometrically(make):
  images = tf.constant(_images(1, 1, 4, 4, 1))
  prior = make(0.5, decay=0.01)
  first, middle, last = (float(prior(images, tf.constant(k), 10)[0]) for k in (0, 5, 10))
  assert middle == pytest.approx(0.1 * first)
  assert last == pytest.approx(0.01 * first)


def test_image_norm_is_the_mean_square_around_its_center():
  images = tf.reshape(tf.constant([0.0, 1.0, 0.5, 0.5], tf.float64), (2, 1, 1, 2, 1))
  np.testing.assert_allclose(ImageNorm(2.0)(images, tf.constant(0), 1), [1.0, 0.5])
  np.testing.assert_allclose(ImageNorm(2.0, center=0.5)(images, tf.constant(0), 1), [0.5, 0.0])


def test_image_norm_of_the_kind_norm_is_the_mean_length_of_the_batch():
  images = tf.reshape(tf.constant([0.3, 0.4, 0.0, 1.0], tf.float64), (1, 2, 1, 2, 1))
  prior = ImageNorm(2.0, kind='norm')
  np.testing.assert_allclose(prior(images, tf.constant(0), 1), [0.5 + 1.0], atol=1e-6)


@pytest.mark.parametrize('make', [ImageNorm, BatchNormStatistics])
def test_unknown_kind_of_distance_is_refused(make):
  with pytest.raises(ValueError, match='kind must be one of'):
    make(1.0, kind='cubed')


class TestGroupConsistency:
  def test_lanes_are_drawn_to_the_mean_of_their_group(self):
    images = np.reshape([0.0, 1.0, 0.2, 9.0], (4, 1, 1, 1, 1))
    prior = GroupConsistency(1.0, start=0.0)
    penalty = prior(tf.constant(images), tf.constant(0), 1, tf.constant([5, 1, 5, 2]))
    np.testing.assert_allclose(penalty, [0.01, 0, 0.01, 0], atol=1e-12)
    np.testing.assert_allclose(
      prior(tf.constant(images), tf.constant(0), 1), (images.ravel() - 2.55) ** 2
    )

  def test_sets_in_late(self):
    prior = GroupConsistency(1.0, start=0.6)
    images = tf.constant(_images(2, 1, 3, 3, 1))
    at = [float(tf.reduce_sum(prior(images, tf.constant(k), 10))) for k in range(10)]
    assert at[:6] == [0.0] * 6
    assert min(at[6:]) > 0

  def test_gradient_reaches_only_the_own_group(self):
    images = tf.constant(_images(3, 2, 3, 3, 1))
    with tf.GradientTape() as tape:
      tape.watch(images)
      first = GroupConsistency(1.0, 0.0)(images, tf.constant(0), 1, tf.constant([0, 0, 1]))[0]
    sizes = np.abs(tape.gradient(first, images)).max(axis=(1, 2, 3, 4))
    assert sizes[0] > 0
    assert sizes[1] > 0
    assert sizes[2] == 0

  @pytest.mark.parametrize('groups', [None, [0, 0, 0, 1, 1]])
  def test_a_lane_that_diverged_reaches_no_other(self, groups):
    prior = GroupConsistency(1.0, 0.0)
    images = _images(5, 2, 3, 3, 1)
    images[0, 1, 2, 2] = np.nan

    def penalty_and_gradient(values, own):
      x = tf.constant(values)
      with tf.GradientTape() as tape:
        tape.watch(x)
        penalty = prior(x, tf.constant(1), 10, None if own is None else tf.constant(own))
      return penalty.numpy(), tape.gradient(penalty, x).numpy()

    found, gradient = penalty_and_gradient(images, groups)
    expected, without = penalty_and_gradient(images[1:], groups and groups[1:])
    np.testing.assert_allclose(found[1:], expected)
    np.testing.assert_allclose(gradient[1:], without)
    assert found[0] == 0


class TestBatchNormStatistics:
  def test_is_the_summed_squared_distance(self):
    statistics = [(tf.constant([1.0, 2.0]), tf.constant([1.0, 1.0])), (tf.ones(3), tf.ones(3))]
    targets = [(np.array([1.0, 0.0]), np.array([0.5, 1.0])), (np.ones(3), np.zeros(3))]
    prior = BatchNormStatistics(0.1)
    assert float(prior(statistics, targets)) == pytest.approx(0.1 * (4 + 0.25 + 3))
    assert float(prior(statistics, statistics)) == 0
    by_norm = BatchNormStatistics(0.1, kind='norm')(statistics, targets)
    assert float(by_norm) == pytest.approx(0.1 * (2 + 0.5 + np.sqrt(3)), rel=1e-3)

  def test_gradient(self):
    mean, variance = (tf.constant(_images(4, seed=k)) for k in range(2))
    target = (_images(4, seed=2), _images(4, seed=3))
    with tf.GradientTape() as tape:
      tape.watch([mean, variance])
      penalty = BatchNormStatistics(0.5)([(mean, variance)], [target])
    gradients = tape.gradient(penalty, [mean, variance])
    np.testing.assert_allclose(gradients[0], mean - target[0])
    np.testing.assert_allclose(gradients[1], variance - target[1])

  def test_relative_distances_do_not_depend_on_the_scale_of_a_layer(self):
    def layer(seed, scale):
      mean, variance = (_images(4, seed=seed + k) for k in range(2))
      return tf.constant(scale * mean), tf.constant(scale**2 * variance)

    prior = BatchNormStatistics(0.5, kind='relative')
    (mean, variance), (target_mean, target_variance) = layer(0, 1.0), layer(2, 1.0)
    unit = target_variance + 0.01 * np.mean(target_variance)
    expected = np.mean(
      (mean - target_mean) ** 2 / unit + (variance - target_variance) ** 2 / unit**2
    )
    one = float(prior([layer(0, 1.0)], [layer(2, 1.0)]))
    assert one == pytest.approx(0.5 * expected, rel=1e-3)
    both = float(prior([layer(0, 1.0), layer(0, 30.0)], [layer(2, 1.0), layer(2, 30.0)]))
    assert both == pytest.approx(one, rel=1e-3)
    dead = [(tf.zeros(3), tf.zeros(3))]
    assert np.isfinite(prior([(tf.ones(3), tf.ones(3))], dead))

  @pytest.mark.parametrize('kind', ['squared', 'norm', 'relative'])
  def test_gradient_equals_differences(self, kind):
    target = [
      (_images(4, seed=2), _images(4, seed=3)),
      (_images(3, seed=4), 5 * _images(3, seed=5)),
    ]
    prior = BatchNormStatistics(0.5, kind=kind)

    def penalty(values):
      layers = [tf.split(part, 2) for part in tf.split(values, [8, 6])]
      return prior(layers, target)

    point, direction = _images(14, seed=2), _images(14, seed=3) - 0.5
    values = tf.constant(point)
    with tf.GradientTape() as tape:
      tape.watch(values)
      value = penalty(values)
    slope = np.sum(tape.gradient(value, values) * direction)
    ahead, behind = (float(penalty(tf.constant(point + s * direction))) for s in (1e-5, -1e-5))
    assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)

  def test_lists_must_fit(self):
    with pytest.raises(ValueError, match='0 layers simulated, 0 given'):
      BatchNormStatistics(1.0)([], [])
    with pytest.raises(ValueError, match='1 layers simulated, 0 given'):
      BatchNormStatistics(1.0)([(tf.ones(1), tf.ones(1))], [])


class TestGaussianImages:
  @pytest.fixture
  def prior(self):
    return GaussianImages(fit_gaussian_prior(_images(6, 3, 4, 2)), weight=0.3, source='noise')

  def test_is_the_squared_mahalanobis_distance(self, prior):
    gaussian = fit_gaussian_prior(_images(6, 3, 4, 2))
    images = _images(2, 3, 3, 4, 2, seed=1)
    centered = images.reshape(2, 3, -1) - gaussian.mean
    expected = 0.3 * np.einsum('rbi,ij,rbj->r', centered, gaussian.information(), centered)
    np.testing.assert_allclose(prior(images, tf.constant(0), 10), expected, rtol=1e-9)

  def test_gradient_equals_differences(self, prior):
    images, direction = _images(2, 3, 3, 4, 2, seed=1), _images(2, 3, 3, 4, 2, seed=2) - 0.5

    def penalty(values):
      return tf.reduce_sum(prior(values, tf.constant(0), 10))

    x = tf.constant(images)
    with tf.GradientTape() as tape:
      tape.watch(x)
      value = penalty(x)
    slope = np.sum(tape.gradient(value, x) * direction)
    ahead, behind = (float(penalty(tf.constant(images + s * direction))) for s in (1e-5, -1e-5))
    assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)

  def test_settings_are_plain_and_tell_priors_apart(self, prior):
    assert dataclasses.asdict(prior) == {
      'weight': 0.3,
      'source': 'noise',
      'name': 'gaussian_images',
    }
    heavier = reweighted(prior, 0.6)
    images = _images(1, 1, 3, 4, 2, seed=1)
    np.testing.assert_allclose(
      heavier(images, tf.constant(0), 10), 2 * prior(images, tf.constant(0), 10)
    )
    assert heavier != prior
    assert reweighted(heavier, 0.3) == prior
    assert reweighted(TotalVariation(0.1, kind='norm'), 0.2) == TotalVariation(0.2, kind='norm')


def test_box_projects():
  np.testing.assert_array_equal(
    Box().project(tf.constant([-1.0, 0.3, 2.0])), [0, np.float32(0.3), 1]
  )
