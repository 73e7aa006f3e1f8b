"""Played clients against those of a real round, on the same images."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf

from attacks.adaptive.players import AttackersShadow, Equipment, build_player, without_noise
from attacks.adaptive.simulated_updates import SimulatedClients, SimulatedUpdates
from attacks.local_steps import local_steps
from tests.attacks.observed_rounds import small_model
from tests.conftest import make_generator
from tff_shadow.aggregators import NoiseStrength, update_transform_factory
from tff_shadow.errors import UserError
from tff_shadow.learning import (
  BASELINES,
  DpFedAvg,
  DpSgd,
  PercentileGaussian,
  Quantization,
  ShadowDefense,
  ShadowNoise,
  Soteria,
  TopK,
  TrainingRun,
  TrainingSettings,
  UpdateTransform,
)
from tff_shadow.observations import ClientTraining, read_observation, read_truth
from tff_shadow.published import PublishedDefense, PublishedSettings
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.latents import LatentFit
from tff_shadow.shadow.noise_keys import NOISE_KEY, experiment_secret, image_keys

pytestmark = pytest.mark.usefixtures('tff_worker')
_CLIENT = 'client_01'


def _round(data, run_dir, defense, batch_norm, *, momentum=0.0):
  """A real round of two local steps: its observation, and the truth of one client."""
  model = small_model(norm='batch' if batch_norm else 'none')
  local = ClientTraining('sgd', 0.1, momentum, batch_size=4, local_epochs=1, max_local_steps=2)
  settings = TrainingSettings(1, local, seed=5, defense=defense)
  TrainingRun(data, model, settings, run_dir).train(resume=False)
  truth = read_truth(run_dir / 'truth' / 'round_00001.safetensors')[_CLIENT]
  return read_observation(run_dir / 'observations' / 'round_00001'), truth


def _assert_sends_the_same(observation, truth, player, shares_statistics):
  client = observation.client(_CLIENT)
  assert bool(client.update.non_trainable) == shares_statistics
  sent = player.update(truth, local_steps(client, observation.client_training), (3, 4))
  for kind in ('trainable', 'non_trainable'):
    for own, real in zip(getattr(sent, kind), getattr(client.update, kind), strict=True):
      np.testing.assert_allclose(own, real, rtol=1e-4, atol=1e-6)
      if not shares_statistics:
        # What was pruned. A bias before BatchNorm is zero but for rounding, which may come out so.
        np.testing.assert_array_equal(own == 0, real == 0)


@pytest.mark.parametrize(
  ('defense', 'batch_norm'),
  [
    (DpFedAvg(clip_norm=0.05), True),
    (Soteria(60.0), False),
  ],
  ids=['dp_fedavg', 'soteria'],
)
def test_sends_what_a_real_client_sends(tiny_data, tmp_path, defense, batch_norm):
  observation, truth = _round(tiny_data, tmp_path, defense, batch_norm, momentum=0.5)
  player = build_player(observation, batch_norm)
  _assert_sends_the_same(observation, truth, player, batch_norm)


@dataclasses.dataclass(frozen=True)
class _ClipEntries(UpdateTransform):
  """A defence of one's own, as the README shows it."""

  name: ClassVar[str] = 'clip_entries'
  limit: float = 0.001

  def on_client(self, inner):
    return update_transform_factory(lambda update: self.sent(update, None), inner)

  def sent(self, update, key):
    return [tf.clip_by_value(tensor, -self.limit, self.limit) for tensor in update]


def test_a_defence_of_one_s_own_is_played_once_it_is_entered(tiny_data, tmp_path, monkeypatch):
  observation, truth = _round(tiny_data, tmp_path, _ClipEntries(), False)
  largest = [np.abs(array).max() for array in observation.client(_CLIENT).update.trainable]
  assert max(largest) == pytest.approx(0.001)
  with pytest.raises(UserError, match="no simulation of the defence 'clip_entries'"):
    build_player(observation, False)
  monkeypatch.setitem(BASELINES, 'clip_entries', _ClipEntries)
  _assert_sends_the_same(observation, truth, build_player(observation, False), False)


@pytest.mark.parametrize(
  ('shape', 'propagation', 'batch_norm'),
  [
    ('correlated', 'per_step', False),
    ('correlated', 'local_training', True),
    ('decoy', 'per_step', False),
  ],
)
def test_with_the_client_s_keys_shadow_noise_is_the_same(
  tiny_data, tmp_path, monkeypatch, shape, propagation, batch_norm
):
  noise = ShadowNoise(shape, NoiseStrength('scale', 0.1), SaliencyConfig(kind='given'), propagation)
  secrets = {name: experiment_secret(7, name) for name in tiny_data.clients}
  defense = ShadowDefense(noise, True, secrets, tiny_data.validation)
  observation, truth = _round(tiny_data, tmp_path, defense, batch_norm)
  player = build_player(observation, batch_norm, Equipment(decoys=tiny_data.validation))
  everything = tiny_data.clients[_CLIENT].float_images()
  indices = [int(np.flatnonzero((everything == one).all((1, 2, 3)))) for one in truth.images]
  examples = player._examples

  def with_its_keys(truth, key):
    return {**examples(truth, key), NOISE_KEY: image_keys(secrets[_CLIENT], indices, None)}

  monkeypatch.setattr(player, '_examples', with_its_keys)
  _assert_sends_the_same(observation, truth, player, batch_norm)


def test_with_the_client_s_generator_published_noise_is_the_same(tiny_data, tmp_path):
  generator = make_generator(tuple(tiny_data.image_shape))
  # One image whatever the latent, for the fit of a client's latents starts at random; updates of
  # the shadow would make it depend on them.
  kernel = generator.trainable_variables[0]
  kernel.assign(np.zeros(kernel.shape))
  settings = PublishedSettings(latents=LatentFit(steps=2), update_shadow=False)
  scale = (0.4,), (0.2,)
  defense = PublishedDefense(settings, generator, *scale)
  observation, truth = _round(tiny_data, tmp_path, defense, True)
  equipment = Equipment(AttackersShadow(generator, *scale, rounds=1))
  player = build_player(observation, True, equipment)
  _assert_sends_the_same(observation, truth, player, True)
  (undefended,) = (
    build_player(dataclasses.replace(observation, defense={'name': 'none'}), True)
    .update(truth, local_steps(observation.client(_CLIENT), observation.client_training), (0, 0))
    .trainable[:1]
  )
  sent = observation.client(_CLIENT).update.trainable[0]
  assert np.linalg.norm(sent - undefended) > 1e-3 * np.linalg.norm(undefended)
  # Many at a time, as the learned inversion has them.
  like = observation.client(_CLIENT)
  many = SimulatedUpdates(
    observation,
    like,
    SimulatedClients(tiny_data.validation, like, 4, (), seed=0),
    num_defended=3,
    num_basis=4,
    num_features=2,
    shown=None,
    equipment=equipment,
    is_first=True,
    progress=lambda *_: None,
  )
  assert many.noise.shape == (3, 2)
  assert np.abs(many.noise).min() > 0


def test_the_published_defence_needs_a_generator(tiny_data, tmp_path):
  observation, _ = _round(tiny_data, tmp_path, None, False)
  defense = {'name': 'published', 'amplitude': 'much'}
  observation = dataclasses.replace(observation, defense=defense)
  with pytest.raises(UserError, match='generator'):
    build_player(observation, False)
  shadow = AttackersShadow(make_generator(tuple(tiny_data.image_shape)), (0.4,), (0.2,), 1)
  with pytest.raises(UserError, match='published'):
    build_player(observation, False, Equipment(shadow))


def test_decoy_noise_needs_decoys(tiny_data, tmp_path):
  noise = ShadowNoise('decoy', NoiseStrength('scale', 0.1), SaliencyConfig(kind='given'))
  secrets = {name: experiment_secret(7, name) for name in tiny_data.clients}
  with pytest.raises(UserError, match='decoys'):
    _round(tiny_data, tmp_path / 'none', ShadowDefense(noise, True, secrets), False)
  defense = ShadowDefense(noise, True, secrets, tiny_data.validation)
  observation, _ = _round(tiny_data, tmp_path / 'some', defense, False)
  with pytest.raises(UserError, match='public images'):
    build_player(observation, False)


@pytest.mark.parametrize(
  ('defense', 'left'),
  [
    (None, {'name': 'none'}),
    (PercentileGaussian(), {'name': 'none'}),
    (Quantization(), {'name': 'none'}),
    (DpSgd(2.0, 0.5), DpSgd(2.0, 0.0).public_settings()),
    (DpFedAvg(2.0, 0.5), DpFedAvg(2.0, 0.5).public_settings()),
    (TopK(0.2), TopK(0.2).public_settings()),
    (Soteria(50.0), Soteria(50.0).public_settings()),
  ],
  ids=lambda own: own.get('name') if isinstance(own, dict) else getattr(own, 'name', 'none'),
)
def test_what_a_defence_does_besides_noise(defense, left):
  own = {'name': 'none'} if defense is None else defense.public_settings()
  assert without_noise(own) == left


def test_what_a_defence_of_one_s_own_does_is_no_noise_unless_it_says_so(monkeypatch):
  own = _ClipEntries(0.1).public_settings()
  monkeypatch.setitem(BASELINES, 'clip_entries', _ClipEntries)
  assert without_noise(own) == own
  assert without_noise({'name': 'published'}) == {'name': 'none'}
  with pytest.raises(UserError, match="defence 'top_k'"):
    without_noise({'name': 'top_k', 'fraction': 2.0})
