import numpy as np
import pytest
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.models import (
  MODELS,
  NORMS,
  batch_norm_layers,
  build_model,
  model_from_config,
  model_to_config,
)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('name', sorted(MODELS))
def test_outputs_and_rebuilding(name, norm):
  model = build_model(name, image_shape=(32, 32, 3), num_classes=4, norm=norm, seed=0)
  images = np.random.default_rng(0).random((5, 32, 32, 3)).astype(np.float32)
  logits = model(images, training=True).numpy()
  assert logits.shape == (5, 4)
  # Neither dead nor exploding at the start.
  assert 0.01 < logits.std() < 10
  twin = model_from_config(model_to_config(model))
  twin.set_weights(model.get_weights())
  np.testing.assert_allclose(twin(images), model(images), atol=1e-5)
  assert bool(batch_norm_layers(model)) == (norm == 'batch')


def test_seed_decides_the_weights():
  def weights(seed):
    model = build_model('conv_small', image_shape=(8, 8, 1), num_classes=2, seed=seed)
    return np.concatenate([w.ravel() for w in model.get_weights()])

  np.testing.assert_array_equal(weights(3), weights(3))
  assert not np.allclose(weights(3), weights(4))


def test_resnet18_has_the_parameters_of_the_paper():
  model = build_model('resnet18', image_shape=(224, 224, 3), num_classes=1000, norm='batch', seed=0)
  trainable = sum(int(tf.size(v)) for v in model.trainable_variables)
  assert trainable == 11_689_512


@pytest.mark.parametrize(('name', 'norm'), [('resnet19', 'none'), ('conv_small', 'layer')])
def test_unknown_name_or_norm(name, norm):
  with pytest.raises(UserError, match='use'):
    build_model(name, image_shape=(8, 8, 1), num_classes=2, norm=norm, seed=0)
