import collections
import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
import tf_keras_vis.gradcam
import tf_keras_vis.saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tf_keras_vis.gradcam_plus_plus import GradcamPlusPlus
from tf_keras_vis.layercam import Layercam
from tf_keras_vis.utils.model_modifiers import ReplaceToLinear

from tff_shadow.errors import UserError
from tff_shadow.learning.keras_task import restore_eager_keras
from tff_shadow.models import build_model, model_from_config, model_to_config
from tff_shadow.shadow import (
  KINDS,
  SaliencyConfig,
  add_region_maps,
  build_region_map,
  build_score_fn,
  maps_from_scores,
  soft_top_fraction,
)

_LIBRARY_CAMS = {
  'gradcam': tf_keras_vis.gradcam.Gradcam,
  'gradcam_pp': GradcamPlusPlus,
  'layercam': Layercam,
}
_COMPUTED = (*_LIBRARY_CAMS, 'saliency', 'smoothgrad')
_SHAPE = (16, 16, 1)


def _batch(shape, size=5, seed=0, num_classes=3):
  rng = np.random.default_rng(seed)
  images = rng.random((size, *shape)).astype(np.float32)
  return images, rng.integers(0, num_classes, size).astype(np.int32)


def _model(shape=_SHAPE, norm='none', seed=0, name='conv_small'):
  model = build_model(name, image_shape=shape, num_classes=3, norm=norm, seed=seed)
  rng = np.random.default_rng(seed)
  # BatchNorm statistics and biases off their initial zeros and ones.
  weights = model.get_weights()
  model.set_weights([w + 0.1 * rng.random(w.shape) if w.ndim == 1 else w for w in weights])
  return model


def _softmax_model(shape=_SHAPE):
  inputs = tf.keras.Input(shape)
  x = tf.keras.layers.Conv2D(6, 3, activation='relu')(inputs)
  x = tf.keras.layers.GlobalAveragePooling2D()(x)
  return tf.keras.Model(inputs, tf.keras.layers.Dense(3, activation='softmax')(x))


def _library_scores(kind, model, images, labels, model_modifier=None, **kwargs):
  """The library's own eager result for the labels' classes, without its scaling."""

  def score(outputs):
    return tf.gather(outputs, labels, axis=1, batch_dims=1)

  if kind in _LIBRARY_CAMS:
    library = _LIBRARY_CAMS[kind](model, model_modifier)
    return np.asarray(library(score, images, expand_cam=False, normalize_cam=False, **kwargs))
  library = tf_keras_vis.saliency.Saliency(model, model_modifier)
  return np.asarray(library(score, images, normalize_map=False, **kwargs))


def _scores(config, model, images, labels, score_of=None):
  """Ours; Grad-CAM++ in the library's scale, which has the factor exp(score)."""
  scores = build_score_fn(config, model)(tf.constant(images), tf.constant(labels)).numpy()[..., 0]
  if config.kind == 'gradcam_pp':
    outputs = (score_of or model)(images).numpy()
    scores = scores * np.exp(outputs[np.arange(len(labels)), labels])[:, None, None]
  return scores


def _assert_close(actual, wanted):
  assert wanted.max() > 0
  np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * min(1.0, wanted.max()))


class TestEqualToTheLibrary:
  @pytest.mark.parametrize('kind', [*_LIBRARY_CAMS, 'saliency'])
  @pytest.mark.parametrize(
    ('shape', 'norm'),
    [
      ((32, 32, 1), 'none'),
      ((17, 24, 3), 'batch'),
      ((16, 16, 3), 'group'),
    ],
  )
  def test_random_nets(self, kind, shape, norm):
    for seed in range(2):
      model = _model(shape, norm, seed)
      images, labels = _batch(shape, seed=seed)
      actual = _scores(SaliencyConfig(kind=kind), model, images, labels)
      _assert_close(actual, _library_scores(kind, model, images, labels))

  def test_resnet(self):
    model = _model(norm='batch', name='resnet18')
    images, labels = _batch(_SHAPE, 2)
    actual = _scores(SaliencyConfig(), model, images, labels)
    _assert_close(actual, _library_scores('gradcam_pp', model, images, labels))

  @pytest.mark.parametrize('kind', _LIBRARY_CAMS)
  def test_layer_by_name(self, kind):
    model = _model()
    images, labels = _batch(_SHAPE)
    actual = _scores(SaliencyConfig(kind=kind, layer='conv1'), model, images, labels)
    _assert_close(actual, _library_scores(kind, model, images, labels, penultimate_layer='conv1'))

  def test_smoothgrad_without_noisy_copies(self):
    model = _model((16, 16, 3))
    images, labels = _batch((16, 16, 3))
    config = SaliencyConfig(kind='smoothgrad', smooth_samples=0)
    _assert_close(
      _scores(config, model, images, labels), _library_scores('saliency', model, images, labels)
    )

  def test_smoothgrad_with_the_same_noise(self, monkeypatch):
    shape, samples = (16, 16, 3), 3
    model = _model(shape)
    images, labels = _batch(shape)
    noise = np.stack(
      [tf.random.stateless_normal(shape, [7, i], alg='philox').numpy() for i in range(samples)]
    )
    monkeypatch.setattr(
      tf_keras_vis.saliency.np.random, 'normal', lambda _, sigma, size: sigma * noise[:, None]
    )
    wanted = _library_scores(
      'saliency', model, images, labels, smooth_samples=samples, smooth_noise=0.3
    )
    config = SaliencyConfig(kind='smoothgrad', smooth_samples=samples, smooth_noise=0.3, seed=7)
    _assert_close(_scores(config, model, images, labels), wanted)

  @pytest.mark.parametrize('kind', [*_LIBRARY_CAMS, 'saliency'])
  def test_softmax_at_the_end(self, kind):
    model = _softmax_model()
    images, labels = _batch(_SHAPE)
    config = SaliencyConfig(kind=kind)
    probability = _scores(config, model, images, labels)
    _assert_close(probability, _library_scores(kind, model, images, labels))
    linear = tf.keras.models.clone_model(model)
    linear.set_weights(model.get_weights())
    ReplaceToLinear()(linear)
    config = dataclasses.replace(config, linear_output=True)
    logit = _scores(config, model, images, labels, score_of=linear)
    _assert_close(logit, _library_scores(kind, model, images, labels, ReplaceToLinear()))
    assert not np.allclose(logit, probability, rtol=1e-2, atol=0)

  def test_predicted_and_fixed_class(self):
    model = _model()
    images, labels = _batch(_SHAPE)
    predicted = np.argmax(model(images), axis=-1).astype(np.int32)
    for target, classes in (('predicted', predicted), (2, np.full_like(labels, 2))):
      config = SaliencyConfig(kind='gradcam', target=target)
      _assert_close(
        _scores(config, model, images, labels), _library_scores('gradcam', model, images, classes)
      )


class TestModels:
  def _parts(self, inner_softmax, head_conv):
    inputs = tf.keras.Input(_SHAPE)
    x = tf.keras.layers.Conv2D(4, 3, name='conv', activation='relu')(inputs)
    x = tf.keras.layers.Add()([x, tf.keras.layers.Conv2D(4, 3, padding='same', name='twig')(x)])
    backbone = tf.keras.Model(inputs, x, name='backbone')
    activation = 'softmax' if inner_softmax else None
    head = tf.keras.Sequential(
      [
        tf.keras.Input(x.shape[1:]),
        tf.keras.layers.Conv2D(5, 3, name=head_conv),
        tf.keras.layers.GlobalAveragePooling2D(),
        tf.keras.layers.Dense(3, activation=activation),
      ],
      name='head',
    )
    return backbone, head

  def _nested_and_flat(self, inner_softmax=False):
    backbone, head = self._parts(inner_softmax, 'head_conv')
    inputs = tf.keras.Input(_SHAPE)
    nested = tf.keras.Model(inputs, head(backbone(1.0 - inputs * 2.0)))
    x = flat_inputs = tf.keras.Input(_SHAPE)
    x = 1.0 - x * 2.0
    conv, twig, add = backbone.layers[1:]
    x = conv(x)
    x = add([x, twig(x)])
    for layer in head.layers:
      x = layer(x)
    flat = tf.keras.Model(flat_inputs, x)
    return nested, flat

  @pytest.mark.parametrize('kind', ['gradcam_pp', 'saliency'])
  def test_nested_model_is_laid_open(self, kind):
    nested, flat = self._nested_and_flat()
    images, labels = _batch(_SHAPE)
    np.testing.assert_allclose(nested(images), flat(images), atol=1e-6)
    config = SaliencyConfig(kind=kind)
    _assert_close(
      build_score_fn(config, nested)(images, labels).numpy(),
      build_score_fn(config, flat)(images, labels).numpy(),
    )

  def test_last_layer_is_in_the_last_nested_model(self):
    nested, _ = self._nested_and_flat()
    images, labels = _batch(_SHAPE)
    assert build_score_fn(SaliencyConfig(), nested)(images, labels).shape == (5, 12, 12, 1)
    config = SaliencyConfig(layer='twig')
    assert build_score_fn(config, nested)(images, labels).shape == (5, 14, 14, 1)

  def test_name_in_two_nested_models(self):
    backbone, head = self._parts(False, 'conv')
    inputs = tf.keras.Input(_SHAPE)
    nested = tf.keras.Model(inputs, head(backbone(inputs)))
    images, labels = _batch(_SHAPE)
    assert build_score_fn(SaliencyConfig(), nested)(images, labels).shape == (5, 12, 12, 1)
    with pytest.raises(UserError, match=r'2 layers .* have this name'):
      build_score_fn(SaliencyConfig(layer='conv'), nested)

  def test_softmax_inside_a_nested_model(self):
    nested, flat = self._nested_and_flat(inner_softmax=True)
    images, labels = _batch(_SHAPE)
    config = SaliencyConfig(kind='saliency', linear_output=True)
    wanted = _library_scores('saliency', flat, images, labels, ReplaceToLinear())
    _assert_close(build_score_fn(config, nested)(images, labels).numpy()[..., 0], wanted)

  def test_softmax_called_as_an_op(self):
    inputs = tf.keras.Input(_SHAPE)
    features = tf.keras.layers.GlobalAveragePooling2D()(tf.keras.layers.Conv2D(6, 3)(inputs))
    logits = tf.keras.layers.Dense(3)(features)
    images, labels = _batch(_SHAPE)
    config = SaliencyConfig(kind='saliency', linear_output=True)
    wanted = build_score_fn(config, tf.keras.Model(inputs, logits))(images, labels).numpy()
    model = tf.keras.Model(inputs, tf.nn.softmax(logits, axis=-1))
    _assert_close(build_score_fn(config, model)(images, labels).numpy(), wanted)

  @pytest.mark.parametrize('kind', ['gradcam_pp', 'smoothgrad'])
  def test_model_is_not_changed(self, kind):
    model = _softmax_model()
    images, labels = _batch(_SHAPE)

    def state():
      nodes = [len(layer.inbound_nodes) for layer in model.layers]
      return model(images).numpy(), nodes, model_to_config(model), len(model.variables)

    before = state()
    config = SaliencyConfig(kind=kind, linear_output=True)
    build_region_map(config, model)(images, labels)
    after = state()
    np.testing.assert_array_equal(after[0], before[0])
    assert after[1:] == before[1:]

  @pytest.mark.parametrize('kind', ['gradcam_pp', 'smoothgrad'])
  def test_map_follows_the_weights(self, kind):
    images, labels = _batch(_SHAPE)
    config = SaliencyConfig(kind=kind)
    model, other = _model(seed=0), _model(seed=1)
    region_map = build_region_map(config, model)
    first = region_map(images, labels).maps
    model.set_weights(other.get_weights())
    second = region_map(images, labels).maps
    assert np.abs(first - second).max() > 0.1
    wanted = build_region_map(config, other)(images, labels).maps
    np.testing.assert_allclose(second, wanted, atol=1e-6)


def _worker_maps(config, model, batches, regions=None, restore=True):
  """Runs the region map on the TFF worker, with the weights sent to it as in training."""
  architecture = model_to_config(model)
  weights = model.get_weights()
  shape = model.input_shape
  types = (
    [tff.types.TensorType(w.dtype, w.shape) for w in weights],
    tff.types.TensorType(np.float32, shape),
    tff.types.TensorType(np.int32, (None,)),
    tff.types.TensorType(np.float32, (*shape[:3], 1)),
  )

  @tff.tensorflow.computation(*types)
  def compute(weights, images, labels, given_regions):
    shadow = model_from_config(architecture)
    region_map = build_region_map(config, shadow)

    @tf.function
    def run(weights, images, labels, given_regions):
      for variable, value in zip(shadow.weights, weights, strict=True):
        variable.assign(value)
      return tuple(region_map(images, labels, given_regions))

    return run(weights, images, labels, given_regions)

  if restore:
    restore_eager_keras(model)
  results = []
  for images, labels in batches:
    given_regions = np.ones((*images.shape[:3], 1), np.float32) if regions is None else regions
    results.append(compute(weights, images, labels, given_regions))
  return results


class TestOnTheWorker:
  @pytest.mark.parametrize(
    ('kind', 'top_fraction'), [*((kind, None) for kind in _COMPUTED), ('gradcam_pp', 0.3)]
  )
  def test_equal_to_eager_at_any_batch_size(self, tff_worker, kind, top_fraction):
    model = _model(norm='batch')
    config = SaliencyConfig(kind=kind, top_fraction=top_fraction, smooth_samples=3)
    batches = [_batch(_SHAPE, size) for size in (1, 4, 7)]
    region_map = build_region_map(config, model)
    eager = [region_map(*batch) for batch in batches]
    worker = _worker_maps(config, model, batches, restore=False)
    for wanted, (maps, fell_back) in zip(eager, worker, strict=True):
      np.testing.assert_allclose(maps, wanted.maps, atol=1e-5)
      np.testing.assert_array_equal(fell_back, wanted.fell_back)
      assert not fell_back.any()
    # The worker's graph has made the model's classes graph classes; the map does not mind.
    again = region_map(*_batch(_SHAPE, 3))
    restore_eager_keras(model)
    assert np.isfinite(again.maps).all()

  def test_given_and_uniform(self, tff_worker):
    model, batch = _model(), _batch(_SHAPE, 4)
    regions = np.random.default_rng(3).random((4, *_SHAPE[:2], 1)).astype(np.float32)
    regions[1] = 0.0
    regions[2, 3, 3] = np.nan
    regions[3, 0, 0] = 1.5
    [(maps, fell_back)] = _worker_maps(SaliencyConfig(kind='given'), model, [batch], regions)
    np.testing.assert_array_equal(maps[0], regions[0])
    np.testing.assert_array_equal(maps[1:], 1.0)
    np.testing.assert_array_equal(fell_back, [False, True, True, True])
    [(maps, fell_back)] = _worker_maps(SaliencyConfig(kind='uniform'), model, [batch])
    np.testing.assert_array_equal(maps, np.ones((4, *_SHAPE[:2], 1)))
    assert not fell_back.any()

  def test_added_to_the_examples_of_a_data_set(self):
    model, (images, labels) = _model(), _batch(_SHAPE, 4)
    images[2, 0, 0] = np.nan
    region_map = build_region_map(SaliencyConfig(), model)
    examples = tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=images, y=labels))
    added = list(add_region_maps(examples, region_map).as_numpy_iterator())
    assert [list(example) for example in added] == [['x', 'y', 'region']] * 4
    found = np.stack([example['region'] for example in added])
    np.testing.assert_allclose(found, region_map(images, labels).maps, atol=1e-5)
    np.testing.assert_array_equal(found[2], 1.0)

  def test_broken_images_and_labels_fall_back_alone(self, tff_worker):
    model = _model()
    images, labels = _batch(_SHAPE, 4)
    images[1, 2, 2] = np.nan
    images[2, 0, 0] = np.inf
    labels[3] = 7
    for kind in _COMPUTED:
      [(maps, fell_back)] = _worker_maps(SaliencyConfig(kind=kind), model, [(images, labels)])
      assert np.isfinite(maps).all()
      np.testing.assert_array_equal(fell_back, [False, True, True, True])
      np.testing.assert_array_equal(maps[1:], 1.0)
      assert maps[0].min() < 0.9

  def test_why_the_librarys_grad_cam_pp_is_nan_inside_tff(self, tff_worker):
    """Its guard against 0/0 is `tensor == 0.0`, which compares objects in TFF's graphs."""

    @tff.tensorflow.computation(tff.types.TensorType(np.float32, (2,)))
    def guard(second_derivative):
      return tf.cast((second_derivative == 0.0), tf.float32)

    assert np.sum(guard(np.zeros(2, np.float32))) == 0.0
    np.testing.assert_array_equal(tf.cast((tf.zeros(2) == 0.0), tf.float32), 1.0)

    model = _model()
    architecture = model_to_config(model)
    images, labels = _batch(_SHAPE, 3)
    eager = _library_scores('gradcam_pp', model, images, labels)
    ours = build_region_map(SaliencyConfig(), model)(images, labels)

    @tff.tensorflow.computation(tff.types.TensorType(np.float32, images.shape))
    def library(images):
      shadow = model_from_config(architecture)
      return GradcamPlusPlus(shadow)(
        lambda outputs: outputs[:, 0], images, expand_cam=False, normalize_cam=False
      )

    restore_eager_keras(model)
    assert np.isfinite(eager).all()
    assert np.isnan(library(images)).all()
    [(maps, fell_back)] = _worker_maps(SaliencyConfig(), model, [(images, labels)])
    assert not fell_back.any()
    np.testing.assert_allclose(maps, ours.maps, atol=1e-5)

  def test_tiny_gradients(self, tff_worker):
    """Where g² is denormal or zero the map does not depend on who flushes denormals."""
    model = _model()
    weights = model.get_weights()
    weights[-2] *= 1e-20
    model.set_weights(weights)
    images, labels = _batch(_SHAPE, 4)
    wanted = build_region_map(SaliencyConfig(), model)(images, labels)
    [(maps, fell_back)] = _worker_maps(SaliencyConfig(), model, [(images, labels)])
    assert not fell_back.any()
    np.testing.assert_allclose(maps, wanted.maps, atol=1e-5)


class TestFallBack:
  def test_large_scores_do_not_overflow(self):
    model = _model()
    images, labels = _batch(_SHAPE)
    wanted = build_region_map(SaliencyConfig(), model)(images, labels)
    model.layers[-1].bias.assign_add([200.0] * 3)
    assert np.isnan(_library_scores('gradcam_pp', model, images, labels)).any()
    actual = build_region_map(SaliencyConfig(), model)(images, labels)
    np.testing.assert_allclose(actual.maps, wanted.maps, atol=1e-5)

  @pytest.mark.parametrize('value', [0.0, np.nan])
  @pytest.mark.parametrize('kind', _COMPUTED)
  def test_weights_without_a_map(self, kind, value):
    model = _model()
    model.set_weights([np.full_like(w, value) for w in model.get_weights()])
    for top_fraction in (None, 0.2):
      config = SaliencyConfig(kind=kind, top_fraction=top_fraction)
      result = build_region_map(config, model)(*_batch(_SHAPE))
      np.testing.assert_array_equal(result.maps, np.ones((5, 16, 16, 1)))
      assert np.all(result.fell_back)

  def test_scores(self):
    good = np.linspace(0, 3e-5, 16, dtype=np.float32).reshape(4, 4, 1)
    nan, inf, denormal = good.copy(), good.copy(), np.full_like(good, 1e-41)
    nan[1, 1] = np.nan
    inf[2, 2] = np.inf
    scores = np.stack([good, nan, inf, 0 * good, denormal])
    for top_fraction in (None, 0.25):
      maps, fell_back = maps_from_scores(scores, (8, 8), top_fraction=top_fraction)
      np.testing.assert_array_equal(fell_back, [False, True, True, True, True])
      np.testing.assert_array_equal(maps[1:], 1.0)
    np.testing.assert_allclose(
      maps_from_scores(scores, (8, 8)).maps[0], tf.image.resize(good, (8, 8)) / 3e-5, atol=1e-6
    )


class TestMaps:
  @pytest.mark.parametrize('kind', _COMPUTED)
  def test_shape_range_and_independence_of_the_batch(self, kind):
    shape = (17, 24, 3)
    model = _model(shape, 'batch')
    images, labels = _batch(shape, 6)
    region_map = build_region_map(SaliencyConfig(kind=kind), model)
    maps, fell_back = region_map(images, labels)
    assert maps.shape == (6, 17, 24, 1)
    assert maps.dtype == tf.float32
    assert not np.any(fell_back)
    assert np.min(maps) >= 0
    np.testing.assert_array_equal(np.max(maps, axis=(1, 2, 3)), 1.0)
    for index in range(6):
      alone = region_map(images[index : index + 1], labels[index : index + 1])
      np.testing.assert_allclose(alone.maps[0], maps[index], atol=1e-5)

  def test_traced_once(self, monkeypatch):
    traces = []
    original = tf_keras_vis.gradcam.Gradcam._calculate_scores

    def counting(self, *args):
      traces.append(1)
      return original(self, *args)

    monkeypatch.setattr(tf_keras_vis.gradcam.Gradcam, '_calculate_scores', counting)
    region_map = build_region_map(SaliencyConfig(), _model())
    for size, seed in itertools.product((1, 2, 5), range(2)):
      region_map(*_batch(_SHAPE, size, seed))
    assert len(traces) == 1

  def test_smoothgrad_is_decided_by_its_seed(self):
    model, batch = _model(), _batch(_SHAPE)
    first, same, other = (
      build_region_map(SaliencyConfig(kind='smoothgrad', seed=seed), model)(*batch).maps
      for seed in (1, 1, 2**40)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3

  def test_bright_patch_is_found(self):
    """A net that only looks at how bright a pixel is must point at the bright patch."""
    inputs = tf.keras.Input(_SHAPE)
    x = tf.keras.layers.Conv2D(2, 3, padding='same', activation='relu')(inputs)
    outputs = tf.keras.layers.Dense(2)(tf.keras.layers.GlobalAveragePooling2D()(x))
    model = tf.keras.Model(inputs, outputs)
    model.set_weights([np.ones(w.shape) for w in model.get_weights()])
    images = np.zeros((1, *_SHAPE), np.float32)
    images[0, 4:8, 8:12] = 1.0
    for kind in _LIBRARY_CAMS:
      config = SaliencyConfig(kind=kind, top_fraction=1 / 16, softness=0.02)
      maps = build_region_map(config, model)(images, [1]).maps.numpy()
      assert maps[0, 4:8, 8:12].mean() > 0.9
      assert maps.sum() == pytest.approx(16, rel=1e-3)

  @settings(deadline=None, max_examples=20)
  @given(
    hnp.arrays(np.float32, (2, 5, 6, 1), elements=st.floats(0, 1, width=16)),
    st.floats(0.01, 0.99),
    st.floats(0.001, 1.0),
  )
  def test_soft_top_fraction(self, scores, fraction, softness):
    maps = soft_top_fraction(scores, fraction, softness).numpy()
    np.testing.assert_allclose(maps.mean(axis=(1, 2, 3)), fraction, atol=1e-3)
    assert maps.min() >= 0
    assert maps.max() <= 1
    for score, value in zip(scores.reshape(2, -1), maps.reshape(2, -1), strict=True):
      order = np.argsort(score, kind='stable')
      # The same number in another lane of the vector unit may differ in its last bit.
      assert np.all(np.diff(value[order]) >= -1e-6)
      np.testing.assert_allclose(np.diff(value[order])[np.diff(score[order]) == 0], 0, atol=1e-6)


class TestErrors:
  @pytest.mark.parametrize(
    ('settings', 'message'),
    [
      ({'kind': 'grad'}, 'use one of gradcam_pp, gradcam, layercam'),
      ({'kind': 'scorecam'}, r"NumPy, SciPy and Model.predict.* with kind 'given'"),
      ({'kind': 'saliency', 'layer': 'conv1'}, 'uses none'),
      ({'target': 'truth'}, "use 'label', 'predicted' or the index"),
      ({'target': -1}, 'the index of a class'),
      ({'target': True}, 'the index of a class'),
      ({'top_fraction': 0.0}, 'between 0 and 1'),
      ({'top_fraction': 1.0}, 'between 0 and 1'),
      ({'kind': 'given', 'top_fraction': 0.3}, 'used as it is'),
      ({'softness': 0.0}, 'above 0 and at most 1'),
      ({'smooth_samples': -1}, 'at least 0'),
      ({'smooth_noise': float('nan')}, 'at least 0'),
    ],
  )
  def test_config(self, settings, message):
    with pytest.raises(UserError, match=message):
      SaliencyConfig(**settings)

  @pytest.mark.parametrize(
    ('settings', 'message'),
    [
      ({'layer': 'pool'}, 'saliency layer pool: not a convolutional .* conv0, conv1, conv2, conv3'),
      ({'layer': 'none'}, 'conv0, conv1, conv2, conv3'),
      ({'target': 3}, 'has classes 0 to 2'),
    ],
  )
  def test_model_without_it(self, settings, message):
    with pytest.raises(UserError, match=message):
      build_region_map(SaliencyConfig(**settings), _model())

  def test_models_that_do_not_work(self):
    dense = tf.keras.Sequential(
      [tf.keras.Input(_SHAPE), tf.keras.layers.Flatten(), tf.keras.layers.Dense(3)]
    )
    with pytest.raises(UserError, match='has no convolutional layer'):
      build_region_map(SaliencyConfig(), dense)
    assert not np.any(build_region_map(SaliencyConfig(kind='saliency'), dense)(*_batch(_SHAPE))[1])
    with pytest.raises(UserError, match='needs a model'):
      build_region_map(SaliencyConfig())
    inputs = tf.keras.Input(_SHAPE)
    conv = tf.keras.layers.Conv2D(1, 3, padding='same', name='twice')
    x = tf.keras.layers.Flatten()(conv(conv(inputs)))
    shared = tf.keras.Model(inputs, tf.keras.layers.Dense(3)(x))
    with pytest.raises(UserError, match='calls it 2 times'):
      build_region_map(SaliencyConfig(layer='twice'), shared)

  def test_images_and_labels(self):
    region_map = build_region_map(SaliencyConfig(), _model())
    images, labels = _batch(_SHAPE)
    with pytest.raises(UserError, match=r'images of shape \(5, 16, 15, 1\)'):
      region_map(images[:, :, :15], labels)
    labels[2] = 3
    with pytest.raises(UserError, match=r'label 3 of image 2 .* classes 0 to 2'):
      region_map(images, labels)

  def test_given_regions(self):
    region_map = build_region_map(SaliencyConfig(kind='given'))
    images, labels = _batch(_SHAPE)
    regions = np.ones((5, 16, 16, 1), np.float32)
    with pytest.raises(UserError, match='there are no regions'):
      region_map(images, labels)
    for wrong in (regions[:, :8], regions[:4], regions[..., 0], np.repeat(regions, 3, -1)):
      with pytest.raises(UserError, match='regions of shape'):
        region_map(images, labels, wrong)
    for value in (np.nan, -0.1, 1.1):
      wrong = regions.copy()
      wrong[3, 0, 0] = value
      with pytest.raises(UserError, match=r'region of image 3 .* outside'):
        region_map(images, labels, wrong)


def test_kinds():
  assert set(KINDS) == {*_COMPUTED, 'given', 'uniform'}


def test_models_that_it_cannot_explain():
  inputs = tf.keras.Input((8, 8, 1))
  features = tf.keras.layers.Flatten()(tf.keras.layers.Conv2D(3, 3)(inputs))
  two, one = tf.keras.layers.Dense(2)(features), tf.keras.layers.Dense(1)(features)
  with pytest.raises(UserError, match='1 inputs and 2 outputs'):
    build_region_map(SaliencyConfig(), tf.keras.Model(inputs, [two, one]))
  with pytest.raises(UserError, match='a single output, which is no score of a class'):
    build_region_map(SaliencyConfig(), tf.keras.Model(inputs, one))
