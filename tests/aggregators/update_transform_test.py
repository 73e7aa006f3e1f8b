import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tests.aggregators.sent_updates import FLOAT, UPDATE_TYPE, sent_updates
from tff_shadow.aggregators.update_transform import update_transform_factory


def _halved(update):
  return [tensor / 2.0 for tensor in update]


class _SumPlusOne(tff.aggregators.UnweightedAggregationFactory):
  """A fake inner factory: counts its rounds and adds one to the sum."""

  def create(self, value_type):
    @tff.federated_computation
    def init_fn():
      return tff.federated_value(0, tff.SERVER)

    @tff.tensorflow.computation(np.int32)
    def count(rounds):
      return rounds + 1

    @tff.tensorflow.computation(value_type)
    def plus_one(value):
      return tf.nest.map_structure(lambda tensor: tensor + 1.0, value)

    @tff.federated_computation(
      init_fn.type_signature.result, tff.types.FederatedType(value_type, tff.CLIENTS)
    )
    def next_fn(state, value):
      total = tff.federated_map(plus_one, tff.federated_sum(value))
      rounds = tff.federated_map(count, state)
      return tff.templates.MeasuredProcessOutput(rounds, total, rounds)

    return tff.templates.AggregationProcess(init_fn, next_fn)


class TestTypes:
  def test_weighted(self):
    process = update_transform_factory(_halved, None).create(UPDATE_TYPE, FLOAT)
    mean = tff.aggregators.MeanFactory().create(UPDATE_TYPE, FLOAT)
    mean_output = mean.next.type_signature.result
    assert process.is_weighted
    assert process.initialize.type_signature == mean.initialize.type_signature
    assert process.next.type_signature.parameter == mean.next.type_signature.parameter
    result = process.next.type_signature.result
    assert result.state == mean_output.state
    assert result.result == tff.types.FederatedType(UPDATE_TYPE, tff.SERVER)
    assert result.measurements == tff.types.FederatedType(
      collections.OrderedDict(inner=mean_output.measurements.member, distortion=np.float32),
      tff.SERVER,
    )

  def test_unweighted(self):
    process = update_transform_factory(_halved, _SumPlusOne()).create(UPDATE_TYPE)
    assert not process.is_weighted
    assert process.next.type_signature.parameter == tff.types.to_type(
      collections.OrderedDict(
        state=tff.types.FederatedType(np.int32, tff.SERVER),
        value=tff.types.FederatedType(UPDATE_TYPE, tff.CLIENTS),
      )
    )
    result = process.next.type_signature.result
    assert result.result == tff.types.FederatedType(UPDATE_TYPE, tff.SERVER)
    assert result.measurements == tff.types.FederatedType(
      collections.OrderedDict(inner=np.int32, distortion=np.float32), tff.SERVER
    )

  @pytest.mark.parametrize('value_type', [[(np.int32, (3,))], [(np.float64, (3,))], []])
  def test_update_must_be_float32(self, value_type):
    with pytest.raises(TypeError, match='float32'):
      update_transform_factory(_halved, None).create(tff.types.to_type(value_type), FLOAT)

  def test_inner_must_be_a_factory(self):
    with pytest.raises(TypeError, match='aggregation factory'):
      update_transform_factory(_halved, 'mean')


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  def test_inner_gets_what_is_sent_and_names_stay(self):
    process = update_transform_factory(_halved, _SumPlusOne()).create(UPDATE_TYPE)
    value = collections.OrderedDict(
      b=np.arange(6, dtype=np.float32).reshape(2, 3),
      a=[np.float32(8.0), np.full(4, -2.0, np.float32)],
    )
    output = process.next(process.initialize(), [value, value])
    assert output.state == output.measurements['inner'] == 1
    np.testing.assert_allclose(output.result['b'], value['b'] + 1)
    np.testing.assert_allclose(output.result['a'][0], 9.0)
    np.testing.assert_allclose(output.result['a'][1], -1.0)
    assert output.measurements['distortion'] == pytest.approx(0.5)

  def test_what_is_not_finite_is_sent_as_zeros(self):
    def inverse(update):
      return [1.0 / tensor for tensor in update]

    updates = [
      [[np.nan, 1.0], [1.0]],
      [[1.0, 1.0], [np.inf]],
      [[1.0, 0.0], [1.0]],
      [[1e30, 2.0], [1.0]],
    ]
    sent, output = sent_updates(lambda inner: update_transform_factory(inverse, inner), updates)
    for first, second in sent[:3]:
      assert not first.any()
      assert not second.any()
    np.testing.assert_allclose(sent[3][0], [1e-30, 0.5])
    # Dropped wholly: 1; zeros, and squares beyond float32: 0.
    assert output.measurements['distortion'] == pytest.approx(0.25)
