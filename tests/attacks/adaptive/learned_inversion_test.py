import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from attacks.adaptive.learned_inversion import (
  InversionSettings,
  LabelReader,
  LearnedInversion,
  _Kinds,
)
from attacks.adaptive.players import build_player
from attacks.adaptive.simulated_updates import flat, inverse_deviations
from attacks.local_steps import local_steps
from attacks.scoring.assignment import in_order
from tests.attacks.adaptive.simulated_defense_test import _defended, _observed, _public
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning import DpSgd, TopK
from tff_shadow.observations import Truth

_QUICK = InversionSettings(clients=24, defended_clients=8, basis_clients=16, steps=4, width=8)
_SIDE = 4


def _linear_model():
  """Without weights of its own yet: the gradient of its kernel is the image, by sign and half."""
  inputs = tf.keras.Input((_SIDE, _SIDE, 1))
  layer = tf.keras.layers.Dense(2, kernel_initializer='zeros')
  return tf.keras.Model(inputs, layer(tf.keras.layers.Flatten()(inputs)))


def _gaussian_images(count, seed):
  """Smooth ones about mid grey, float64 [count, H, W, 1], and their covariance."""
  rows, columns = np.mgrid[:_SIDE, :_SIDE].reshape(2, -1)
  distances = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
  covariance = 0.1**2 * np.exp(-distances / 3)
  rng = np.random.default_rng(seed)
  draws = rng.standard_normal((count, _SIDE**2)) @ np.linalg.cholesky(covariance).T
  return (0.5 + draws).reshape(count, _SIDE, _SIDE, 1), covariance


def _examples(images):
  return Examples(
    np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8),
    np.arange(len(images), dtype=np.int32) % 2,
    np.full((*images.shape[:3], 1), 255, np.uint8),
  )


def _sent(observation, images, labels, seed=1000):
  """What clients of one image each send."""
  player = build_player(observation, False)
  steps = local_steps(observation.clients[0], observation.client_training)
  region = np.ones((1, *images.shape[1:3], 1), np.float32)
  return [
    player.update(Truth(image[None].astype(np.float32), label[None], region), steps, (seed, index))
    for index, (image, label) in enumerate(zip(images, labels, strict=True))
  ]


def _found(learned, rounds, labels):
  """What is learned of clients of one image each, from what they sent in rounds."""
  sent = zip(*rounds, strict=True)
  return np.stack([learned(own, [label])[0] for own, label in zip(sent, labels, strict=True)])


def _attacked_linear_model(defend):
  """What is found behind a defence of fresh images, these, and the images that updates show.

  Args:
    defend: From a round to the same under a defence.
  """
  images, _ = _gaussian_images(2, seed=5)
  observation = play_round(_linear_model(), [(image[None], [k]) for k, image in enumerate(images)])
  defended = defend(observation)
  public, _ = _gaussian_images(800, seed=1)
  learned = LearnedInversion(
    [defended],
    defended.clients[0],
    _examples(public),
    InversionSettings(clients=800, steps=500, width=64),
  )
  fresh, _ = _gaussian_images(150, seed=2)
  labels = np.arange(150, dtype=np.int32) % 2
  sent = _sent(defended, fresh, labels)
  # Of both columns of the kernel's gradient the difference is the image.
  rate = observation.client_training.learning_rate
  signs = np.where(labels == 1, 1, -1)[:, None]
  seen = np.stack([(u.trainable[0][:, 1] - u.trainable[0][:, 0]) / rate for u in sent]) * signs
  return _found(learned, [sent], labels), fresh, seen


def test_meets_the_best_attacker_of_a_linear_model():
  ratio = 0.6
  found, fresh, seen = _attacked_linear_model(
    lambda observation: _defended(observation, 'isotropic', value=ratio)
  )
  _, covariance = _gaussian_images(2, seed=5)
  # The noise's variance follows from the ratio, the norm of the bias's gradient included.
  norms = 0.5 * (np.square(fresh).sum(axis=(1, 2, 3)) + 1)
  variance = 2 * ratio**2 * norms / (2 * _SIDE**2 + 2)
  best = np.stack(
    [
      0.5 + covariance @ np.linalg.solve(covariance + v * np.eye(_SIDE**2), one - 0.5)
      for one, v in zip(seen, variance, strict=True)
    ]
  ).reshape(fresh.shape)
  guess = psnr(np.full_like(fresh, 0.5), fresh)
  assert psnr(best, fresh) > guess + 0.5  # There is something to find.
  assert psnr(found, fresh) == pytest.approx(psnr(best, fresh), abs=0.5)


def test_noise_as_loud_as_the_update_is_long_tells_its_norm():
  # Many entries that show the same: noise hides the image in them, and not how loud it is itself.
  inputs = tf.keras.Input((_SIDE, _SIDE, 1))
  seen = tf.keras.layers.Concatenate()([tf.keras.layers.Flatten()(inputs)] * 64)
  model = tf.keras.Model(inputs, tf.keras.layers.Dense(2, kernel_initializer='zeros')(seen))
  images, _ = _gaussian_images(2, seed=5)
  observation = play_round(model, [(image[None], [k]) for k, image in enumerate(images)])
  public, _ = _gaussian_images(400, seed=1)
  settings = InversionSettings(clients=400, defended_clients=100, steps=300, width=64)
  fresh, _ = _gaussian_images(100, seed=2)
  labels = np.arange(100, dtype=np.int32) % 2
  clean = np.stack([flat(update)[0] for update in _sent(observation, fresh, labels)])
  # As loud on the whole, but the same for all.
  deviation = 10 * np.sqrt(np.mean(np.square(clean)))
  reached = {}
  for kind, value in (('ratio', 10.0), ('scale', deviation)):
    defended = _defended(observation, 'isotropic', kind, value)
    learned = LearnedInversion([defended], defended.clients[0], _examples(public), settings)
    found = _found(learned, [_sent(defended, fresh, labels)], labels)
    reached[kind] = psnr(found, fresh)
  brightness = np.broadcast_to(fresh.mean(axis=(1, 2, 3), keepdims=True), fresh.shape)
  guess = psnr(np.full_like(fresh, 0.5), fresh)
  assert psnr(brightness, fresh) > guess + 2  # It is what the norm tells.
  assert reached['ratio'] > psnr(brightness, fresh) - 0.5
  assert reached['ratio'] > reached['scale'] + 1.5


def test_learns_from_clipped_updates_and_not_as_if_clipping_were_noise():
  limit, multiplier = 0.5, 0.05  # Gradients are about 1.6 long.
  settings = DpSgd(limit, multiplier).public_settings()
  found, fresh, seen = _attacked_linear_model(
    lambda observation: dataclasses.replace(observation, defense=settings)
  )
  # Clipping leaves the gradient's direction, of which a network makes more than the best linear
  # attacker, and one that takes it for noise does not.
  many = _gaussian_images(4000, seed=3)[0].reshape(4000, -1)
  shorter = limit / np.sqrt(0.5 * (np.square(many).sum(axis=1, keepdims=True) + 1))
  assert shorter.max() < 1
  clipped = shorter * many
  covariance = np.cov(clipped.T) + 2 * (limit * multiplier) ** 2 * np.eye(_SIDE**2)
  both = (clipped - clipped.mean(axis=0)).T @ (many - many.mean(axis=0)) / len(many)
  linear = many.mean(axis=0) + (seen - clipped.mean(axis=0)) @ np.linalg.solve(covariance, both)
  linear = linear.reshape(fresh.shape)
  assert psnr(linear, fresh) > psnr(np.full_like(fresh, 0.5), fresh) + 1  # There is something.
  assert psnr(found, fresh) > psnr(linear, fresh) + 0.4


def test_fresh_noise_of_several_rounds_tells_more_than_of_one():
  images, _ = _gaussian_images(2, seed=5)
  observation = play_round(_linear_model(), [(image[None], [k]) for k, image in enumerate(images)])
  defended = _defended(observation, 'isotropic', value=1.0)
  rounds = [
    dataclasses.replace(defended, round_num=k, defense={**defended.defense, 'frozen': False})
    for k in (1, 2, 3, 4)
  ]
  public, _ = _gaussian_images(400, seed=1)
  settings = InversionSettings(clients=300, defended_clients=100, steps=300, width=64)
  fresh, _ = _gaussian_images(60, seed=2)
  labels = np.arange(60, dtype=np.int32) % 2
  sent = [_sent(seen, fresh, labels, seed=seen.round_num) for seen in rounds]
  reached = []
  for count in (1, 4):
    learned = LearnedInversion(rounds[:count], defended.clients[0], _examples(public), settings)
    reached.append(psnr(_found(learned, sent[:count], labels), fresh))
  assert reached[1] > reached[0] + 1


def test_labels_that_are_taken_for_others_mislead_only_who_believes_in_them():
  images, _ = _gaussian_images(2, seed=5)
  observation = play_round(_linear_model(), [(image[None], [k]) for k, image in enumerate(images)])
  defended = _defended(observation, 'isotropic', value=0.3)
  public, _ = _gaussian_images(300, seed=1)
  settings = InversionSettings(clients=300, defended_clients=100, steps=100, width=16)
  fresh, _ = _gaussian_images(60, seed=2)
  labels = np.arange(60, dtype=np.int32) % 2
  sent = _sent(defended, fresh, labels)

  def other_label(shown):
    return [int(np.argmin(shown[0]))]  # A step moves its own label's bias up.

  reached = {}
  for name, reader, used in (
    ('told', None, labels),
    ('swapped', LabelReader(lambda view, update: update.trainable[1], other_label), 1 - labels),
    ('believing', None, 1 - labels),
  ):
    learned = LearnedInversion(
      [defended], defended.clients[0], _examples(public), settings, reader=reader
    )
    reached[name] = psnr(_found(learned, [sent], used), fresh)
  assert reached['swapped'] == pytest.approx(reached['told'], abs=0.3)
  assert reached['believing'] < reached['told'] - 1


def test_labels_are_read_in_all_rounds():
  defended = _defended(_observed(), 'isotropic')
  fresh = {**defended.defense, 'frozen': False}
  rounds = [dataclasses.replace(defended, round_num=k, defense=fresh) for k in (1, 2)]
  read = []

  def labels(shown):
    read.append(shown)
    return [0]

  reader = LabelReader(lambda view, update: (view, update), labels)
  LearnedInversion(rounds, defended.clients[0], _public(), _QUICK, reader=reader)
  assert len(read) == _QUICK.defended_clients
  for (first, update), (second, later) in read:
    assert (first, second) == (0, 1)
    # Of one client: the same but for the noise, which is as long as half the update.
    a, b = (np.concatenate([array.ravel() for array in own.trainable]) for own in (update, later))
    assert 0 < np.linalg.norm(a - b) < np.linalg.norm(a)


def test_labels_are_read_of_as_many_clients_of_a_defence_without_noise():
  observation = dataclasses.replace(_observed(), defense=TopK(0.1).public_settings())
  shown = []

  def show(view, update):
    shown.append(np.count_nonzero(np.concatenate([array.ravel() for array in update.trainable])))
    return 0

  reader = LabelReader(show, lambda shown: [0])
  LearnedInversion([observation], observation.clients[0], _public(), _QUICK, reader=reader)
  assert len(shown) == _QUICK.defended_clients
  weights = sum(array.size for array in observation.global_weights.trainable)
  assert max(shown) <= 0.11 * weights


def test_kinds_are_confused_as_often_as_they_were():
  labels = (np.arange(4000) % 2)[:, None].astype(np.int32)
  inferred = labels[:1000].copy()
  inferred[0:600:2] = 1  # 300 of the 500 zeros.
  kinds = _Kinds(labels)
  taken = kinds.as_inferred(labels, inferred, seed=3)
  assert np.mean(taken[labels[:, 0] == 0]) == pytest.approx(0.6, abs=0.04)
  np.testing.assert_array_equal(taken[labels[:, 0] == 1], 1)
  np.testing.assert_array_equal(taken, kinds.as_inferred(labels, inferred, seed=3))
  np.testing.assert_array_equal(kinds.as_inferred(labels, labels[:50], seed=3), labels[:, 0])


def test_is_the_same_for_the_same_seed():
  observation = _defended(_observed(), 'diagonal', value=1.0)
  client = observation.clients[0]
  found = [
    LearnedInversion([observation], client, _public(), dataclasses.replace(_QUICK, seed=seed))(
      [client.update], [1]
    )
    for seed in (0, 0, 1)
  ]
  assert found[0].shape == (1, 8, 8, 1)
  np.testing.assert_array_equal(found[0], found[1])
  assert np.abs(found[0] - found[2]).max() > 0


def test_clients_of_several_images():
  images = smooth_images(6, seed=3)
  clients = [(images[:3], [0, 1, 1]), (images[3:], [1, 0, 0])]
  observation = _defended(play_round(small_model(), clients), 'isotropic', value=0.1)
  settings = dataclasses.replace(
    _QUICK, clients=400, defended_clients=60, basis_clients=100, steps=300, width=64
  )
  learned = LearnedInversion([observation], observation.clients[0], _public(60), settings)
  mean = _public(60).float_images().mean(axis=0)
  gains = []
  for (own, labels), client in zip(clients, observation.clients, strict=True):
    found = learned([client.update], labels)
    assert found.shape == own.shape
    guess = np.broadcast_to(mean, own.shape)
    gains.append(psnr(in_order(found, own), own) - psnr(guess, own))
  assert np.mean(gains) > 0.5


def test_without_noise_and_with_entries_that_are_not_sent():
  undefended = _observed()
  sparse = dataclasses.replace(undefended, defense=TopK(0.1).public_settings())
  for observation in (undefended, sparse):
    client = observation.clients[0]
    found = LearnedInversion([observation], client, _public(), _QUICK)([client.update], [1])
    assert np.isfinite(found).all()


def test_fits_clients_of_as_many_images_and_steps():
  observation = _observed()
  client = observation.clients[0]
  learned = LearnedInversion([observation], client, _public(), _QUICK)
  assert learned.fits(client)
  assert not learned.fits(dataclasses.replace(client, num_images=2))
  assert not learned.fits(dataclasses.replace(client, num_steps=3))


def test_deviations_are_those_of_the_noise_and_not_of_chance():
  rng = np.random.default_rng(0)
  white = 3.0 * rng.standard_normal((100, 2000))
  norms = np.log(np.linalg.norm(white, axis=1))
  flat = inverse_deviations(white, norms)
  assert flat.std() / flat.mean() < 0.02  # 0.05 without taking chance out.
  deviations = np.repeat([0.5, 2.0], 1000)
  # Clients of much noise count as much as the others.
  noise = rng.uniform(0.1, 10, (100, 1)) * deviations * rng.standard_normal((100, 2000))
  found = inverse_deviations(noise, np.log(np.linalg.norm(noise, axis=1)))
  assert found[:1000].mean() / found[1000:].mean() == pytest.approx(4, rel=0.1)
  np.testing.assert_array_equal(inverse_deviations(np.zeros((3, 5)), np.zeros(3)), np.ones(5))


@pytest.mark.parametrize(
  ('field', 'value'),
  [('clients', 2), ('defended_clients', 0), ('features', 0), ('steps', 0), ('dropout', 1.0)],
)
def test_settings_that_train_nothing(field, value):
  with pytest.raises(ValueError, match=f'{field} must be'):
    InversionSettings(**{field: value})


def test_what_cannot_be_learned_from():
  observation = _observed()
  nobody = _public(1).take([])
  with pytest.raises(UserError, match='needs public images'):
    LearnedInversion([observation], observation.clients[0], nobody, _QUICK)
  with pytest.raises(UserError, match='flips'):
    InversionSettings(augmentations=('flips',))
