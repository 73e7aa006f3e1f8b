import collections
import functools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators import NoiseStrength, observation_tap_factory
from tff_shadow.aggregators.shadow_noise import noised_update, stateless_normal_like
from tff_shadow.data import Examples
from tff_shadow.learning import (
  ShadowDefense,
  build_weighted_fed_avg,
  keras_model_fn,
  model_weights,
)
from tff_shadow.learning.decoys import decoy_batches
from tff_shadow.learning.keras_task import restore_eager_keras
from tff_shadow.learning.noise_settings import ShadowNoise, shadow_input_spec
from tff_shadow.learning.shadow_fed_avg import (
  build_shadow_fed_avg,
  shadow_fed_avg_but_aggregation,
)
from tff_shadow.learning.shadow_work import ShadowWork
from tff_shadow.models import (
  classification_loss,
  freeze_batch_norm,
  model_from_config,
  model_to_config,
)
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.noise_keys import experiment_secret, image_keys
from tff_shadow.shadow.sensitivity import gradient_and_derivatives, region_noise

_SHAPE = (8, 8, 1)
_RATE = 0.1
_SGD = tff.learning.optimizers.build_sgdm(_RATE)
_FASTER = tff.learning.optimizers.build_sgdm(5 * _RATE)
_UNIFORM = SaliencyConfig('uniform')
_GIVEN = SaliencyConfig('given')
# Shape, propagation and kind of strength.
_ALL = [
  ('isotropic', 'per_step', 'ratio'),
  ('isotropic', 'per_step', 'image_ratio'),
  ('diagonal', 'per_step', 'ratio'),
  ('diagonal', 'local_training', 'ratio'),
  ('correlated', 'per_step', 'ratio'),
  ('correlated', 'local_training', 'ratio'),
  ('correlated', 'images', 'scale'),
  ('decoy', 'per_step', 'scale'),
]


def _model(norm='none'):
  """Smooth, so that derivatives are what differences say."""
  tf.keras.backend.clear_session()
  tf.keras.utils.set_random_seed(3)
  inputs = tf.keras.Input(_SHAPE)
  x = tf.keras.layers.Conv2D(3, 3, strides=2, activation='tanh', name='conv')(inputs)
  if norm == 'batch':
    x = tf.keras.layers.BatchNormalization(momentum=0.9, name='bn')(x)
  x = tf.keras.layers.Flatten()(x)
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2, name='logits')(x))


def _examples(num_examples=8, client='client_00', round_num=None, seed=1):
  rng = np.random.default_rng(seed)
  regions = np.zeros((num_examples, 8, 8, 1), np.float32)
  regions[:, 2:6, 3:8] = 1.0
  keys = image_keys(experiment_secret(0, client), np.arange(num_examples), round_num)
  return collections.OrderedDict(
    x=rng.random((num_examples, *_SHAPE)).astype(np.float32),
    y=rng.integers(0, 2, num_examples).astype(np.int32),
    noise_key=keys,
    region=regions,
  )


def _public(num_examples=3, side=8):
  rng = np.random.default_rng(5)
  images = rng.integers(0, 256, (num_examples, side, side, 1)).astype(np.uint8)
  labels = rng.integers(0, 2, num_examples).astype(np.int32)
  return Examples(images, labels, np.ones_like(images))


def _dataset(examples, fields=('x', 'y', 'noise_key'), batch_size=4):
  return tf.data.Dataset.from_tensor_slices(
    collections.OrderedDict((name, examples[name]) for name in fields)
  ).batch(batch_size)


def _noise(shape, propagation='per_step', kind='ratio', value=0.3, saliency=_UNIFORM, **kwargs):
  return ShadowNoise(shape, NoiseStrength(kind, value), saliency, propagation, **kwargs)


def _shadow_model_fn(model, sharing='local'):
  config = model_to_config(model)

  def shadow_model_fn():
    shadow = model_from_config(config)
    if sharing == 'frozen':
      freeze_batch_norm(shadow)
    return shadow

  return shadow_model_fn


def _process(
  model, noise, sharing='local', optimizer=_SGD, tap=False, build=build_shadow_fed_avg, **kwargs
):
  if tap:
    kwargs['model_aggregator'] = _tap()
  return build(
    keras_model_fn(model, _SHAPE, sharing),
    optimizer,
    noise=noise,
    shadow_model_fn=_shadow_model_fn(model, sharing),
    batch_norm_sharing=sharing,
    **kwargs,
  )


def _tap():
  return observation_tap_factory(tff.aggregators.MeanFactory())


def _all_noise(shape, propagation, kind):
  return _noise(shape, propagation, kind, saliency=_GIVEN, probes=2)


@functools.cache
def _all_but_aggregation(*settings):
  """The processes of `_ALL`, each with any aggregator."""
  noise = _all_noise(*settings)
  decoys = _public() if noise.needs_decoys else None
  return _process(_model(), noise, build=shadow_fed_avg_but_aggregation, decoys=decoys)


class _Client:
  """What one client of a process does, without TFF around it and so in a fraction of the time.

  `TestExecution` shows that in a process it is the same.
  """

  def __init__(self, model, noise, sharing='local', optimizer=_SGD, decoys=None):
    restore_eager_keras(model)
    self._weights = model_weights(model)
    self._noise = noise
    shadow_model_fn = _shadow_model_fn(model, sharing)
    self._work = ShadowWork(
      keras_model_fn(model, _SHAPE, sharing),
      shadow_model_fn,
      optimizer,
      noise,
      sharing == 'aggregate',
      decoy_batches(noise, decoys, shadow_model_fn()) if noise.needs_decoys else None,
    )

  def result(self, dataset, hparams=None):
    weighting = tff.learning.ClientWeighting.NUM_EXAMPLES
    return self._work.run(self._weights, dataset, weighting, hparams)

  def sends(self, dataset, hparams=None):
    """The noised update, flat."""
    shaped = self.result(dataset, hparams)[0].update
    noised, _ = noised_update(shaped, *self._noise.added, self._noise.floor)
    return _flat(noised)


def _sent(output, client=0):
  """What one client sent, flat; and all that was logged."""
  observation = output.metrics['aggregator']['inner']['observation']
  return _flat([t[client] for t in tf.nest.flatten(observation['updates'])]), observation


def _flat(tensors):
  return np.concatenate([np.ravel(np.asarray(tensor)) for tensor in tf.nest.flatten(tensors)])


def _update_in_plain_tf(model, weights, examples, shift=0.0, batch_size=4):
  """Initial minus trained, of the same local SGD by hand."""
  restore_eager_keras(model)
  model.set_weights(_in_keras_order(model, weights))
  loss_fn = classification_loss(model)
  images = examples['x'] + shift
  for start in range(0, len(images), batch_size):
    batch = slice(start, start + batch_size)
    with tf.GradientTape() as tape:
      loss = loss_fn(examples['y'][batch], model(images[batch], training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
      variable.assign_sub(_RATE * gradient)
  trained = [variable.numpy() for variable in model.trainable_variables]
  return _flat([a - b for a, b in zip(weights.trainable, trained, strict=True)])


def _in_keras_order(model, weights):
  """Values for `set_weights`, which mixes trainable weights and statistics."""
  values = {
    v.ref(): value
    for kind in ('trainable', 'non_trainable')
    for v, value in zip(getattr(model, f'{kind}_variables'), getattr(weights, kind), strict=True)
  }
  return [values[variable.ref()] for variable in model.weights]


def _one_round(process, weights, datasets):
  return process.next(process.set_model_weights(process.initialize(), weights), datasets)


def _leaves(computation):
  """Shapes and types of what leaves a client, those of scalars too."""
  form = tff.backends.mapreduce.get_map_reduce_form_for_computation(computation)
  return [
    (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    for leaf in tff.structure.flatten(form.work.type_signature.result)
  ]


@pytest.fixture(scope='module')
def plain_leaves():
  """Of FedAvg without noise."""
  return _leaves(build_weighted_fed_avg(keras_model_fn(_model(), _SHAPE), _SGD).next)


@pytest.fixture(scope='module')
def stock():
  """TFF's own FedAvg, of what is the same model at every call of `_model`."""
  return tff.learning.algorithms.build_weighted_fed_avg(keras_model_fn(_model(), _SHAPE), _SGD)


class TestTypes:
  @pytest.mark.parametrize('settings', _ALL)
  def test_only_the_noised_update_and_scalars_leave_a_client(self, settings, plain_leaves):
    sent = _leaves(_all_but_aggregation(*settings)(None).next)
    update = [(tuple(v.shape), 'float32') for v in _model().trainable_variables]
    assert [leaf for leaf in sent if leaf[0]] == update
    # Beyond FedAvg: value and count of the mean of sent_norm; the numbers of fall-backs of maps and
    # of the shape.
    extra = collections.Counter(sent) - collections.Counter(plain_leaves)
    assert extra == {((), 'float32'): 2, ((), 'int32'): 2}
    assert not collections.Counter(plain_leaves) - collections.Counter(sent)

  def test_data_are_those_of_the_input_spec(self):
    given = _all_but_aggregation('correlated', 'per_step', 'ratio')(None)
    uniform = _process(_model(), _noise('correlated'))
    for process, with_regions in ((given, True), (uniform, False)):
      spec = shadow_input_spec(_SHAPE, with_regions=with_regions)
      assert process.next.type_signature.parameter[1] == tff.types.FederatedType(
        tff.types.SequenceType(tff.types.tensorflow_to_type(spec)), tff.CLIENTS
      )
    assert list(spec) == ['x', 'y', 'noise_key']


class TestArguments:
  @pytest.mark.parametrize(
    ('types', 'message'),
    [
      ((tf.float32, tf.int64), "'y' of int64, .* have int32"),
      ((tf.uint8, tf.int32), "'x' of uint8, .* have float32"),
    ],
  )
  @pytest.mark.parametrize(
    'structure', [tuple, lambda xy: collections.OrderedDict(x=xy[0], y=xy[1])]
  )
  def test_other_types_of_data_are_told_at_once(self, structure, types, message):
    config = model_to_config(_model())
    shapes = ((None, *_SHAPE), (None,))
    specs = [tf.TensorSpec(*pair) for pair in zip(shapes, types, strict=True)]

    def model_fn():
      return tff.learning.models.from_keras_model(
        model_from_config(config),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        structure(specs),
      )

    with pytest.raises(TypeError, match=message):
      build_shadow_fed_avg(
        model_fn,
        _SGD,
        noise=_noise('isotropic'),
        shadow_model_fn=lambda: model_from_config(config),
        batch_norm_sharing='local',
      )

  def test_weighting_is_one_of_tff(self):
    with pytest.raises(TypeError, match=r'client_weighting must be a tff\.learning\.Client'):
      _process(_model(), _noise('isotropic'), client_weighting='num_examples')

  def test_per_step_needs_plain_sgd(self):
    for optimizer in (
      tff.learning.optimizers.build_sgdm(_RATE, momentum=0.9),
      tff.learning.optimizers.build_adam(_RATE),
    ):
      with pytest.raises(ValueError, match='without momentum'):
        _process(_model(), _noise('diagonal'), optimizer=optimizer)
      _process(_model(), _noise('isotropic'), optimizer=optimizer)

  def test_image_ratio_does_not_see_shared_statistics(self):
    with pytest.raises(ValueError, match="'image_ratio' does not see the BatchNorm statistics"):
      _process(_model('batch'), _noise('isotropic', kind='image_ratio'), 'aggregate')

  def test_per_step_does_not_see_shared_statistics(self):
    with pytest.raises(ValueError, match='BatchNorm statistics'):
      _process(_model('batch'), _noise('correlated'), 'aggregate')

  @pytest.mark.parametrize(('shape', 'kind'), [('correlated', 'ratio'), ('diagonal', 'scale')])
  def test_noise_in_the_images_is_correlated_and_absolute(self, shape, kind):
    with pytest.raises(ValueError, match="'images' needs correlated noise"):
      _noise(shape, 'images', kind)

  def test_image_ratio_needs_plain_sgd(self):
    momentum = tff.learning.optimizers.build_sgdm(_RATE, 0.9)
    with pytest.raises(ValueError, match="'image_ratio' needs SGD without momentum"):
      _process(_model(), _noise('isotropic', kind='image_ratio'), optimizer=momentum)
    with pytest.raises(ValueError, match="'images' needs correlated noise"):
      _noise('correlated', 'images', 'image_ratio')

  def test_decoy_noise(self):
    noise = _noise('decoy', kind='scale', value=3.0)
    momentum = tff.learning.optimizers.build_sgdm(_RATE, 0.9)
    for expected, model, sharing, arguments in (
      ('needs decoys', _model(), 'local', {}),
      ('needs decoys', _model(), 'local', {'decoys': _public(0)}),
      (r'shape \(8, 8, 1\), found \(9, 9, 1\)', _model(), 'local', {'decoys': _public(side=9)}),
      ('decoy noise needs SGD', _model(), 'local', {'decoys': _public(), 'optimizer': momentum}),
      ('decoy noise does not see', _model('batch'), 'aggregate', {'decoys': _public()}),
    ):
      with pytest.raises(ValueError, match=expected):
        _process(model, noise, sharing, **arguments)
    with pytest.raises(ValueError, match="'region_psnr' needs a bound"):
      _noise('decoy', kind='region_psnr', value=10.0)

  def test_decoys_need_more_of_a_floor(self):
    assert _noise('decoy').floor > 0.9 > 0.05 > _noise('correlated').floor > 0
    assert _noise('decoy', floor=0.5).floor == 0.5
    assert ShadowDefense(_noise('decoy'), True, {}).public_settings()['floor'] > 0.9

  def test_what_is_compared_must_be_repeatable(self):
    inputs = tf.keras.Input(_SHAPE)
    dropped = tf.keras.layers.Dropout(0.5, name='drop')(tf.keras.layers.Flatten()(inputs))
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(dropped))
    with pytest.raises(ValueError, match="layer 'drop' draws"):
      _process(model, _noise('correlated', 'local_training'))
    with pytest.raises(ValueError, match="'image_ratio' compares gradients with and"):
      _process(model, _noise('isotropic', kind='image_ratio'))
    # One forward pass, one mask.
    _process(model, _noise('correlated', 'per_step'))

  def test_layers_of_a_user_s_own_may_branch(self):
    @tf.keras.saving.register_keras_serializable('tests')
    class Dimmed(tf.keras.layers.Layer):
      def call(self, inputs):
        if tf.reduce_mean(inputs) > 0.5:
          inputs = 0.5 * inputs
        return inputs

    inputs = tf.keras.Input(_SHAPE)
    x = tf.keras.layers.Flatten()(Dimmed()(inputs))
    _process(
      tf.keras.Model(inputs, tf.keras.layers.Dense(2)(x)),
      _noise('correlated'),
      build=shadow_fed_avg_but_aggregation,
    )

  def test_unknown_sharing(self):
    with pytest.raises(ValueError, match='batch_norm_sharing'):
      build_shadow_fed_avg(
        keras_model_fn(_model(), _SHAPE),
        _SGD,
        noise=_noise('isotropic'),
        shadow_model_fn=_model,
        batch_norm_sharing='sometimes',
      )

  @pytest.mark.parametrize(
    'changes',
    [
      {'propagation': 'never'},
      {'probes': 0},
      {'local_epochs': 0},
      {'decoys': 0},
      {'floor': 0.0},
      {'floor': 1.0},
      {'decoy_augmentations': ('blur',)},
      {'epsilon': 0.0},
      {'epsilon': float('inf')},
      {'epsilon': float('nan')},
    ],
  )
  def test_settings(self, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
      _noise('diagonal', **changes)


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  @pytest.mark.parametrize('settings', _ALL)
  def test_a_client_sends_what_its_work_and_the_noise_make(self, settings):
    model, noise = _model(), _all_noise(*settings)
    fields = ('x', 'y', 'noise_key', 'region')
    datasets = [_dataset(_examples(n, seed=n), fields) for n in (4, 10)]
    datasets.insert(0, datasets[0].take(0))
    # All of a client follows the learning rate that is set, too.
    alone = _Client(model, noise, optimizer=_FASTER, decoys=_public())
    hparams = collections.OrderedDict(learning_rate=tf.constant(_RATE))
    expected = [alone.sends(dataset, hparams) for dataset in datasets]
    process = _all_but_aggregation(*settings)(_tap())
    output = _one_round(process, model_weights(model), datasets)
    sent = [_sent(output, client)[0] for client in range(3)]
    np.testing.assert_array_equal(sent[0], 0.0)
    np.testing.assert_allclose(sent, expected, rtol=1e-4, atol=1e-6)
    _, observation = _sent(output)
    np.testing.assert_array_equal(observation['weights'], [0.0, 4.0, 10.0])
    mean = np.average(sent, axis=0, weights=observation['weights'])
    np.testing.assert_allclose(_flat(observation['aggregate']), mean, atol=1e-6)

  def test_learning_rate_is_set_between_rounds(self):
    model, dataset = _model(), _dataset(_examples(8))
    weights = model_weights(model)
    # Of an absolute strength, so that the noise is in proportion to the rate.
    noise = _noise('correlated', kind='scale')
    process = _process(model, noise, optimizer=_FASTER)
    state = process.set_model_weights(process.initialize(), weights)
    hparams = process.get_hparams(state)
    assert hparams['client_work']['learning_rate'] == np.float32(5 * _RATE)
    hparams['client_work']['learning_rate'] = _RATE
    output = process.next(process.set_hparams(state, hparams), [dataset])
    expected = _flat(weights.trainable) - _Client(model, noise).sends(dataset)
    trained = _flat(output.state.global_model_weights.trainable)
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-7)

  @pytest.mark.parametrize(
    ('shape', 'propagation'),
    [('isotropic', 'per_step'), ('diagonal', 'per_step'), ('correlated', 'local_training')],
  )
  def test_without_noise_it_is_fed_avg(self, shape, propagation, stock):
    model = _model()
    weights = model_weights(model)
    clients = [_examples(4, seed=1), _examples(12, seed=2)]
    expected = _one_round(stock, weights, [_dataset(c, ('x', 'y')) for c in clients])
    process = _process(model, _noise(shape, propagation, value=0.0, probes=3))
    output = _one_round(process, weights, [_dataset(c) for c in clients])
    for actual, wanted in zip(
      output.state.global_model_weights.trainable,
      expected.state.global_model_weights.trainable,
      strict=True,
    ):
      np.testing.assert_allclose(actual, wanted, atol=1e-6)
    # Neither probes nor copies count twice.
    metrics = output.metrics['client_work']
    wanted = expected.metrics['client_work']['train']
    assert metrics['train']['num_examples'] == wanted['num_examples'] == 16
    assert metrics['train']['num_batches'] == wanted['num_batches'] == 4
    assert metrics['train']['loss'] == pytest.approx(wanted['loss'], rel=1e-5)
    assert metrics['maps_fell_back'] == 0
    np.testing.assert_array_equal(metrics['non_finite'], [0, 0])

  @pytest.mark.parametrize(
    ('shape', 'propagation'),
    [('isotropic', 'per_step'), ('diagonal', 'local_training'), ('correlated', 'per_step')],
  )
  def test_without_noise_it_is_the_local_training(self, shape, propagation):
    model, examples = _model(), _examples(12)
    client = _Client(model, _noise(shape, propagation, value=0.0, probes=3))
    expected = _update_in_plain_tf(model, model_weights(model), examples)
    np.testing.assert_allclose(client.sends(_dataset(examples)), expected, atol=1e-6)

  @pytest.mark.parametrize(('shape', 'epochs'), [('isotropic', 1), ('diagonal', 3)])
  def test_image_ratio_follows_what_one_image_adds(self, shape, epochs):
    model, examples = _model(), _examples(8)
    weights = model_weights(model)
    # In batches of 4, of which the first images are the ones that are left out.
    clients = [examples, {k: v[:1] for k, v in examples.items()}]
    sent = {}
    for kind in ('ratio', 'image_ratio'):
      noise = _noise(shape, kind=kind, value=0.3, probes=2, local_epochs=epochs)
      client = _Client(model, noise)
      sent[kind] = [client.sends(_dataset(own)) for own in clients]
    clean = [_update_in_plain_tf(model, weights, own) for own in clients]
    model.set_weights(_in_keras_order(model, weights))
    loss_fn = classification_loss(model)
    energies = []
    for image in (0, 4):
      with tf.GradientTape() as tape:
        loss = loss_fn(examples['y'][image : image + 1], model(examples['x'][image : image + 1]))
      parts = _flat(tape.gradient(loss, model.trainable_variables)) * _RATE / 4
      energies.append(np.sum(parts**2))
    factor = epochs * np.sqrt(np.mean(energies)) / np.linalg.norm(clean[0])
    assert not 0.9 < factor < 1.1
    by_update, by_image = (sent[k][0] - clean[0] for k in ('ratio', 'image_ratio'))
    np.testing.assert_allclose(by_image, factor * by_update, rtol=1e-3, atol=1e-6)
    # Of one image and one step both are the same, but for the epochs.
    by_update, by_image = (sent[k][1] - clean[1] for k in ('ratio', 'image_ratio'))
    np.testing.assert_allclose(by_image, epochs * by_update, rtol=1e-3, atol=1e-6)

  def test_image_ratio_hides_the_image_of_a_lone_last_batch(self):
    model, examples = _model(), _examples(5)
    weights = model_weights(model)
    noise = _noise('isotropic', kind='image_ratio', value=0.3, probes=2)
    sent = _Client(model, noise).sends(_dataset(examples))
    clean = _update_in_plain_tf(model, weights, examples)
    energies = [
      np.sum(
        _update_in_plain_tf(model, weights, {k: v[i : i + 1] for k, v in examples.items()}) ** 2
      )
      for i in (0, 4)
    ]
    # As if both had been alone in their batches.
    found = np.linalg.norm(sent - clean)
    assert found == pytest.approx(0.3 * np.sqrt(np.mean(energies)), rel=0.1)

  def test_pixels_beyond_image_units_end_the_round(self):
    examples = _examples(4)
    examples['x'] *= 255.0
    dataset = _dataset(examples, ('x', 'y', 'noise_key', 'region'))
    process = _all_but_aggregation('correlated', 'per_step', 'ratio')(_tap())
    with pytest.raises(Exception, match='divide them by 255'):
      _one_round(process, model_weights(_model()), [dataset])

  @pytest.mark.parametrize('kind', ['scale', 'ratio'])
  def test_decoy_noise_is_a_sum_of_the_gradients_of_public_images(self, kind):
    # Two steps of four images in each of three epochs, so that no factor is 1.
    model, examples, public = _model(), _examples(8), _public()
    weights = model_weights(model)
    client = _dataset(examples).repeat(3)
    sent = {}
    for value in (0.0, 2.0):
      settings = {'local_epochs': 3, 'floor': 1e-9, 'decoys': 8, 'decoy_augmentations': ()}
      noise = _noise('decoy', kind=kind, value=value, **settings)
      sent[value] = _Client(model, noise, decoys=public).sends(client)
    _, metrics, *_ = _Client(model, noise, decoys=public).result(client)
    # No statistic of the training counts the public images.
    np.testing.assert_array_equal(metrics['num_examples'], [24])
    noise = sent[2.0] - sent[0.0]
    model.set_weights(_in_keras_order(model, weights))
    loss_fn = classification_loss(model)
    singles = []
    for image, label in zip(public.float_images(), public.labels, strict=True):
      with tf.GradientTape() as tape:
        loss = loss_fn([label], model(image[None], training=True))
      singles.append(_flat(tape.gradient(loss, model.trainable_variables)))
    shares, *_ = np.linalg.lstsq(np.array(singles).T, noise, rcond=None)
    np.testing.assert_allclose(shares @ singles, noise, atol=1e-3 * np.abs(noise).max())
    # How often each was drawn for one batch of eight, less how often for the other.
    unit = 2.0 * 3 * _RATE / 4 * np.sqrt(8 / 2) / 8
    if kind == 'ratio':
      # Over many draws twice the norm of the update; this one has it nearly.
      assert 0.2 < np.linalg.norm(noise) / (2.0 * np.linalg.norm(sent[0.0])) < 3
      unit = np.min(np.abs(shares)[np.abs(shares) > 1e-3 * np.abs(shares).max()])
    counts = shares / unit
    np.testing.assert_allclose(counts, np.round(counts), atol=0.01)
    assert abs(counts.sum()) < 0.01 < np.abs(counts).max()

  def test_a_client_without_images_sends_no_decoys(self):
    noise = _noise('decoy', kind='scale', value=2.0, decoys=4)
    client = _Client(_model('batch'), noise, decoys=_public())
    dataset = _dataset(_examples(4))
    for own, weight in ((dataset.take(0), 0.0), (dataset, 4.0)):
      sent = client.sends(own)
      assert np.isfinite(sent).all()
      assert bool(np.any(sent)) == bool(weight)
      assert client.result(own)[0].update_weight == weight

  def test_correlated_noise_is_the_difference_of_two_trainings(self):
    model, examples, epsilon = _model(), _examples(), 0.2
    weights = model_weights(model)
    noise = _noise(
      'correlated', 'local_training', 'scale', 0.5, _UNIFORM, epsilon=epsilon, floor=1e-9
    )
    sent = _Client(model, noise).sends(_dataset(examples))
    direction = region_noise(
      tf.ones((8, 8, 8, 1)), tf.constant(examples['noise_key']), 1, 'normal'
    ).numpy()
    clean, plus, minus = (
      _update_in_plain_tf(model, weights, examples, shift * epsilon * direction)
      for shift in (0, 1, -1)
    )
    expected = 0.5 * (plus - minus) / (2 * epsilon)
    assert np.linalg.norm(expected) > 0.02 * np.linalg.norm(clean)
    atol = 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(sent - clean, expected, atol=atol)

  @pytest.mark.parametrize(('kind', 'value'), [('scale', 0.2), ('region_psnr', 14.0)])
  def test_noise_in_the_images_is_a_training_on_noised_images(self, kind, value):
    model, examples = _model('batch'), _examples()
    # The error to be guaranteed is that over the region: a weak map asks for stronger noise.
    examples['region'][:4] *= 0.5
    weights = model_weights(model)
    # Momentum, which derivatives per step cannot follow.
    optimizer = tff.learning.optimizers.build_sgdm(_RATE, momentum=0.5)
    noise = _noise('correlated', 'images', kind, value, _GIVEN)
    fields = ('x', 'y', 'noise_key', 'region')
    scale = value if kind == 'scale' else 10 ** (-value / 20) / np.repeat([0.5, 1.0], 4)
    keys = tf.constant(examples['noise_key'])
    noised = dict(examples)
    drawn = region_noise(examples['region'], keys, 1, 'normal').numpy()
    shift = np.reshape(scale, (-1, 1, 1, 1)) * drawn
    noised['x'] = (examples['x'] + shift).astype(np.float32)
    actual = _Client(model, noise, 'aggregate', optimizer).sends(_dataset(examples, fields))
    plain = build_weighted_fed_avg(
      keras_model_fn(model, _SHAPE, 'aggregate'), optimizer, model_aggregator=_tap()
    )
    outputs = (
      _one_round(plain, weights, [_dataset(own, ('x', 'y'))]) for own in (noised, examples)
    )
    wanted, other = (
      _flat(output.metrics['aggregator']['observation']['aggregate']) for output in outputs
    )
    np.testing.assert_allclose(actual, wanted, atol=1e-6)
    assert np.abs(actual - other).max() > 1e-3

  @pytest.mark.parametrize('saliency', [_UNIFORM, _GIVEN])
  def test_one_step_equals_the_derivative_of_the_update(self, saliency):
    model, examples = _model(), _examples(4)
    weights = model_weights(model)
    noise = _noise('correlated', 'per_step', 'scale', 0.5, saliency, floor=1e-9)
    fields = ('x', 'y', 'noise_key', 'region') if saliency is _GIVEN else ('x', 'y', 'noise_key')
    sent = _Client(model, noise).sends(_dataset(examples, fields))
    maps = examples['region'] if saliency is _GIVEN else np.ones_like(examples['region'])
    direction = region_noise(maps, tf.constant(examples['noise_key']), 1, 'normal').numpy()
    step = 0.02
    clean, plus, minus = (
      _update_in_plain_tf(model, weights, examples, shift * step * direction)
      for shift in (0, 1, -1)
    )
    expected = 0.5 * (plus - minus) / (2 * step)
    np.testing.assert_allclose(sent - clean, expected, atol=5e-3 * np.abs(expected).max())

  @pytest.mark.parametrize('norm', ['none', 'batch'])
  def test_diagonal_noise_follows_the_probes(self, norm):
    # With 'batch' frozen at statistics that are not the initial ones, which all copies must get.
    model, examples, probes = _model(norm), _examples(4), 3
    sharing = 'frozen' if norm == 'batch' else 'local'
    if norm == 'batch':
      freeze_batch_norm(model)
      layer = model.get_layer('bn')
      layer.moving_mean.assign([0.3, -0.2, 0.1])
      layer.moving_variance.assign([0.02, 0.3, 4.0])
    weights = model_weights(model)
    noise = _noise('diagonal', 'per_step', 'scale', 0.01, probes=probes, floor=1e-9)
    sent = _Client(model, noise, sharing).sends(_dataset(examples))
    clean = _update_in_plain_tf(model, weights, examples)
    model.set_weights(_in_keras_order(model, weights))
    keys = tf.constant(examples['noise_key'])
    loss_fn = classification_loss(model)
    _, derivatives = gradient_and_derivatives(
      lambda x: loss_fn(examples['y'], model(x, training=True)),
      model.trainable_variables,
      tf.constant(examples['x']),
      [
        region_noise(tf.ones((4, 8, 8, 1)), keys, 1, 'rademacher', draw, probes)
        for draw in range(probes)
      ],
    )
    sensitivity = np.sqrt(np.mean([_flat(d) ** 2 for d in derivatives], axis=0))
    normal = _flat(stateless_normal_like(weights.trainable, tf.reduce_sum(keys, axis=0), draw=0))
    expected = 0.01 * np.sqrt(sensitivity / sensitivity.mean()) * normal
    np.testing.assert_allclose(sent - clean, expected, atol=1e-3 * np.abs(expected).max())

  def test_each_probe_takes_another_batch_at_the_initial_weights(self):
    model, examples, probes = _model(), _examples(6), 4
    weights = model_weights(model)
    noise = _noise('diagonal', 'per_step', 'region_psnr', 10.0, probes=probes, floor=1e-9)
    dataset = _dataset(examples, batch_size=2)
    sent = _Client(model, noise).sends(dataset)
    clean = _update_in_plain_tf(model, weights, examples, batch_size=2)
    model.set_weights(_in_keras_order(model, weights))
    keys = tf.constant(examples['noise_key'])
    loss_fn = classification_loss(model)
    squared = 0.0
    for probe in range(probes):
      batch = slice(2 * (probe % 3), 2 * (probe % 3) + 2)
      direction = region_noise(tf.ones((2, 8, 8, 1)), keys[batch], 1, 'rademacher', probe, probes)
      _, (derivative,) = gradient_and_derivatives(
        lambda x, batch=batch: loss_fn(examples['y'][batch], model(x, training=True)),
        model.trainable_variables,
        tf.constant(examples['x'][batch]),
        [direction],
      )
      squared += 3 / probes * (_RATE * _flat(derivative)) ** 2
    sensitivity = np.sqrt(squared)
    # sigma_j^2 ~ S_j such that the error times sum_j S_j^2 / sigma_j^2 is the region's energy.
    scale = np.sqrt(0.1 * sensitivity.sum() / (6 * 64))
    normal = _flat(stateless_normal_like(weights.trainable, tf.reduce_sum(keys, axis=0), draw=0))
    expected = scale * np.sqrt(sensitivity) * normal
    np.testing.assert_allclose(sent - clean, expected, atol=1e-3 * np.abs(expected).max())

  @pytest.mark.parametrize('shape', ['diagonal', 'correlated', 'decoy'])
  def test_frozen_and_fresh_keys(self, shape):
    model = _model()
    client = _Client(model, _noise(shape, probes=2), decoys=_public())

    def sent(*args):
      return client.sends(_dataset(_examples(8, *args)))

    frozen = sent()
    np.testing.assert_array_equal(frozen, sent())
    clean = _update_in_plain_tf(model, model_weights(model), _examples())
    first, second, other = (
      sent('client_00', 1) - clean,
      sent('client_00', 2) - clean,
      sent('client_01', 1) - clean,
    )
    for noise in (second, other, frozen - clean):
      assert np.abs(noise - first).max() > 0.1 * np.abs(first).max()

  @pytest.mark.parametrize('sharing', ['aggregate', 'local'])
  def test_batch_norm(self, sharing):
    model = _model('batch')
    weights = model_weights(model)
    noise, none = (_noise('correlated', 'local_training', value=value) for value in (30.0, 0.0))
    dataset = _dataset(_examples())
    plain = np.linalg.norm(_Client(model, none, sharing).sends(dataset))
    output = _one_round(_process(model, noise, sharing), weights, [dataset])
    mean, variance = output.state.global_model_weights.non_trainable
    assert output.metrics['aggregator']['sent_norm'] == pytest.approx(30.0 * plain, rel=0.05)
    if sharing == 'local':
      np.testing.assert_array_equal(mean, weights.non_trainable[0])
      np.testing.assert_array_equal(variance, weights.non_trainable[1])
    else:
      assert np.abs(mean - weights.non_trainable[0]).min() > 0
      assert np.abs(variance - weights.non_trainable[1]).max() > 0.01
      assert variance.min() >= 0

  def test_uniform_weighting(self):
    model = _model()
    process = _process(
      model,
      _noise('correlated'),
      'aggregate',  # Nothing is, as there are no statistics.
      tap=True,
      client_weighting=tff.learning.ClientWeighting.UNIFORM,
    )
    clients = [_dataset(_examples(4)), _dataset(_examples(12, 'client_01'))]
    output = _one_round(process, model_weights(model), clients)
    _, observation = _sent(output)
    np.testing.assert_array_equal(observation['weights'], [1.0, 1.0])
    mean = np.mean([_sent(output, k)[0] for k in (0, 1)], axis=0)
    np.testing.assert_allclose(_flat(observation['aggregate']), mean, atol=1e-6)

  def test_dropped_client_and_missing_regions_are_counted(self):
    model = _model()
    bad, blank, good = _examples(), _examples(), _examples()
    bad['x'][3, 2, 2] = np.nan
    blank['region'][5:] = 0.0
    process = _process(model, _noise('correlated', saliency=_GIVEN), tap=True)
    datasets = [_dataset(e, ('x', 'y', 'noise_key', 'region')) for e in (bad, blank, good)]
    output = _one_round(process, model_weights(model), datasets)
    metrics = output.metrics['client_work']
    np.testing.assert_array_equal(metrics['non_finite'], [1, 0, 0])
    assert metrics['maps_fell_back'] == 3
    assert metrics['train']['num_examples'] == 16
    sent, observation = _sent(output)
    np.testing.assert_array_equal(sent, 0.0)
    np.testing.assert_array_equal(observation['weights'], [0.0, 8.0, 8.0])
    assert np.isfinite(_flat(output.state.global_model_weights.trainable)).all()

  def test_region_psnr_does_not_depend_on_local_epochs(self):
    # At a tiny learning rate two epochs send twice the update: the noise must double too.
    rate, noises = 1e-4, []
    for epochs in (1, 2):
      model = _model()
      noise = _noise('diagonal', kind='region_psnr', value=20.0, probes=2, local_epochs=epochs)
      optimizer = tff.learning.optimizers.build_sgdm(rate)
      client = _Client(model, noise, optimizer=optimizer)
      datasets = [_dataset(_examples(4, f'client_{k}')).repeat(epochs) for k in range(12)]
      sent = np.array([client.sends(dataset) for dataset in datasets])
      # Of the same images, only the keys differ.
      clean = _update_in_plain_tf(model, model_weights(model), _examples(4)) * epochs * rate / _RATE
      noises.append(np.mean(np.linalg.norm(sent - clean, axis=1)) / np.linalg.norm(clean))
    # Another key, the sum over batches, so equal but for chance; a region counted twice would give
    # 0.71.
    assert noises[1] == pytest.approx(noises[0], rel=0.15)

  def test_map_of_the_shadow(self):
    # Grad-CAM++ needs a net whose scores are not lost: the class's logit, at the last convolution.
    model = _model()
    process = _process(model, _noise('correlated', saliency=SaliencyConfig()), tap=True)
    output = _one_round(process, model_weights(model), [_dataset(_examples())])
    sent, _ = _sent(output)
    clean = _update_in_plain_tf(model, model_weights(model), _examples())
    assert np.linalg.norm(sent - clean) == pytest.approx(0.3 * np.linalg.norm(clean), rel=0.1)
    assert output.metrics['client_work']['maps_fell_back'] < 8

  def test_the_shadow_has_the_statistics_of_the_client_where_these_stay_there(self):
    examples = _examples(num_examples=7)
    model = _model('batch')
    client = _Client(model, _noise('correlated', saliency=SaliencyConfig()))
    client.result(_dataset(examples))
    layer = client._work._shadow.get_layer('bn')
    seen = [
      tf.nn.moments(model.get_layer('conv')(examples['x'][part]), [0, 1, 2])
      for part in (slice(4), slice(4, 7))
    ]
    mean, variance = (np.average(own, axis=0, weights=[4, 3]) for own in zip(*seen, strict=True))
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-4)
    # Frozen ones are as they were given.
    freeze_batch_norm(model)
    client = _Client(model, _noise('correlated', saliency=SaliencyConfig()), 'frozen')
    client.result(_dataset(examples))
    np.testing.assert_array_equal(client._work._shadow.get_layer('bn').moving_mean, np.zeros(3))

  def test_weights_of_frozen_layers_stay_and_have_no_noise(self):
    model = _model('batch')
    model.get_layer('conv').trainable = False
    noise = _noise('isotropic', value=1.0)
    process = _process(model, noise, 'aggregate', tap=True)
    weights = model_weights(model)
    output = _one_round(process, weights, [_dataset(_examples())])
    # A kernel and a bias, which are frozen, come before the statistics.
    kernel, bias, mean, _ = output.state.global_model_weights.non_trainable
    np.testing.assert_array_equal(kernel, weights.non_trainable[0])
    np.testing.assert_array_equal(bias, weights.non_trainable[1])
    assert np.abs(mean - weights.non_trainable[2]).min() > 0
    _, observed = _sent(output)
    assert [t.shape[1:] for t in observed['updates']['non_trainable']] == [(3,), (3,)]

  def test_a_frozen_backbone_takes_none_of_the_noise(self):
    model = _model()
    model.get_layer('conv').trainable = False
    clean, noised = (
      _Client(model, _noise('isotropic', value=value), 'aggregate').sends(_dataset(_examples()))
      for value in (0.0, 1.0)
    )
    assert len(clean) == sum(tf.size(v) for v in model.trainable_variables)
    assert np.linalg.norm(noised - clean) == pytest.approx(np.linalg.norm(clean), rel=0.3)
