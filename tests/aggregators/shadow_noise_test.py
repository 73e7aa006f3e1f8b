import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators import (
  NOISE_SHAPES,
  NoiseStrength,
  observation_tap_factory,
  shadow_noise_factory,
  shaped_update_type,
)
from tff_shadow.aggregators.shadow_noise import floor_of, noised_update

_RATIO = NoiseStrength('ratio', 0.5)
_UPDATE_TYPE = tff.types.to_type(
  collections.OrderedDict(a=(np.float32, (2, 3)), b=[np.float32, (np.float32, (4,))])
)
_FLOAT = tff.types.TensorType(np.float32)
_SCALAR = tff.types.FederatedType(np.float32, tff.SERVER)
# An energy of 60 weights has a standard error of about 1 % then, a single variance of 2.2 %.
_NUM_DRAWS, _MANY_DRAWS = 1000, 4000


def _update(rng, scale=1.0):
  return collections.OrderedDict(
    a=(scale * rng.normal(size=(2, 3))).astype(np.float32),
    b=[np.float32(scale * rng.normal()), (scale * rng.normal(size=4)).astype(np.float32)],
  )


def _value(update, shape, key=(1, 2), **changes):
  """A shaped update whose energies belong to 50 fully sensitive pixels."""
  fields = collections.OrderedDict(
    update=update,
    noise_key=tf.convert_to_tensor(key, tf.int32),
    image_energy=0.25,
    region_energy=50.0,
    region_fourth_moment=50.0,
    sensitivity_energy=7.0,
    decoy_energy=3.0,
    shape=shape,
  )
  fields.update(changes)
  for name, field in fields.items():
    if name.endswith(('_energy', '_moment')):
      fields[name] = tf.convert_to_tensor(field, tf.float32)
  return fields


def _vector(size, seed):
  return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def _noises(update, shape_name, shape, strength, floor=0.01, num_draws=_NUM_DRAWS, **changes):
  """Noise of `noised_update` for vectors, eagerly, one row per key: [draws, weights]."""

  @tf.function
  def one(key):
    sent, _ = noised_update(
      _value([update], [shape] if shape is not None else (), key, **changes),
      shape_name,
      strength,
      floor,
    )
    return sent[0] - update

  keys = np.random.default_rng(9).integers(-(2**31), 2**31, (num_draws, 2)).astype(np.int32)
  return tf.map_fn(one, keys, fn_output_signature=tf.float32).numpy().astype(np.float64)


def _squared_sensitivities(size=60):
  return np.geomspace(1e-4, 1.0, size).astype(np.float32)


class TestTypes:
  @pytest.mark.parametrize('shape', NOISE_SHAPES)
  def test_weighted(self, shape):
    value_type = shaped_update_type(_UPDATE_TYPE, shape)
    process = shadow_noise_factory(shape, _RATIO).create(value_type, _FLOAT)
    mean = tff.aggregators.MeanFactory().create(_UPDATE_TYPE, _FLOAT)
    mean_output = mean.next.type_signature.result
    assert process.is_weighted
    assert process.initialize.type_signature == mean.initialize.type_signature
    state = mean.initialize.type_signature.result
    assert process.next.type_signature.parameter == tff.types.to_type(
      collections.OrderedDict(
        state=state,
        value=tff.types.FederatedType(value_type, tff.CLIENTS),
        weight=tff.types.FederatedType(np.float32, tff.CLIENTS),
      )
    )
    result = process.next.type_signature.result
    assert result.state == state
    assert result.result == tff.types.FederatedType(_UPDATE_TYPE, tff.SERVER)
    assert result.measurements == tff.types.FederatedType(
      collections.OrderedDict(
        inner=mean_output.measurements.member,
        sent_norm=np.float32,
        fell_back=np.int32,
      ),
      tff.SERVER,
    )

  def test_unweighted(self):
    value_type = shaped_update_type(_UPDATE_TYPE, 'diagonal')
    process = shadow_noise_factory('diagonal', _RATIO, tff.aggregators.SumFactory()).create(
      value_type
    )
    assert not process.is_weighted
    assert process.next.type_signature.parameter == tff.types.to_type(
      collections.OrderedDict(
        state=tff.types.FederatedType((), tff.SERVER),
        value=tff.types.FederatedType(value_type, tff.CLIENTS),
      )
    )
    result = process.next.type_signature.result
    assert result.result == tff.types.FederatedType(_UPDATE_TYPE, tff.SERVER)
    assert result.state == tff.types.FederatedType((), tff.SERVER)
    assert result.measurements.member.inner == tff.types.to_type(())

  def test_shaped_update(self):
    value_type = shaped_update_type(_UPDATE_TYPE, 'correlated')
    assert value_type.shape == value_type.update == _UPDATE_TYPE
    assert value_type.noise_key == tff.types.TensorType(np.int32, (2,))
    assert not tff.structure.flatten(shaped_update_type(_UPDATE_TYPE, 'isotropic').shape)

  @pytest.mark.parametrize(
    'value_type',
    [
      _UPDATE_TYPE,
      _FLOAT,
      collections.OrderedDict(update=_UPDATE_TYPE),
      shaped_update_type(_UPDATE_TYPE, 'isotropic'),
      shaped_update_type(tff.types.TensorType(np.int32, (3,)), 'diagonal'),
      shaped_update_type(tff.types.TensorType(np.float64, (3,)), 'diagonal'),
      shaped_update_type(tff.types.to_type([]), 'diagonal'),
      # The shape of another update.
      collections.OrderedDict(
        (name, _FLOAT if name == 'shape' else member)
        for name, member in tff.structure.iter_elements(
          shaped_update_type(_UPDATE_TYPE, 'diagonal')
        )
      ),
    ],
    ids=['plain', 'scalar', 'incomplete', 'no_shape', 'integer', 'float64', 'empty', 'mismatch'],
  )
  def test_value_must_be_a_shaped_update(self, value_type):
    with pytest.raises(TypeError, match=r'shaped_update_type|float32|value_type must be'):
      shadow_noise_factory('diagonal', _RATIO).create(tff.types.to_type(value_type), _FLOAT)

  def test_secure_sum(self):
    # By type only: TFF 0.87 has no secure sum in its local runtime ("Cannot embed a federated
    # value"), whatever is in front of it.
    process = shadow_noise_factory(
      'diagonal', _RATIO, tff.aggregators.SecureSumFactory(10.0, -10.0)
    ).create(shaped_update_type(_UPDATE_TYPE, 'diagonal'))
    assert process.next.type_signature.result.result.member == _UPDATE_TYPE

  def test_inner_must_be_a_factory(self):
    with pytest.raises(TypeError, match='aggregation factory'):
      shadow_noise_factory('diagonal', _RATIO, 'mean')


class TestArguments:
  @pytest.mark.parametrize('kind', ['ratio', 'image_ratio', 'scale', 'region_psnr'])
  @pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
  def test_strength_must_be_finite(self, kind, value):
    with pytest.raises(ValueError, match='strength must be finite'):
      NoiseStrength(kind, value)

  def test_strength_must_not_be_negative_but_for_decibels(self):
    for kind in ('ratio', 'image_ratio', 'scale'):
      with pytest.raises(ValueError, match=r'-0\.1'):
        NoiseStrength(kind, -0.1)
    assert NoiseStrength('region_psnr', -3.0).value == -3.0

  def test_unknown_kind_and_shape(self):
    with pytest.raises(ValueError, match='loud'):
      NoiseStrength('loud', 1.0)
    with pytest.raises(ValueError, match='round'):
      shadow_noise_factory('round', _RATIO)

  @pytest.mark.parametrize('floor', [0.0, 1.0, -0.1, float('nan')])
  def test_floor_out_of_range(self, floor):
    with pytest.raises(ValueError, match='floor'):
      shadow_noise_factory('diagonal', _RATIO, floor=floor)


class TestRatio:
  @pytest.mark.parametrize('shape', ['isotropic', 'diagonal'])
  def test_energy(self, shape):
    update = _vector(60, 1)
    field = None if shape == 'isotropic' else _squared_sensitivities()
    noises = _noises(update, shape, field, NoiseStrength('ratio', 0.3))
    ratio = (noises**2).sum(axis=1).mean() / (update.astype(float) ** 2).sum()
    assert np.sqrt(ratio) == pytest.approx(0.3, rel=0.02)

  def test_there_is_no_bound_for_decoy_noise(self):
    with pytest.raises(ValueError, match='region_psnr'):
      shadow_noise_factory('decoy', NoiseStrength('region_psnr', 10.0))

  @pytest.mark.parametrize('shape', ['isotropic', 'diagonal'])
  def test_energy_against_that_of_an_image(self, shape):
    field = None if shape == 'isotropic' else _squared_sensitivities()
    strength = NoiseStrength('image_ratio', 0.3)
    noises = _noises(_vector(60, 1), shape, field, strength, image_energy=4.0)
    assert (noises**2).sum(axis=1).mean() == pytest.approx(0.09 * 4.0, rel=0.04)

  def test_images_that_add_nothing_fall_back_to_the_update(self):
    update = _vector(60, 1)
    noises = _noises(update, 'isotropic', None, NoiseStrength('image_ratio', 0.3), image_energy=0.0)
    ratio = (noises**2).sum(axis=1).mean() / (update.astype(float) ** 2).sum()
    assert np.sqrt(ratio) == pytest.approx(0.3, rel=0.02)

  def test_isotropic_is_the_same_for_every_weight(self):
    update = _vector(60, 1)
    noises = _noises(update, 'isotropic', None, NoiseStrength('ratio', 0.3), num_draws=_MANY_DRAWS)
    expected = 0.09 * (update**2).sum() / 60
    np.testing.assert_allclose(noises.var(axis=0), expected, rtol=0.09)
    assert noises.var() == pytest.approx(expected, rel=0.02)
    np.testing.assert_allclose(noises.mean(axis=0), 0.0, atol=4.5 * np.sqrt(expected / _MANY_DRAWS))
    correlations = np.corrcoef(noises.T) - np.eye(60)
    assert np.abs(correlations).max() < 5 / np.sqrt(_MANY_DRAWS)

  def test_diagonal_variances_are_in_proportion_to_the_sensitivity(self):
    update, squared = _vector(60, 1), _squared_sensitivities()
    strength = NoiseStrength('ratio', 0.3)
    noises = _noises(update, 'diagonal', squared, strength, 0.05, _MANY_DRAWS)
    energy = 0.09 * (update**2).sum()
    sensitivity = np.sqrt(squared)
    expected = 0.95 * energy * sensitivity / sensitivity.sum() + 0.05 * energy / 60
    np.testing.assert_allclose(noises.var(axis=0), expected, rtol=0.09)
    slope = np.polyfit(np.log(squared), np.log(noises.var(axis=0) - 0.05 * energy / 60), 1)[0]
    assert slope == pytest.approx(0.5, abs=0.02)

  def test_correlated_lies_along_the_direction_but_for_the_floor(self):
    update, direction = _vector(60, 1), _vector(60, 2)
    noises = _noises(update, 'correlated', direction, NoiseStrength('ratio', 0.3), floor=0.04)
    unit = direction / np.linalg.norm(direction)
    along = noises @ unit
    rest = noises - np.outer(along, unit)
    energy = 0.09 * (update**2).sum()
    # The key decides the floor alone; the direction was drawn by the client's work.
    assert along.mean() == pytest.approx(np.sqrt(0.96 * energy), rel=0.01)
    assert (rest**2).sum(axis=1).mean() == pytest.approx(0.04 * energy * 59 / 60, rel=0.03)
    np.testing.assert_allclose(
      rest.mean(axis=0), 0, atol=5 * np.sqrt(0.04 * energy / 60 / _NUM_DRAWS)
    )

  @pytest.mark.parametrize('shape', NOISE_SHAPES)
  @pytest.mark.parametrize('kind', ['ratio', 'image_ratio', 'scale'])
  def test_zero_is_no_noise_and_no_floor(self, shape, kind):
    for field in (_squared_sensitivities(), np.zeros(60, np.float32)):
      noises = _noises(
        _vector(60, 1),
        shape,
        None if shape == 'isotropic' else field,
        NoiseStrength(kind, 0.0),
        floor=0.5,
        num_draws=3,
      )
      np.testing.assert_array_equal(noises, 0.0)


class TestScale:
  def test_isotropic_is_the_standard_deviation(self):
    noises = _noises(_vector(60, 1), 'isotropic', None, NoiseStrength('scale', 0.02))
    assert noises.std() == pytest.approx(0.02, rel=0.01)

  def test_diagonal_is_the_root_mean_square_and_the_floor_comes_on_top(self):
    squared = _squared_sensitivities()
    noises = _noises(_vector(60, 1), 'diagonal', squared, NoiseStrength('scale', 0.02), floor=0.2)
    assert (noises**2).mean() == pytest.approx(0.02**2 / 0.8, rel=0.03)

  @pytest.mark.parametrize('shape', ['correlated', 'decoy'])
  def test_correlated_and_decoy_scale_the_unit_noise(self, shape):
    update, direction = _vector(60, 1), 0.1 * _vector(60, 2)
    strength = NoiseStrength('scale', 0.7)
    # Of decoy noise the floor follows the energy of all draws, here twice that of this one.
    own = direction @ direction
    expected = 2 * own if shape == 'decoy' else own
    noises = _noises(update, shape, direction, strength, floor=0.1, decoy_energy=2 * own)
    along = noises @ direction / own
    assert along.mean() == pytest.approx(0.7, rel=0.01)
    energy = 0.49 * float(own + expected / 9)
    assert (noises**2).sum(axis=1).mean() == pytest.approx(energy, rel=0.01)


def _linear_map(seed, num_weights=40, num_pixels=12, binary=False):
  """An update g(x) = J x of few pixels, with a region map: J, m, S_j^2."""
  rng = np.random.default_rng(seed)
  jacobian = rng.normal(size=(num_weights, num_pixels)) * rng.lognormal(0, 1, (num_weights, 1))
  region = rng.random(num_pixels)
  if binary:
    region = np.ones(num_pixels)
  return jacobian, region, np.square(jacobian * region).sum(axis=1)


def _squared_scale(strength, shape, jacobian, region, shape_energy):
  return float(
    strength.squared_scale(
      shape,
      update_energy=tf.constant(1.0),
      image_energy=tf.constant(1.0),
      shape_energy=tf.constant(shape_energy, tf.float32),
      sensitivity_energy=tf.constant(np.square(jacobian * region).sum(), tf.float32),
      region_energy=tf.constant((region**2).sum(), tf.float32),
      region_fourth_moment=tf.constant((region**4).sum(), tf.float32),
      num_weights=len(jacobian),
    )
  )


def _bound(jacobian, region, covariance):
  """Cramer-Rao: least mean squared error over the region of any unbiased attacker."""
  information = jacobian.T @ np.linalg.solve(covariance, jacobian)
  error = np.trace(np.diag(region) @ np.linalg.inv(information) @ np.diag(region))
  return error / (region**2).sum()


class TestRegionPsnr:
  @pytest.mark.parametrize('psnr', [-2.0, 0.0, 12.0, 25.0])
  @pytest.mark.parametrize('shape', ['isotropic', 'diagonal'])
  def test_no_unbiased_attacker_is_better(self, shape, psnr):
    for seed in range(5):
      jacobian, region, squared = _linear_map(seed)
      unit = np.ones(len(jacobian)) if shape == 'isotropic' else np.sqrt(squared)
      scale = _squared_scale(
        NoiseStrength('region_psnr', psnr), shape, jacobian, region, unit.sum()
      )
      error = 10 ** (-psnr / 10)
      bound = _bound(jacobian, region, scale * np.diag(unit))
      assert bound >= error
      # What is used is looser than the bound, by how unequal the pixels' information is.
      information = np.square(region * jacobian).sum(axis=1) / (scale * unit)
      assert (region**2).sum() / information.sum() == pytest.approx(error, rel=1e-5)

  def test_equality_where_all_pixels_are_alike(self):
    # Orthogonal columns of one length: Cauchy-Schwarz loses nothing.
    jacobian = 3.0 * np.linalg.qr(np.random.default_rng(0).normal(size=(40, 12)))[0]
    region = np.ones(12)
    scale = _squared_scale(
      NoiseStrength('region_psnr', 10.0), 'isotropic', jacobian, region, len(jacobian)
    )
    assert _bound(jacobian, region, scale * np.eye(40)) == pytest.approx(0.1, rel=1e-5)

  def test_correlated_meets_it_for_a_map_of_ones(self):
    jacobian, region, _ = _linear_map(1, binary=True)
    scale = _squared_scale(NoiseStrength('region_psnr', 8.0), 'correlated', jacobian, region, 1.0)
    assert scale == pytest.approx(10**-0.8)
    # Sigma has the rank of J; the attacker's best is the pseudo-inverse.
    inverse = np.linalg.pinv(jacobian)
    covariance = inverse @ (scale * jacobian @ np.diag(region**2) @ jacobian.T) @ inverse.T
    assert np.trace(covariance) / region.sum() == pytest.approx(10**-0.8, rel=1e-5)
    # A floor only adds noise.
    assert _bound(jacobian, region, scale * jacobian @ jacobian.T + 1e-3 * np.eye(40)) >= 10**-0.8

  def test_correlated_with_a_soft_map(self):
    jacobian, region, _ = _linear_map(2)
    scale = _squared_scale(NoiseStrength('region_psnr', 8.0), 'correlated', jacobian, region, 1.0)
    inverse = np.linalg.pinv(jacobian)
    masked = region[:, None] * inverse
    covariance = masked @ (scale * jacobian @ np.diag(region**2) @ jacobian.T) @ masked.T
    assert np.trace(covariance) / (region**2).sum() == pytest.approx(10**-0.8, rel=1e-5)

  @pytest.mark.parametrize('shape', ['isotropic', 'diagonal', 'correlated'])
  def test_noise_has_the_variance_of_the_formula(self, shape):
    update, squared, floor = _vector(60, 1), _squared_sensitivities(), 0.1
    sensitivity_energy = np.float32(squared.sum())
    noises = _noises(
      update,
      shape,
      {'isotropic': None, 'diagonal': squared, 'correlated': np.sqrt(squared)}[shape],
      NoiseStrength('region_psnr', 20.0),
      floor=floor,
      sensitivity_energy=sensitivity_energy,
      region_energy=np.float32(50.0),
      region_fourth_moment=np.float32(25.0),
    )
    energy = {
      'isotropic': 60 * 0.01 * sensitivity_energy / 50.0,
      'diagonal': 0.01 * np.sqrt(squared).sum() ** 2 / 50.0 / (1 - floor),
      'correlated': 0.01 * 50.0 / 25.0 * sensitivity_energy / (1 - floor),
    }[shape]
    assert (noises**2).sum(axis=1).mean() == pytest.approx(energy, rel=0.035)

  def test_zero_decibels_of_an_empty_region_fall_back(self):
    update = _vector(60, 1)
    sent, statistics = noised_update(
      _value([update], (), region_energy=np.float32(0.0)),
      'isotropic',
      NoiseStrength('region_psnr', 0.0),
      0.01,
    )
    assert int(statistics['fell_back']) == 1
    assert np.linalg.norm(_flat(sent) - update) > 0.5 * np.linalg.norm(update)


class TestFallBack:
  @pytest.mark.parametrize('shape', ['diagonal', 'correlated', 'decoy'])
  @pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
  @pytest.mark.parametrize(
    ('strength', 'ratio'), [(_RATIO, 0.5), (NoiseStrength('scale', 0.1), 1.0)]
  )
  def test_unusable_shape_gets_isotropic_noise(self, shape, bad, strength, ratio):
    update = _vector(60, 1)
    field = np.zeros(60, np.float32)
    field[3] = bad
    noises = _noises(update, shape, field, strength, num_draws=1000)
    assert np.isfinite(noises).all()
    expected = ratio**2 * (update**2).sum() / 60
    assert noises.var() == pytest.approx(expected, rel=0.04)
    np.testing.assert_allclose(noises.var(axis=0), expected, rtol=0.25)
    _, statistics = noised_update(_value([update], [field]), shape, strength, 0.01)
    assert int(statistics['fell_back']) == 1

  def test_negative_sensitivity_is_unusable(self):
    update, squared = _vector(60, 1), _squared_sensitivities()
    squared[0] = -1.0
    sent, statistics = noised_update(_value([update], [squared]), 'diagonal', _RATIO, 0.01)
    assert int(statistics['fell_back']) == 1
    assert np.isfinite(sent[0]).all()

  @pytest.mark.parametrize('shape', NOISE_SHAPES)
  @pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
  def test_dropped_client_sends_zeros_and_is_not_counted(self, shape, bad):
    update = np.zeros(60, np.float32)
    update[7] = bad
    for field in (_squared_sensitivities(), np.full(60, np.nan, np.float32)):
      sent, statistics = noised_update(
        _value([update], () if shape == 'isotropic' else [field]), shape, _RATIO, 0.01
      )
      np.testing.assert_array_equal(sent[0], 0.0)
      assert [float(value) for value in statistics.values()] == [0.0, 0.0]


class TestKeys:
  @pytest.mark.parametrize('shape', NOISE_SHAPES)
  def test_same_key_same_noise_other_key_other_noise(self, shape):
    update = _vector(1000, 1)
    field = () if shape == 'isotropic' else [np.square(_vector(1000, 2))]

    def noise(key):
      sent, _ = noised_update(_value([update], field, key), shape, NoiseStrength('ratio', 1.0), 0.5)
      noise = np.asarray(sent[0]) - update
      if shape in ('correlated', 'decoy'):
        noise -= field[0] * (noise @ field[0]) / (field[0] @ field[0])
      return noise

    np.testing.assert_array_equal(noise((5, 6)), noise((5, 6)))
    for other in ((5, 7), (6, 6), (6, 5)):
      assert abs(np.corrcoef(noise((5, 6)), noise(other))[0, 1]) < 0.16

  def test_tensors_and_the_floor_have_draws_of_their_own(self):
    # Equal shapes: equal draws would be seen in the structure of the update.
    update = [_vector(500, 1), _vector(500, 2)]
    sent, _ = noised_update(_value(update, ()), 'isotropic', _RATIO, 0.01)
    first, second = (np.asarray(s) - u for s, u in zip(sent, update, strict=True))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.22
    # Half shaped noise, half floor, uncorrelated: no weight has their sum in step.
    noises = _noises(
      _vector(40, 1), 'diagonal', np.ones(40, np.float32), NoiseStrength('ratio', 1.0), floor=0.5
    )
    assert noises.var() == pytest.approx((_vector(40, 1) ** 2).mean(), rel=0.03)


def _clients(num_clients, shape, seed=3, **changes):
  rng = np.random.default_rng(seed)
  updates = [_update(rng) for _ in range(num_clients)]
  fields = [() if shape == 'isotropic' else tf.nest.map_structure(np.square, _update(rng))] * (
    num_clients
  )
  return updates, [
    _value(update, field, (seed, k), **changes)
    for k, (update, field) in enumerate(zip(updates, fields, strict=True))
  ]


def _flat(update):
  return np.concatenate([np.ravel(tensor) for tensor in tf.nest.flatten(update)])


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  @pytest.mark.parametrize('shape', NOISE_SHAPES)
  def test_inner_factory_sees_the_noised_updates_alone(self, shape):
    inner = observation_tap_factory(tff.aggregators.MeanFactory())
    process = shadow_noise_factory(shape, _RATIO, inner).create(
      shaped_update_type(_UPDATE_TYPE, shape), _FLOAT
    )
    updates, values = _clients(3, shape)
    weights = [1.0, 2.0, 3.0]
    output = process.next(process.initialize(), values, weights)
    observation = output.measurements['inner']['observation']
    logged = observation['updates']
    assert list(logged) == ['a', 'b']
    floor = floor_of(shape)
    expected = [noised_update(value, shape, _RATIO, floor) for value in values]
    for k, (sent, _) in enumerate(expected):
      row = _flat(tf.nest.map_structure(lambda tensor, k=k: tensor[k], logged))
      np.testing.assert_allclose(row, _flat(sent), atol=1e-6)
      assert np.abs(row - _flat(updates[k])).max() > 0.01
    np.testing.assert_array_equal(observation['weights'], weights)
    mean = np.average([_flat(sent) for sent, _ in expected], axis=0, weights=weights)
    np.testing.assert_allclose(_flat(output.result), mean, atol=1e-6)
    wanted = np.mean([float(statistics['sent_norm']) for _, statistics in expected])
    assert output.measurements['sent_norm'] == pytest.approx(wanted, rel=1e-5)
    assert output.measurements['fell_back'] == 0

  def test_statistics_say_what_was_sent(self):
    update, direction = [np.array([3.0, 0.0], np.float32)], [np.array([0.0, 1.0], np.float32)]
    _, statistics = noised_update(
      _value(update, direction), 'correlated', NoiseStrength('scale', 4.0), 1e-9
    )
    assert float(statistics['sent_norm']) == pytest.approx(5.0, rel=1e-3)

  def test_clients_are_uncorrelated_and_fall_backs_are_counted(self):
    update_type = tff.types.to_type([(np.float32, (2000,))])
    update = [_vector(2000, 1)]
    values = [_value(update, [np.ones(2000, np.float32)], (7, k)) for k in range(4)]
    values[2]['shape'] = [np.zeros(2000, np.float32)]
    values[3]['update'] = [np.zeros(2000, np.float32)]
    inner = observation_tap_factory(tff.aggregators.SumFactory())
    process = shadow_noise_factory('diagonal', _RATIO, inner).create(
      shaped_update_type(update_type, 'diagonal')
    )
    output = process.next(process.initialize(), values)
    sent = output.measurements['inner']['observation']['updates'][0]
    noises = sent[:3] - update[0]
    assert np.abs(np.corrcoef(noises) - np.eye(3)).max() < 0.1
    np.testing.assert_array_equal(sent[3], 0.0)
    assert output.measurements['fell_back'] == 1

  def test_mean_over_clients_converges_to_the_clean_mean(self):
    update_type = tff.types.to_type([(np.float32, (50,))])
    update = [_vector(50, 1)]
    process = shadow_noise_factory('diagonal', NoiseStrength('ratio', 1.0)).create(
      shaped_update_type(update_type, 'diagonal'), _FLOAT
    )
    squared = [np.square(_vector(50, 2))]
    errors = []
    for num_clients in (4, 144):
      values = [_value(update, squared, (11, k)) for k in range(num_clients)]
      output = process.next(process.initialize(), values, [1.0] * num_clients)
      errors.append(np.linalg.norm(output.result[0] - update[0]) / np.linalg.norm(update[0]))
    assert errors[0] == pytest.approx(0.5, rel=0.5)
    assert errors[1] == pytest.approx(1 / 12, rel=0.5)

  @pytest.mark.parametrize(
    'inner',
    [
      tff.aggregators.clipping_factory(0.5, tff.aggregators.SumFactory()),
      tff.aggregators.zeroing_factory(1e3, tff.aggregators.SumFactory()),
      tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(1e-6, 2.0, 100.0),
      tff.aggregators.UnweightedReservoirSamplingFactory(10),
    ],
    ids=['clipping', 'zeroing', 'dp', 'reservoir'],
  )
  def test_composes_with_unweighted_factories(self, inner):
    value_type = shaped_update_type(_UPDATE_TYPE, 'correlated')
    process = shadow_noise_factory('correlated', _RATIO, inner).create(value_type)
    _, values = _clients(2, 'correlated')
    output = process.next(process.initialize(), values)
    sent = np.stack([_flat(noised_update(v, 'correlated', _RATIO, 0.01)[0]) for v in values])
    if isinstance(inner, tff.aggregators.UnweightedReservoirSamplingFactory):
      np.testing.assert_allclose(output.result['b'][1], sent[:, -4:], atol=1e-6)
      return
    norms = np.linalg.norm(sent, axis=1, keepdims=True)
    expected = sent.sum(axis=0)
    if 'clipping' in output.measurements['inner']:
      expected = (sent * np.minimum(1.0, 0.5 / norms)).sum(axis=0)
    if isinstance(inner, tff.aggregators.DifferentiallyPrivateFactory):
      expected = sent.mean(axis=0)
    np.testing.assert_allclose(_flat(output.result), expected, atol=1e-3)

  def test_composes_with_weighted_clipping_and_zeroing(self):
    inner = tff.aggregators.zeroing_factory(
      1e3, tff.aggregators.clipping_factory(0.5, tff.aggregators.MeanFactory())
    )
    process = shadow_noise_factory('diagonal', _RATIO, inner).create(
      shaped_update_type(_UPDATE_TYPE, 'diagonal'), _FLOAT
    )
    _, values = _clients(2, 'diagonal')
    output = process.next(process.initialize(), values, [1.0, 1.0])
    sent = np.stack([_flat(noised_update(v, 'diagonal', _RATIO, 0.01)[0]) for v in values])
    expected = (sent * 0.5 / np.linalg.norm(sent, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(_flat(output.result), expected, atol=1e-5)
