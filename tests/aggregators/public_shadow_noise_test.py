import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from scipy import stats

from tff_shadow.aggregators import (
  observation_tap_factory,
  public_shadow_noise_factory,
)
from tff_shadow.aggregators.public_shadow_noise import normalised_deviations
from tff_shadow.learning import keras_model_fn, model_weights
from tff_shadow.models import build_model

_FLOAT = tff.types.TensorType(np.float32)
# Declared in an order that is not the sorted one.
_UPDATE_TYPE = tff.types.to_type(
  collections.OrderedDict(b=(np.float32, (2, 3)), a=[(np.float32, (4,))])
)
_DEVIATIONS = collections.OrderedDict(
  b=np.array([[1.0, 2.0, 3.0], [0.5, 0.1, 4.0]]), a=[np.array([1.0, 0.2, 5.0, 1.0])]
)
_SHAPE = (8, 8, 1)


def _factory(noise_multiplier=1.0, clip_norm=2.0, deviations=_DEVIATIONS, inner=None):
  return public_shadow_noise_factory(
    deviations, clip_norm=clip_norm, noise_multiplier=noise_multiplier, inner=inner
  )


def _vector_process(deviations, noise_multiplier, clip_norm):
  """Over updates that are one vector, with every client's sent update among the measurements."""
  inner = observation_tap_factory(tff.aggregators.SumFactory())
  factory = _factory(noise_multiplier, clip_norm, [deviations], inner)
  return factory.create(tff.types.to_type([(np.float32, (len(deviations),))]))


def _sent(process, updates, state=None):
  state = state if state is not None else process.initialize()
  output = process.next(state, [[np.asarray(update, np.float32)] for update in updates])
  return output.measurements['inner']['observation']['updates'][0].astype(np.float64), output


class TestTypes:
  def test_weighted(self):
    process = _factory().create(_UPDATE_TYPE, _FLOAT)
    mean = tff.aggregators.MeanFactory().create(_UPDATE_TYPE, _FLOAT)
    mean_output = mean.next.type_signature.result
    assert process.is_weighted
    state = tff.types.FederatedType(
      collections.OrderedDict(
        inner=mean_output.state.member,
        # tf.nest's order: sorted by name.
        context=[(np.float32, (4,)), (np.float32, (2, 3))],
      ),
      tff.SERVER,
    )
    assert process.initialize.type_signature.result == state
    assert process.next.type_signature.parameter == tff.types.to_type(
      collections.OrderedDict(
        state=state,
        value=tff.types.FederatedType(_UPDATE_TYPE, tff.CLIENTS),
        weight=tff.types.FederatedType(np.float32, tff.CLIENTS),
      )
    )
    result = process.next.type_signature.result
    assert result.state == state
    assert result.result == tff.types.FederatedType(_UPDATE_TYPE, tff.SERVER)
    assert result.measurements == tff.types.FederatedType(
      collections.OrderedDict(inner=mean_output.measurements.member, sent_norm=np.float32),
      tff.SERVER,
    )

  def test_unweighted(self):
    process = _factory(inner=tff.aggregators.SumFactory()).create(_UPDATE_TYPE)
    assert not process.is_weighted
    assert len(process.next.type_signature.parameter) == 2
    assert process.next.type_signature.result.result.member == _UPDATE_TYPE

  @pytest.mark.parametrize(
    'value_type',
    [
      [(np.float32, (2, 3))],
      [(np.float32, (6,)), (np.float32, (4,))],
      collections.OrderedDict(b=(np.int32, (2, 3)), a=[(np.int32, (4,))]),
      collections.OrderedDict(b=(np.float64, (2, 3)), a=[(np.float64, (4,))]),
    ],
    ids=['missing', 'shape', 'integer', 'float64'],
  )
  def test_update_must_fit(self, value_type):
    with pytest.raises(TypeError, match=r'shapes|float32'):
      _factory().create(tff.types.to_type(value_type), _FLOAT)

  def test_what_leaves_a_client(self):
    process = _factory().create(_UPDATE_TYPE, _FLOAT)
    form = tff.backends.mapreduce.get_map_reduce_form_for_computation(
      tff.templates.IterativeProcess(process.initialize, _with_one_argument(process)).next
    )
    shapes = [leaf.shape for leaf in tff.structure.flatten(form.work.type_signature.result)]
    # Update, its weight, and for sent_norm a value and a count.
    assert sorted(tuple(shape) for shape in shapes) == [(), (), (), (2, 3), (4,)]


def _with_one_argument(process):
  parameter = process.next.type_signature.parameter
  data_type = tff.types.FederatedType((parameter[1].member, parameter[2].member), tff.CLIENTS)

  @tff.federated_computation(parameter[0], data_type)
  def next_fn(state, data):
    output = process.next(state, data[0], data[1])
    return output.state, (output.result, output.measurements)

  return next_fn


class TestArguments:
  @pytest.mark.parametrize('clip_norm', [0.0, -1.0, float('nan'), float('inf')])
  def test_clip_norm(self, clip_norm):
    with pytest.raises(ValueError, match='clip_norm'):
      _factory(clip_norm=clip_norm)

  @pytest.mark.parametrize('multiplier', [-1.0, float('nan'), float('inf')])
  def test_noise_multiplier(self, multiplier):
    with pytest.raises(ValueError, match='noise_multiplier'):
      _factory(noise_multiplier=multiplier)

  @pytest.mark.parametrize('bad', [0.0, -1.0, float('nan'), float('inf')])
  def test_deviations_must_be_positive(self, bad):
    with pytest.raises(ValueError, match='deviations'):
      _factory(deviations=[np.array([1.0, bad])])
    with pytest.raises(ValueError, match='deviations'):
      _factory(deviations=[])

  def test_deviations_are_normalised(self):
    arrays = normalised_deviations([np.array([1.0, 7.0]), np.array(5.0)])
    np.testing.assert_allclose(arrays[0], np.array([1.0, 7.0]) / 5.0)
    np.testing.assert_allclose(arrays[1], 1.0)

  def test_inner_must_be_a_factory(self):
    with pytest.raises(TypeError, match='aggregation factory'):
      _factory(inner='mean')


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  def test_clips_in_the_geometry_of_the_deviations(self):
    deviations = np.array([1.0, 2.0, 4.0, 0.1])
    normal = deviations / np.sqrt(np.mean(deviations**2))
    rng = np.random.default_rng(0)
    updates = [scale * rng.normal(size=4) * normal for scale in (0.01, 1.0, 50.0)]
    updates.append(np.zeros(4))
    sent, output = _sent(_vector_process(deviations, 0.0, 1.5), updates)
    norms = [np.linalg.norm(update / normal) for update in updates]
    expected = [u * min(1.0, 1.5 / max(n, 1e-9)) for u, n in zip(updates, norms, strict=True)]
    assert norms[0] < 1.5 < norms[1]
    np.testing.assert_allclose(sent, expected, rtol=1e-5)
    mean = np.mean(np.minimum(norms, 1.5))
    assert output.measurements['sent_norm'] == pytest.approx(mean, rel=1e-5)

  def test_noise_has_the_deviations_and_is_each_client_s_and_round_s_own(self):
    # Six scales, 2,000 weights each; 4 clients and 2 rounds: 16,000 draws per scale.
    scales = np.array([0.1, 0.5, 1.0, 2.0, 3.0, 8.0])
    deviations = np.repeat(scales, 2000)
    normal = deviations / np.sqrt(np.mean(deviations**2))
    process = _vector_process(deviations, 0.7, 3.0)
    update = 0.01 * np.random.default_rng(1).normal(size=deviations.size)
    first, output = _sent(process, [update] * 4)
    second, _ = _sent(process, [update] * 4, output.state)
    scale = min(1.0, 3.0 / np.linalg.norm(update / normal))
    white = (np.concatenate([first, second]) - scale * update) / (0.7 * 3.0 * normal)
    variances = white.reshape(8, 6, 2000).transpose(1, 0, 2).reshape(6, -1).var(axis=1)
    # Standard error 1.1 %.
    np.testing.assert_allclose(variances, 1.0, rtol=0.045)
    assert abs(white.mean()) < 5 / np.sqrt(white.size)
    assert stats.kstest(white.ravel()[::10], 'norm').pvalue > 1e-4
    # No key is given: clients and rounds differ by their own entropy.
    correlations = np.corrcoef(white) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(deviations.size)

  def test_a_client_that_is_not_finite_sends_noise_alone(self):
    bad = np.zeros(3000)
    bad[5] = np.nan
    sent, _ = _sent(_vector_process(np.ones(3000), 1.0, 2.0), [bad, np.full(3000, np.inf)])
    np.testing.assert_allclose(sent.std(axis=1), 2.0, rtol=0.06)

  def test_deviations_of_the_state_count(self):
    process = _vector_process(np.ones(4), 0.0, 1.0)
    state = process.initialize()
    state['context'] = [np.array([100.0, 1.0, 1.0, 1.0], np.float32)]
    sent, _ = _sent(process, [[10.0, 0.0, 0.0, 0.0]], state)
    np.testing.assert_allclose(sent, [[10.0, 0.0, 0.0, 0.0]], rtol=1e-6)

  def test_dictionaries_keep_their_names(self):
    process = _factory(0.0, 100.0, inner=tff.aggregators.SumFactory()).create(_UPDATE_TYPE)
    value = collections.OrderedDict(
      b=np.arange(6, dtype=np.float32).reshape(2, 3), a=[np.full(4, -1.0, np.float32)]
    )
    result = process.next(process.initialize(), [value]).result
    np.testing.assert_allclose(result['b'], value['b'])
    np.testing.assert_allclose(result['a'][0], value['a'][0])

  @pytest.mark.parametrize('weighted', [True, False])
  def test_drops_into_the_stock_fed_avg(self, weighted):
    model = build_model('conv_small', image_shape=_SHAPE, num_classes=2, seed=3)
    weights = model_weights(model)
    build = (
      tff.learning.algorithms.build_weighted_fed_avg
      if weighted
      else tff.learning.algorithms.build_unweighted_fed_avg
    )
    inner = tff.aggregators.MeanFactory() if weighted else tff.aggregators.UnweightedMeanFactory()
    deviations = [np.ones(w.shape) for w in weights.trainable]
    process = build(
      keras_model_fn(model, _SHAPE),
      tff.learning.optimizers.build_sgdm(0.1),
      model_aggregator=_factory(0.02, 0.5, deviations, inner),
    )
    rng = np.random.default_rng(0)
    data = tf.data.Dataset.from_tensor_slices(
      collections.OrderedDict(
        x=rng.random((4, *_SHAPE)).astype(np.float32), y=np.array([0, 1, 0, 1], np.int32)
      )
    ).batch(4)
    state = process.set_model_weights(process.initialize(), weights)
    output = process.next(state, [data, data])
    moved = np.concatenate(
      [
        np.ravel(new - old)
        for new, old in zip(
          output.state.global_model_weights.trainable, weights.trainable, strict=True
        )
      ]
    )
    # Clipped to 0.5 at most; noise of 0.01 per weight, averaged over two clients.
    noise = 0.01 * np.sqrt(moved.size / 2)
    assert noise < np.linalg.norm(moved) < 1.05 * np.hypot(noise, 0.5)
    expected = np.hypot(0.5, 0.01 * np.sqrt(moved.size))
    assert output.metrics['aggregator']['sent_norm'] == pytest.approx(expected, rel=0.05)
