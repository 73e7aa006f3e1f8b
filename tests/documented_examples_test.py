"""Runs the Python of README.md and docs/, as one program a page."""

import collections
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from attacks.audit.comparison import defense_names
from tests.conftest import make_examples
from tff_shadow.learning import BaselineDefense
from tff_shadow.observations import read_observation

ROOT = pathlib.Path(__file__).parents[1]
_SHAPE = (8, 8, 1)


def _code(page):
  return re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(), re.M | re.S)


def _keras_model():
  tf.keras.utils.set_random_seed(0)
  inputs = tf.keras.Input(_SHAPE)
  x = tf.keras.layers.Conv2D(4, 3, activation='relu', name='conv')(inputs)
  return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(x)))


def _model_fn():
  return tff.learning.models.from_keras_model(
    _keras_model(),
    tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    collections.OrderedDict(
      x=tf.TensorSpec([None, *_SHAPE], tf.float32), y=tf.TensorSpec([None], tf.int32)
    ),
    metrics=[tf.keras.metrics.SparseCategoricalAccuracy()],
  )


def _dataset(examples):
  return tf.data.Dataset.from_tensor_slices(
    collections.OrderedDict(x=examples.float_images(), y=examples.labels)
  )


@pytest.fixture
def names():
  """What the pages take for given."""
  north, south = make_examples(64, 0), make_examples(80, 1)
  public = make_examples(40, 2)
  return {
    'build_keras_model': _keras_model,
    'model_fn': _model_fn,
    'shadow': _keras_model(),
    'examples': _dataset(north),
    'client_datasets': [_dataset(own).batch(8) for own in (north, south)],
    'images': north.float_images(),
    'labels': north.labels,
    'regions': north.float_regions(),
    'public_images': public.images,
    'public_labels': public.labels,
    'public_regions': public.regions,
  }


def _finite(state):
  return all(np.isfinite(array).all() for array in state.global_model_weights.trainable)


def test_readme_trains_with_decoy_noise(names, tff_worker):
  (code,) = _code('README.md')
  exec(code, names)
  process = names['process']
  state = process.initialize()
  output = process.next(state, [names['client_data']] * 2)
  before = state.global_model_weights.trainable
  assert _finite(output.state)
  assert any(
    not np.array_equal(*pair)
    for pair in zip(before, output.state.global_model_weights.trainable, strict=True)
  )


def test_pipelines_record_a_round_and_train_in_images(names, tff_worker, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  seen, recorded, images = _code('docs/pipelines.md')
  exec(seen, names)
  observation = read_observation(pathlib.Path('runs/own/observations/round_00001'))
  assert [client.client_id for client in observation.clients] == ['north', 'south']
  # Both write the same round.
  pathlib.Path('runs/own').rename('runs/seen')
  exec(recorded, names)
  assert pathlib.Path('runs/own/config.json').is_file()
  exec(images, names)
  process = names['process']
  output = process.next(process.initialize(), [names['client_data']])
  assert _finite(output.state)


def test_a_defence_of_ones_own_is_one():
  names = {}
  (code,) = _code('docs/defences.md')
  exec(code, names)
  defense = names['ClipEntries'](limit=0.01)
  assert isinstance(defense, BaselineDefense)
  (sent,) = defense.sent([tf.constant([-1.0, 0.001, 1.0])], None)
  np.testing.assert_allclose(sent, [-0.01, 0.001, 0.01])
  assert defense_names(defense.public_settings()) == ('clip_entries', 'limit 0.01')
