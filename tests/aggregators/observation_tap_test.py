import collections

import numpy as np
import pytest
import tensorflow_federated as tff

from tff_shadow.aggregators import build_collect_from_clients, observation_tap_factory

_VALUE_TYPE = tff.types.to_type(collections.OrderedDict(a=np.float32, b=(np.float32, (2,))))
_STACKED_TYPE = tff.types.to_type(
  collections.OrderedDict(a=(np.float32, (None,)), b=(np.float32, (None, 2)))
)


def _value(number):
  return collections.OrderedDict(a=float(number), b=np.full(2, number, np.float32))


class TestTypes:
  def test_weighted_type_is_the_inner_ones_with_the_observation(self):
    inner = tff.aggregators.MeanFactory()
    process = observation_tap_factory(inner).create(_VALUE_TYPE, tff.types.TensorType(np.float32))
    inner_process = inner.create(_VALUE_TYPE, tff.types.TensorType(np.float32))
    inner_output = inner_process.next.type_signature.result
    assert process.is_weighted
    assert process.initialize.type_signature == inner_process.initialize.type_signature
    expected = collections.OrderedDict(
      state=inner_output.state,
      value=tff.types.FederatedType(_VALUE_TYPE, tff.CLIENTS),
      weight=tff.types.FederatedType(np.float32, tff.CLIENTS),
    )
    assert process.next.type_signature.parameter == tff.types.to_type(expected)
    assert process.next.type_signature.result.result == inner_output.result
    assert process.next.type_signature.result.measurements == tff.types.FederatedType(
      collections.OrderedDict(
        inner=inner_output.measurements.member,
        observation=collections.OrderedDict(
          updates=_STACKED_TYPE,
          weights=tff.types.TensorType(np.float32, (None,)),
          aggregate=_VALUE_TYPE,
        ),
      ),
      tff.SERVER,
    )

  def test_unweighted_type(self):
    process = observation_tap_factory(tff.aggregators.SumFactory()).create(_VALUE_TYPE)
    assert not process.is_weighted
    observation = process.next.type_signature.result.measurements.member.observation
    assert sorted(dir(observation)) == ['aggregate', 'updates']

  def test_inner_must_be_a_factory(self):
    with pytest.raises(TypeError, match='aggregation factory'):
      observation_tap_factory('mean')


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  def test_logs_every_update_and_weight_in_the_order_of_the_clients(self):
    process = observation_tap_factory(tff.aggregators.MeanFactory()).create(
      _VALUE_TYPE, tff.types.TensorType(np.float32)
    )
    numbers = [5.0, 1.0, 4.0, 2.0, 9.0, 3.0, 8.0, 0.0, 7.0, 6.0, 10.0]
    weights = [float(n + 1) for n in reversed(range(len(numbers)))]
    output = process.next(process.initialize(), [_value(n) for n in numbers], weights)
    observation = output.measurements['observation']
    np.testing.assert_array_equal(observation['updates']['a'], numbers)
    np.testing.assert_array_equal(observation['updates']['b'][:, 1], numbers)
    np.testing.assert_array_equal(observation['weights'], weights)
    expected = np.average(numbers, weights=weights)
    assert output.result['a'] == pytest.approx(expected)
    np.testing.assert_array_equal(observation['aggregate']['b'], output.result['b'])

  def test_logs_what_an_outer_client_side_factory_sends(self):
    clipped = tff.aggregators.clipping_factory(
      1.0, observation_tap_factory(tff.aggregators.SumFactory())
    )
    process = clipped.create(tff.types.to_type([(np.float32, (2,))]))
    output = process.next(process.initialize(), [[np.array([3.0, 4.0], np.float32)]])
    logged = output.measurements['clipping']['observation']['updates'][0]
    np.testing.assert_allclose(logged, [[0.6, 0.8]], rtol=1e-6)

  def test_collect_keeps_order(self):
    collect = build_collect_from_clients(tff.types.TensorType(np.int32))
    np.testing.assert_array_equal(collect([3, 1, 2]), [3, 1, 2])
