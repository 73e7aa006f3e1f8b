"""Fixtures that all tests share."""

import gc
import os
import signal

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# There is a test process for each core, and threads of operations wait busily: a tenth of the time.
os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.data import Examples, FederatedData
from tff_shadow.execution import local_worker_context

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  # Background jobs of a shell script ignore Ctrl-C, and so would the programs that tests interrupt.
  signal.signal(signal.SIGINT, signal.default_int_handler)

# The stock context would start a worker of its own where a test forgets `tff_worker`.
tff.test.set_no_default_context()


def pytest_collection_finish():
  """Full collections walked through all that was imported, for a tenth of the time and more."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope='session')
def tff_worker():
  """One TFF worker for all tests that run computations."""
  with local_worker_context() as worker:
    yield worker


def make_examples(num_examples, seed, image_shape=(8, 8, 1)):
  """Two classes that a small model tells apart: bright above or bright below."""
  rng = np.random.default_rng(seed)
  labels = (np.arange(num_examples) % 2).astype(np.int32)
  images = rng.integers(0, 120, (num_examples, *image_shape))
  half = image_shape[0] // 2
  for image, label in zip(images, labels, strict=True):
    image[half * label : half * label + half] += 100
  regions = np.zeros((num_examples, *image_shape[:2], 1), np.uint8)
  regions[:, :half] = 255
  return Examples(images.astype(np.uint8), labels, regions)


def make_generator(shape=(8, 8, 1), latent=(5,), activation='sigmoid', seed=0):
  """A small Keras model from a latent to an image, as any generator may be."""
  tf.keras.utils.set_random_seed(seed)
  inputs = tf.keras.Input(latent)
  x = tf.keras.layers.Dense(16)(tf.keras.layers.Flatten()(inputs))
  x = tf.keras.layers.BatchNormalization()(x)
  x = tf.keras.layers.Dense(int(np.prod(shape)), activation=activation)(x)
  return tf.keras.Model(inputs, tf.keras.layers.Reshape(shape)(x))


@pytest.fixture
def tiny_data():
  """Three clients with 8, 12 and 16 images of 8 px."""
  return FederatedData(
    name='tiny',
    class_names=('above', 'below'),
    image_shape=(8, 8, 1),
    clients={f'client_{k:02d}': make_examples(8 + 4 * k, k) for k in range(3)},
    validation=make_examples(20, 100),
    test=make_examples(20, 101),
  )
