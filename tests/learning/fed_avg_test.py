import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tests.attacks.observed_rounds import small_model
from tff_shadow.learning import (
  build_weighted_fed_avg,
  input_spec,
  keras_model_fn,
  model_weights,
)
from tff_shadow.models import classification_loss, freeze_batch_norm

_SHAPE = (8, 8, 1)
_LEARNING_RATE = 0.1


def _model(norm='none'):
  return small_model(_SHAPE, norm=norm, seed=3)


def _batches(seed, num_batches=2, batch_size=4, scale=1.0):
  rng = np.random.default_rng(seed)
  return [
    collections.OrderedDict(
      x=(scale * rng.random((batch_size, *_SHAPE))).astype(np.float32),
      y=rng.integers(0, 2, batch_size).astype(np.int32),
    )
    for _ in range(num_batches)
  ]


def _dataset(batches):
  return tf.data.Dataset.from_tensor_slices(
    collections.OrderedDict(
      (key, np.stack([batch[key] for batch in batches])) for key in ('x', 'y')
    )
  ).map(
    lambda batch: collections.OrderedDict(
      (key, tf.ensure_shape(batch[key], spec.shape)) for key, spec in input_spec(_SHAPE).items()
    )
  )


def _train_in_plain_tf(model, batches):
  """The same local SGD by hand; changes `model`."""
  loss_fn = classification_loss(model)
  for batch in batches:
    with tf.GradientTape() as tape:
      loss = loss_fn(batch['y'], model(batch['x'], training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
      variable.assign_sub(_LEARNING_RATE * gradient)
  return model_weights(model)


def _process(model, sharing='aggregate', **kwargs):
  return build_weighted_fed_avg(
    keras_model_fn(model, _SHAPE, sharing),
    tff.learning.optimizers.build_sgdm(_LEARNING_RATE),
    batch_norm_sharing=sharing,
    **kwargs,
  )


def _functional_model():
  keras_model = tf.keras.Sequential(
    [tf.keras.Input(_SHAPE), tf.keras.layers.Flatten(), tf.keras.layers.Dense(2)]
  )
  loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  return tff.learning.models.functional_model_from_keras(keras_model, loss, input_spec(_SHAPE))


def _one_round(process, model, clients):
  state = process.set_model_weights(process.initialize(), model_weights(model))
  return process.next(state, [_dataset(batches) for batches in clients])


class TestTypes:
  def test_state_is_the_stock_one(self):
    model_fn = keras_model_fn(_model(), _SHAPE)
    optimizer = tff.learning.optimizers.build_sgdm(_LEARNING_RATE)
    ours = build_weighted_fed_avg(model_fn, optimizer)
    stock = tff.learning.algorithms.build_weighted_fed_avg(model_fn, optimizer)
    assert ours.get_model_weights.type_signature.result == (
      stock.get_model_weights.type_signature.result
    )
    assert ours.initialize.type_signature == stock.initialize.type_signature
    assert ours.next.type_signature.parameter == stock.next.type_signature.parameter
    assert ours.get_hparams.type_signature == stock.get_hparams.type_signature
    assert ours.set_hparams.type_signature == stock.set_hparams.type_signature

  @pytest.mark.parametrize(
    ('norm', 'sharing', 'sends_statistics'),
    [
      ('batch', 'aggregate', True),
      ('batch', 'local', False),
      ('batch', 'frozen', False),
      ('none', 'aggregate', False),
    ],
  )
  def test_what_leaves_a_client(self, norm, sharing, sends_statistics):
    model = _model(norm)
    if sharing == 'frozen':
      freeze_batch_norm(model)
    form = tff.backends.mapreduce.get_map_reduce_form_for_computation(_process(model, sharing).next)
    sent = tff.structure.flatten(form.work.type_signature.result)
    shapes = [tuple(leaf.shape) for leaf in sent]
    statistics = [tuple(w.shape) for w in model.non_trainable_variables]
    expected = len(model.trainable_variables) + (len(statistics) if sends_statistics else 0)
    # The rest are scalars: weight, metrics, the flag of a dropped client.
    assert sum(1 for shape in shapes if shape) == expected
    assert not any(shape[1:] == _SHAPE for shape in shapes)

  def test_other_models_are_refused(self):
    optimizer = tff.learning.optimizers.build_sgdm(_LEARNING_RATE)
    functional, keras_model = _functional_model(), _model()
    for model_fn, found in (
      (functional, 'FunctionalModel'),
      (lambda: functional, 'FunctionalModel'),
      (lambda: keras_model, 'Functional'),
    ):
      with pytest.raises(TypeError, match=rf'Keras model .*from_keras_model\), found {found}$'):
        build_weighted_fed_avg(model_fn, optimizer)

  @pytest.mark.parametrize('weighting', ['num_examples', None, lambda *_: 1.0])
  def test_weighting_is_one_of_tff(self, weighting):
    with pytest.raises(TypeError, match=r'client_weighting must be a tff\.learning\.Client'):
      _process(_model(), client_weighting=weighting)

  def test_unknown_sharing(self):
    with pytest.raises(ValueError, match='batch_norm_sharing'):
      _process(_model(), 'sometimes')


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  @pytest.mark.parametrize('norm', ['none', 'batch', 'group'])
  def test_equals_plain_tensorflow(self, norm):
    clients = [_batches(1, num_batches=1), _batches(2, num_batches=3)]
    output = _one_round(_process(_model(norm)), _model(norm), clients)
    trained = [_train_in_plain_tf(_model(norm), batches) for batches in clients]
    weights = output.state.global_model_weights
    for kind in ('trainable', 'non_trainable'):
      expected = [
        np.average([first, second], axis=0, weights=[4, 12])
        for first, second in zip(*(getattr(w, kind) for w in trained), strict=True)
      ]
      for actual, wanted in zip(getattr(weights, kind), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-6)
    if norm == 'batch':
      initial = model_weights(_model(norm)).non_trainable
      assert not np.allclose(weights.non_trainable[0], initial[0])

  @pytest.mark.parametrize('momentum', [0.0, 0.9])
  def test_hyperparameters_are_set_as_in_stock(self, momentum):
    clients = [_batches(1, num_batches=3), _batches(2)]
    model_fn = keras_model_fn(_model(), _SHAPE)
    set_later, set_first, stock = (
      build(model_fn, tff.learning.optimizers.build_sgdm(rate, momentum))
      for build, rate in (
        (build_weighted_fed_avg, 0.5),
        (build_weighted_fed_avg, _LEARNING_RATE),
        (tff.learning.algorithms.build_weighted_fed_avg, 0.5),
      )
    )
    results = []
    for process in (set_later, set_first, stock):
      state = process.set_model_weights(process.initialize(), model_weights(_model()))
      hparams = process.get_hparams(state)
      if process is not set_first:
        assert hparams['client_work']['learning_rate'] == 0.5
        hparams['client_work']['learning_rate'] = _LEARNING_RATE
        state = process.set_hparams(state, hparams)
      state = process.next(state, [_dataset(batches) for batches in clients]).state
      assert process.get_hparams(state)['client_work'] == pytest.approx(
        {'learning_rate': _LEARNING_RATE, **({'momentum': momentum} if momentum else {})}
      )
      results.append(state.global_model_weights.trainable)
    for own, wanted, other in zip(*results, strict=True):
      np.testing.assert_array_equal(own, wanted)
      np.testing.assert_allclose(own, other, atol=2e-6)

  def test_local_statistics_stay_at_their_initial_values(self):
    output = _one_round(_process(_model('batch'), 'local'), _model('batch'), [_batches(1)])
    initial = model_weights(_model('batch'))
    weights = output.state.global_model_weights
    for actual, wanted in zip(weights.non_trainable, initial.non_trainable, strict=True):
      np.testing.assert_array_equal(actual, wanted)
    assert not np.allclose(weights.trainable[0], initial.trainable[0])

  def test_frozen_batch_norm_trains_the_rest_with_given_statistics(self):
    model = _model('batch')
    freeze_batch_norm(model)
    batches = _batches(1)
    output = _one_round(_process(model, 'frozen'), model, [batches])
    twin = _model('batch')
    freeze_batch_norm(twin)
    expected = _train_in_plain_tf(twin, batches)
    weights = output.state.global_model_weights
    for actual, wanted in zip(weights.trainable, expected.trainable, strict=True):
      np.testing.assert_allclose(actual, wanted, atol=2e-6)

  def test_non_finite_client_is_dropped_and_named(self):
    clients = [_batches(1), _batches(2, scale=np.nan), _batches(3)]
    output = _one_round(_process(_model()), _model(), clients)
    np.testing.assert_array_equal(output.metrics['client_work']['non_finite'], [0, 1, 0])
    without = _one_round(_process(_model()), _model(), [clients[0], clients[2]])
    for actual, wanted in zip(
      output.state.global_model_weights.trainable,
      without.state.global_model_weights.trainable,
      strict=True,
    ):
      np.testing.assert_allclose(actual, wanted, atol=1e-7)
    assert np.isfinite(output.metrics['client_work']['train']['loss'])

  def test_round_of_non_finite_clients_leaves_the_model_as_it_was(self):
    model = _model('batch')
    output = _one_round(_process(model), model, [_batches(1, scale=np.nan)])
    initial = model_weights(model)
    weights = output.state.global_model_weights
    for kind in ('trainable', 'non_trainable'):
      for actual, wanted in zip(getattr(weights, kind), getattr(initial, kind), strict=True):
        np.testing.assert_array_equal(actual, wanted)

  def test_server_momentum_does_not_touch_statistics(self):
    process = _process(
      _model('batch'),
      server_optimizer_fn=tff.learning.optimizers.build_sgdm(0.5, momentum=0.9),
    )
    batches = _batches(1)
    output = _one_round(process, _model('batch'), [batches])
    expected = _train_in_plain_tf(_model('batch'), batches)
    for actual, wanted in zip(
      output.state.global_model_weights.non_trainable, expected.non_trainable, strict=True
    ):
      np.testing.assert_allclose(actual, wanted, atol=2e-6)
