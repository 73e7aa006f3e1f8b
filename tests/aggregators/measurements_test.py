import collections

import numpy as np
import pytest
import tensorflow_federated as tff

from tests.aggregators.sent_updates import FLOAT, UPDATE_TYPE
from tff_shadow.aggregators import (
  NoiseStrength,
  percentile_noise_factory,
  public_shadow_noise_factory,
  quantization_factory,
  shadow_noise_factory,
  shaped_update_type,
  top_k_factory,
)

_DEVIATIONS = collections.OrderedDict(b=np.ones((2, 3)), a=[np.ones(()), np.ones(4)])
_SHAPED_TYPE = shaped_update_type(UPDATE_TYPE, 'isotropic')
_FACTORIES = {
  'percentile': lambda *args, **kwargs: percentile_noise_factory(0.1, 95.0, *args, **kwargs),
  'top_k': lambda *args, **kwargs: top_k_factory(0.5, *args, **kwargs),
  'quantization': lambda *args, **kwargs: quantization_factory(8, *args, **kwargs),
  'public_shadow_noise': lambda inner=None, **kwargs: public_shadow_noise_factory(
    _DEVIATIONS, clip_norm=1.0, noise_multiplier=0.0, inner=inner, **kwargs
  ),
  'shadow_noise': lambda inner=None, **kwargs: shadow_noise_factory(
    'isotropic', NoiseStrength('image_ratio', 0.5), inner, **kwargs
  ),
}


def _value_type(name):
  return _SHAPED_TYPE if name == 'shadow_noise' else UPDATE_TYPE


@pytest.mark.parametrize('name', _FACTORIES)
def test_what_is_measured_can_be_summed_securely(name):
  secure = tff.aggregators.MeanFactory(
    tff.aggregators.SecureSumFactory(10.0), tff.aggregators.SecureSumFactory(10.0)
  )
  plain, secured = (
    _FACTORIES[name](secure, secure_measurements=flag).create(_value_type(name), FLOAT).next
    for flag in (False, True)
  )
  tff.test.assert_not_contains_unsecure_aggregation(secured)
  with pytest.raises(AssertionError):
    tff.test.assert_not_contains_unsecure_aggregation(plain)
  assert secured.type_signature == plain.type_signature


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  @pytest.mark.parametrize('name', ['top_k', 'shadow_noise'])
  def test_secure_measurements_are_the_plain_ones(self, name):
    rng = np.random.default_rng(1)
    values = [
      collections.OrderedDict(
        b=rng.normal(size=(2, 3)).astype(np.float32),
        a=[np.float32(rng.normal()), rng.normal(size=4).astype(np.float32)],
      )
      for _ in range(3)
    ]
    if name == 'shadow_noise':
      values = [
        collections.OrderedDict(
          update=value,
          noise_key=np.array([5, client], np.int32),
          image_energy=np.float32(client),  # Of the first nothing can be measured: it falls back.
          region_energy=np.float32(0.0),
          region_fourth_moment=np.float32(0.0),
          sensitivity_energy=np.float32(0.0),
          decoy_energy=np.float32(0.0),
          shape=(),
        )
        for client, value in enumerate(values)
      ]
    plain, secured = (
      process.next(process.initialize(), values, [1.0, 2.0, 3.0])
      for process in (
        _FACTORIES[name](secure_measurements=flag).create(_value_type(name), FLOAT)
        for flag in (False, True)
      )
    )
    measured = ('distortion',) if name == 'top_k' else ('sent_norm', 'fell_back')
    for key in measured:
      assert plain.measurements[key] > 0.1
      assert secured.measurements[key] == pytest.approx(plain.measurements[key], abs=2e-6)
    np.testing.assert_array_equal(secured.result['b'], plain.result['b'])
