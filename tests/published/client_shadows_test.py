import dataclasses
import logging
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tests.conftest import make_examples
from tff_shadow.data import FederatedData
from tff_shadow.errors import UserError
from tff_shadow.learning import model_weights
from tff_shadow.models import classification_loss
from tff_shadow.observations import ClientTraining
from tff_shadow.published import ClientShadows, PublishedDefense, PublishedSettings, exposure
from tff_shadow.published.shadow_update import (
  gradient_of_images,
  pseudo_step,
  shadow_loss,
)
from tff_shadow.shadow import SaliencyConfig, build_region_map
from tff_shadow.shadow.latents import LatentFit

_MEAN, _STD = (0.4,), (0.2,)
_FIT = LatentFit(learning_rate=0.05, steps=20)
_TRAINING = ClientTraining('sgd', 0.1, 0.9, 4, 1, None)


def _data(image_shape=(8, 8, 1)):
  return FederatedData(
    name='tiny',
    class_names=('above', 'below'),
    image_shape=image_shape,
    clients={f'client_{k}': make_examples(n, k, image_shape) for k, n in enumerate((6, 5))},
    validation=make_examples(4, 100, image_shape),
    test=make_examples(4, 101, image_shape),
  )


def _generator(seed=3):
  """Any Keras model from a latent to an image will do."""
  tf.keras.utils.set_random_seed(seed)
  return tf.keras.Sequential(
    [
      tf.keras.Input((6,)),
      tf.keras.layers.Dense(7, activation='tanh', name='mapping'),
      tf.keras.layers.Dense(64, activation='sigmoid'),
      tf.keras.layers.Reshape((8, 8, 1)),
    ]
  )


def _model():
  tf.keras.utils.set_random_seed(4)
  return tf.keras.Sequential(
    [
      tf.keras.Input((8, 8, 1)),
      tf.keras.layers.Conv2D(4, 3, activation='softplus'),
      tf.keras.layers.BatchNormalization(),
      tf.keras.layers.Flatten(),
      tf.keras.layers.Dense(2),
    ]
  )


def _defense(**changes):
  settings = PublishedSettings(**{'latents': _FIT, 'shadow_rounds': 2, **changes})
  secrets = {'client_0': b'0' * 32, 'client_1': b'1' * 32}
  return PublishedDefense(settings, _generator(), _MEAN, _STD, seed=7, secrets=secrets)


def _shadows(directory, defense=None, *, data=None, model=None, sharing='aggregate', rounds=10):
  return ClientShadows(
    defense or _defense(),
    data or _data(),
    model or _model(),
    rounds,
    sharing,
    directory,
  )


_ORDER = np.array([3, 0, 5, 1, 2, 4])


def _prepare(shadows, round_num, client_id='client_0', order=_ORDER):
  images, figures = shadows.prepare(client_id, order, _TRAINING, model_weights(_model()), round_num)
  shadows.commit()
  return images, figures


def _reference(settings, latents, rounds, data, generator):
  """The method's text once more, eagerly: the images of `client_0` in rounds 1.. ."""
  examples = data.clients['client_0']
  x = examples.float_images().astype(np.float32)
  y = examples.labels
  global_model = _model()
  region_map = build_region_map(SaliencyConfig(target=1, linear_output=True), global_model)
  variables = generator.trainable_variables[2:]
  momentum_map, result = {}, []
  for t in range(len(rounds)):
    local = _model()
    loss_fn = classification_loss(local)
    velocity = [np.zeros(v.shape) for v in local.trainable_variables]
    noised = []
    for batch in (_ORDER[:4], _ORDER[4:]):
      pixels, labels, z = tf.constant(x[batch]), y[batch], tf.constant(latents[batch])
      images = (pixels - _MEAN) / _STD
      if t < settings.shadow_rounds:
        before = [v.numpy() for v in variables]
        target = pseudo_step(local, pixels, labels, loss_fn)
        adam = tf.keras.optimizers.legacy.Adam(1e-3, epsilon=1e-8)
        for _ in range(5):
          with tf.GradientTape() as tape:
            drawn = generator(z)
            gradient, statistics = gradient_of_images(global_model, drawn, labels, loss_fn)
            loss = shadow_loss(
              (drawn - _MEAN) / _STD, images, gradient, statistics, target, settings
            )
          adam.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        maps = exposure.exposure_map((generator(z) - _MEAN) / _STD, images).numpy()
        for i, index in enumerate(batch):
          old = momentum_map.get(index)
          momentum_map[index] = maps[i] if old is None else 0.1 * old + 0.9 * maps[i]
        for variable, old in zip(variables, before, strict=True):
          variable.assign(0.5 * variable + 0.5 * old)
      else:
        maps = np.stack([momentum_map[index] for index in batch])
      cam = region_map(pixels, labels).maps.numpy()
      low, high = cam.min(axis=(1, 2, 3), keepdims=True), cam.max(axis=(1, 2, 3), keepdims=True)
      alpha = min(0.5, max(0.1, t / 10))
      noise = exposure.subtract_cam(tf.constant(maps), (cam - low) / (high - low), alpha).numpy()
      peak = noise.max(axis=(1, 2, 3), keepdims=True)
      brightest = images.numpy().max(axis=(1, 2, 3), keepdims=True)
      noise = np.abs(brightest / peak * 0.19 * np.exp(t / 10)) * noise
      noised.append(x[batch] + noise * _STD)
      with tf.GradientTape() as tape:
        loss = loss_fn(labels, local(noised[-1], training=True))
      for k, (variable, g) in enumerate(
        zip(local.trainable_variables, tape.gradient(loss, local.trainable_variables), strict=True)
      ):
        velocity[k] = 0.9 * velocity[k] + g.numpy()
        variable.assign_sub(0.1 * velocity[k])
    result.append(np.concatenate(noised))
  return result


def test_rounds_equal_the_method_done_eagerly(tmp_path):
  defense, data = _defense(), _data()
  shadows = _shadows(tmp_path, defense, data=data)
  shadows.fit_latents()
  found = [_prepare(shadows, round_num)[0] for round_num in (1, 2, 3)]
  expected = _reference(defense.settings, shadows._latents['client_0'], found, data, _generator())
  for ours, theirs in zip(found, expected, strict=True):
    # Ranks turn rounding into a level here and there, a level is 5 % of a pixel's noise.
    np.testing.assert_allclose(ours, theirs, atol=0.08 * 0.19 * 0.2 * 3)
    assert np.mean(np.abs(ours - theirs) > 1e-4) < 0.2


def test_shadow_learns_the_images(tmp_path):
  shadows = _shadows(tmp_path, _defense(shadow_rounds=20, shadow_learning_rate=0.02))
  shadows.fit_latents()
  psnr = [_prepare(shadows, 1)[1]['shadow/psnr'] for _ in range(6)]
  assert psnr[-1] > psnr[0] + 0.5


def test_maps_stay_after_the_last_shadow_round(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.fit_latents()
  _prepare(shadows, 1)
  maps = shadows._states['client_0'].maps.copy()
  late, figures = _prepare(shadows, 3)
  assert 'shadow/psnr' not in figures
  np.testing.assert_array_equal(shadows._states['client_0'].maps, maps)
  # Another order, the same noise for each image.
  again, _ = _prepare(shadows, 3, order=_ORDER[::-1])
  np.testing.assert_allclose(again[::-1], late, atol=1e-6)
  # The amplitude grows with the round.
  assert _prepare(shadows, 9)[1]['noise/image_rms'] > figures['noise/image_rms']


def test_a_client_that_comes_late_gets_maps(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.fit_latents()
  images, _ = _prepare(shadows, 5, order=_ORDER[:4])
  assert shadows._states['client_0'].has_map.tolist() == [True, True, False, True, False, True]
  assert np.abs(images - _data().clients['client_0'].float_images()[_ORDER[:4]]).max() > 0.01
  np.testing.assert_allclose(_prepare(shadows, 5, order=_ORDER[:4])[0], images, atol=1e-6)


def test_a_round_that_failed_leaves_nothing(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.fit_latents()
  shadows.prepare('client_0', _ORDER, _TRAINING, model_weights(_model()), 1)
  assert not shadows._states['client_0'].has_map.any()
  shadows.save(0)
  other = _shadows(tmp_path)
  other.fit_latents()
  other.load(0)
  np.testing.assert_allclose(_prepare(other, 1)[0], _prepare(shadows, 1)[0], atol=1e-6)


def test_saved_state_goes_on(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.fit_latents()
  for client_id, order in (('client_0', _ORDER), ('client_1', np.arange(5))):
    _prepare(shadows, 1, client_id, order)
  shadows.save(1)
  expected = _prepare(shadows, 2)[0]
  other = _shadows(tmp_path)
  other.load(1)
  other.fit_latents()
  np.testing.assert_allclose(_prepare(other, 2)[0], expected, atol=1e-6)


def test_client_state_that_is_gone_is_told(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.save(0)
  shutil.rmtree(tmp_path / 'round_00000')
  with pytest.raises(UserError, match=r'client_000.*kept after round 0 is gone'):
    shadows.load(0)


def test_latents_of_another_run_are_taken_and_missing_ones_fitted(tmp_path, caplog):
  first = _shadows(tmp_path / 'a')
  first.fit_latents()
  data = _data()
  clients = dict(data.clients)
  clients['client_1'] = make_examples(7, 55)
  defense = dataclasses.replace(_defense(), known_latents=tmp_path / 'a')
  second = _shadows(tmp_path / 'b', defense, data=dataclasses.replace(data, clients=clients))
  with caplog.at_level(logging.WARNING):
    second.fit_latents()
  np.testing.assert_array_equal(second._latents['client_0'], first._latents['client_0'])
  assert second._latents['client_1'].shape == (7, 6)
  assert 'client_1: fitting the latents of 7 images' in caplog.text
  assert 'client_0' not in caplog.text


def test_latents_of_another_generator_are_refused(tmp_path):
  _shadows(tmp_path).fit_latents()
  other = dataclasses.replace(_defense(), generator=_generator(seed=9))
  with pytest.raises(UserError, match='fitted with another generator'):
    _shadows(tmp_path, other).fit_latents()


def test_ablations_change_what_they_name(tmp_path):
  kinds = {
    'published': {},
    'without Grad-CAM++': {'subtract_cam': False},
    'without equalisation': {'equalization': 'none'},
    'without shadow update': {'update_shadow': False},
    'white': {'map_kind': 'white'},
  }
  noise = {}
  for name, change in kinds.items():
    shadows = _shadows(tmp_path / name, _defense(**change))
    shadows.fit_latents()
    images, _ = _prepare(shadows, 1)
    noise[name] = images - _data().clients['client_0'].float_images()[_ORDER]
  published = noise.pop('published')
  for other in noise.values():
    assert np.abs(other - published).max() > 1e-4
  # Energy is taken where the noise is scaled, in standardised pixels, here in all channels alike.
  np.testing.assert_allclose(
    np.linalg.norm(noise['white'].reshape(6, -1), axis=1),
    np.linalg.norm(published.reshape(6, -1), axis=1),
    rtol=1e-4,
  )
  # Grad-CAM++ takes a little off everywhere, no more.
  assert (noise['white'] < -0.004).mean() > 0.2
  assert published.min() > -0.004


def test_noise_that_is_not_finite_ends_the_round(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.fit_latents()
  weights = model_weights(_model())
  weights.trainable[0][0] = np.nan
  with pytest.raises(UserError, match='round 1: the noise of client_0 is not finite'):
    shadows.prepare('client_0', _ORDER, _TRAINING, weights, 1)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'sharing': 'local'}, 'batch_norm_sharing must be aggregate or frozen'),
    ({'data': _data((16, 16, 1))}, 'gives images of shape'),
    ({'data': _data((8, 8, 3))}, 'gives images of shape'),
    ({'defense': _defense(cam_class=2)}, r'published_cam_class=2.*classes 0 to 1'),
  ],
)
def test_what_does_not_fit_is_told(tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    _shadows(tmp_path, **arguments)


def test_public_settings_hold_no_secret_and_no_shadow():
  public = _defense().public_settings()
  assert public['name'] == 'published'
  assert public['amplitude'] == 0.19
  assert not any(isinstance(v, (bytes, tf.keras.Model)) for v in tff.structure.flatten(public) if v)


def test_cost_of_the_steps_changes_nothing(tmp_path):
  shadows = _shadows(tmp_path)
  shadows.fit_latents()
  _prepare(shadows, 1)
  seconds = shadows.step_seconds('client_0', 4, repeats=1)
  assert set(seconds) == {
    'pseudo_step',
    'shadow_update',
    'exposure',
    'grad_cam',
    'noise',
    'gradient',
  }
  assert all(value > 0 for value in seconds.values())
  # Six maps and latents, and the weights of the shadow's last layer.
  assert shadows.state_bytes('client_0') == 6 * (64 * 4 + 6 * 4 + 1) + (7 + 1) * 64 * 4
  other = _shadows(tmp_path / 'other')
  other.fit_latents()
  _prepare(other, 1)
  np.testing.assert_allclose(_prepare(shadows, 2)[0], _prepare(other, 2)[0], atol=1e-6)
