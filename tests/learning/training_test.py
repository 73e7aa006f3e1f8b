import csv
import dataclasses
import logging
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.attacks.observed_rounds import small_model
from tests.conftest import make_examples, make_generator
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.errors import UserError
from tff_shadow.learning import (
  RoundSampler,
  ShadowDefense,
  ShadowNoise,
  TrainingRun,
  TrainingSettings,
  client_secrets,
  evaluate,
  training,
)
from tff_shadow.learning.client_secrets import read_client_secrets, write_client_secrets
from tff_shadow.learning.run_state import RunState, has_state
from tff_shadow.models import classification_loss, model_from_config
from tff_shadow.observations import ClientTraining, read_observation, read_truth
from tff_shadow.published import PublishedDefense, PublishedSettings
from tff_shadow.shadow import SaliencyConfig
from tff_shadow.shadow.latents import LatentFit
from tff_shadow.shadow.noise_keys import draw_secret

pytestmark = pytest.mark.usefixtures('tff_worker')
_SHAPE = (8, 8, 1)


def _local(**changes):
  return ClientTraining(
    **{
      'optimizer': 'sgd',
      'learning_rate': 0.1,
      'momentum': 0.0,
      'batch_size': 4,
      'local_epochs': 1,
      'max_local_steps': None,
      **changes,
    }
  )


def _settings(rounds, local=None, **kwargs):
  return TrainingSettings(rounds=rounds, client_training=local or _local(), seed=5, **kwargs)


def _model(norm='none'):
  return small_model(_SHAPE, norm=norm, seed=1)


def _train(data, run_dir, settings, *, resume=False, report=lambda r: None, model=None, **kwargs):
  model = model or _model()
  TrainingRun(data, model, settings, run_dir, **kwargs).train(resume=resume, report=report)
  return model


def _rows(run_dir):
  with (run_dir / 'metrics.csv').open() as file:
    return list(csv.DictReader(file))


def test_learns_the_task(tiny_data, tmp_path):
  model = _train(tiny_data, tmp_path, _settings(12))
  test = tiny_data.test
  assert evaluate(model, test.float_images(), test.labels)['f1'] > 0.9
  rows = _rows(tmp_path)
  assert [int(row['round']) for row in rows] == list(range(1, 13))
  assert float(rows[-1]['validation/f1']) > 0.9
  assert float(rows[-1]['train/loss']) < float(rows[0]['train/loss'])


@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_observation_is_what_one_local_step_sends(tiny_data, tmp_path, norm):
  settings = _settings(1, _local(max_local_steps=1))
  _train(tiny_data, tmp_path, settings, model=_model(norm))
  observation = read_observation(tmp_path / 'observations' / 'round_00001')
  truth = read_truth(tmp_path / 'truth' / 'round_00001.safetensors')
  assert [client.client_id for client in observation.clients] == list(tiny_data.clients)
  for client in observation.clients:
    own = truth[client.client_id]
    assert client.num_images == len(own.images) == 4
    assert (client.num_steps, client.weight, client.dropped) == (1, 4.0, False)
    model = model_from_config(observation.model_config)
    for variable, value in zip(
      model.trainable_variables, observation.global_weights.trainable, strict=True
    ):
      variable.assign(value)
    before = [v.numpy() for v in model.non_trainable_variables]
    with tf.GradientTape() as tape:
      loss = classification_loss(model)(own.labels, model(own.images, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    # The sign that attacks rely on: trained minus initial, so against the gradient.
    for sent, gradient in zip(client.update.trainable, gradients, strict=True):
      np.testing.assert_allclose(sent, -0.1 * gradient, atol=2e-6)
    for sent, variable, old in zip(
      client.update.non_trainable, model.non_trainable_variables, before, strict=True
    ):
      np.testing.assert_allclose(sent, variable - old, atol=2e-6)
  weights = [client.weight for client in observation.clients]
  mean = np.average(
    [client.update.trainable[0] for client in observation.clients], axis=0, weights=weights
  )
  np.testing.assert_allclose(observation.aggregate.trainable[0], mean, atol=1e-7)


def test_truth_holds_each_client_image_once_with_its_region(tiny_data, tmp_path):
  _train(tiny_data, tmp_path, _settings(1, _local(local_epochs=2)))
  observation = read_observation(tmp_path / 'observations' / 'round_00001')
  truth = read_truth(tmp_path / 'truth' / 'round_00001.safetensors')
  for client_id, examples in tiny_data.clients.items():
    client = observation.client(client_id)
    assert client.num_images == len(examples)
    assert client.num_steps == 2 * len(examples) // 4
    assert client.weight == 2 * len(examples)
    sent = {image.tobytes() for image in truth[client_id].images}
    assert sent == {image.tobytes() for image in examples.float_images()}
    assert truth[client_id].regions.shape == (len(examples), 8, 8, 1)


class _StopError(Exception):
  pass


@tf.keras.saving.register_keras_serializable('training_test')
class _Same(tf.keras.layers.Layer):
  """Does nothing; a user may define it anew."""

  def call(self, inputs):
    return inputs


def test_runs_share_what_was_built_unless_a_layer_is_the_user_s_own(tiny_data, tmp_path):
  def process(model, **settings):
    return TrainingRun(tiny_data, model, _settings(1, **settings), tmp_path)._process_of(1)

  shared = process(_model())
  assert process(small_model(seed=9)) is shared
  assert process(_model(), server_momentum=0.5) is not shared
  inputs = tf.keras.Input(_SHAPE)
  outputs = tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(_Same()(inputs)))
  own = tf.keras.Model(inputs, outputs)
  assert process(own) is not process(own)


def test_resumed_run_equals_an_uninterrupted_one(tiny_data, tmp_path):
  settings = _settings(6, clients_per_round=2, observed_rounds=(1, 5))
  whole = _train(tiny_data, tmp_path / 'whole', settings, save_every_rounds=2)

  def stop_after_round_five(report):
    if report.round_num == 5:  # Saved: 4. Round 5 and its row must be done again.
      raise _StopError

  with pytest.raises(_StopError):
    _train(tiny_data, tmp_path / 'cut', settings, save_every_rounds=2, report=stop_after_round_five)
  resumed = _train(tiny_data, tmp_path / 'cut', settings, resume=True, save_every_rounds=2)
  for actual, wanted in zip(resumed.get_weights(), whole.get_weights(), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-6)
  first, second = _rows(tmp_path / 'whole'), _rows(tmp_path / 'cut')
  assert [row['round'] for row in first] == [row['round'] for row in second]
  for row, twin in zip(first, second, strict=True):
    assert float(row['validation/loss']) == pytest.approx(float(twin['validation/loss']), abs=1e-5)
  truth = [
    read_truth(tmp_path / name / 'truth' / 'round_00005.safetensors') for name in ('whole', 'cut')
  ]
  assert list(truth[0]) == list(truth[1])
  for client_id in truth[0]:
    np.testing.assert_array_equal(truth[0][client_id].images, truth[1][client_id].images)


def test_ctrl_c_saves_the_last_finished_round(tiny_data, tmp_path):
  def interrupt(report):
    if report.round_num == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _train(tiny_data, tmp_path, _settings(9), save_every_rounds=100, report=interrupt)
  reports = []
  _train(tiny_data, tmp_path, _settings(4), resume=True, report=reports.append)
  assert [report.round_num for report in reports] == [4]


def test_a_round_cut_short_by_ctrl_c_is_not_counted(tiny_data, tmp_path, monkeypatch):
  whole = _train(tiny_data, tmp_path / 'whole', _settings(3), evaluate_every_rounds=2)

  def interrupt(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(training, 'evaluate', interrupt)
    with pytest.raises(KeyboardInterrupt):
      _train(tiny_data, tmp_path / 'cut', _settings(3), evaluate_every_rounds=2)
  cut = _train(tiny_data, tmp_path / 'cut', _settings(3), resume=True, evaluate_every_rounds=2)
  assert [row['round'] for row in _rows(tmp_path / 'cut')] == ['1', '2', '3']
  for actual, wanted in zip(cut.get_weights(), whole.get_weights(), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-6)


def test_learning_rate_drops_need_no_new_process(tiny_data, tmp_path):
  settings = _settings(4, learning_rate_drops=(2,), observed_rounds=())
  run = TrainingRun(tiny_data, _model(), settings, tmp_path)
  assert run._process_of(1) is run._process_of(4)


def test_hyperparameters_are_not_in_the_saved_state(tiny_data, tmp_path):
  """They are the settings', so that what was saved before they were in the state is resumed."""
  _train(tiny_data, tmp_path, _settings(1))
  process = TrainingRun(tiny_data, _model(), _settings(1), tmp_path / 'other')._process_of(1)
  state = process.initialize()
  saved, _ = RunState(tmp_path / 'state').load_latest(state._replace(client_work=()))
  assert saved.client_work == ()
  assert list(state.client_work) == ['learning_rate']


def test_learning_rate_drops_make_the_run_of_its_stages_by_hand(tiny_data, tmp_path):
  settings = _settings(4, learning_rate_drops=(2,), observed_rounds=(2, 3, 4))
  _train(tiny_data, tmp_path / 'whole', dataclasses.replace(settings, rounds=2))
  whole = _train(tiny_data, tmp_path / 'whole', settings, resume=True)
  rates = [
    read_observation(tmp_path / 'whole' / 'observations' / f'round_0000{r}').client_training
    for r in (2, 3, 4)
  ]
  assert [local.learning_rate for local in rates] == pytest.approx([0.1, 0.01, 0.01])
  # Stage by stage: each continues the saved state of the one before at a constant rate.
  _train(tiny_data, tmp_path / 'hand', _settings(2))
  low = _settings(4, _local(learning_rate=0.01), observed_rounds=())
  by_hand = _train(tiny_data, tmp_path / 'hand', low, resume=True)
  for actual, wanted in zip(whole.get_weights(), by_hand.get_weights(), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'learning_rate_drops': (80, 40)}, '--client_learning_rate_drops=80,40: use rounds'),
    ({'learning_rate_drops': (0,)}, 'from 1 in rising order'),
    ({'learning_rate_drop_factor': 0.0}, '--client_learning_rate_drop_factor=0.0'),
  ],
)
def test_schedules_that_are_none(changes, message):
  with pytest.raises(UserError, match=message):
    _settings(2, **changes)


def test_damaged_state_falls_back_to_the_one_before(tiny_data, tmp_path, caplog):
  settings = _settings(4)
  whole = _train(tiny_data, tmp_path, settings, save_every_rounds=1)
  for path in (tmp_path / 'state' / 'round_4').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  reports = []
  with caplog.at_level(logging.WARNING):
    again = _train(tiny_data, tmp_path, settings, resume=True, report=reports.append)
  assert [report.round_num for report in reports] == [4]
  assert 'round 4 is damaged' in caplog.text
  for actual, wanted in zip(again.get_weights(), whole.get_weights(), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-6)


def test_a_run_that_was_ended_before_its_first_state_begins(tiny_data, tmp_path, caplog):
  (tmp_path / 'cut' / 'state' / 'round_0_temp1234').mkdir(parents=True)  # TFF was writing it.
  assert not has_state(tmp_path / 'cut' / 'state')
  assert not has_state(tmp_path / 'none' / 'state')
  assert not (tmp_path / 'none').exists()
  with caplog.at_level(logging.WARNING):
    _train(tiny_data, tmp_path / 'cut', _settings(1), resume=True)
  assert 'nothing was saved of this run yet' in caplog.text
  assert has_state(tmp_path / 'cut' / 'state')
  assert _rows(tmp_path / 'cut')[-1]['round'] == '1'


def test_no_readable_state_is_one_clear_line(tiny_data, tmp_path):
  with pytest.raises(UserError, match='no saved state to resume from'):
    RunState(tmp_path / 'none').load_latest(None)
  _train(tiny_data, tmp_path, _settings(1))
  for path in (tmp_path / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  with pytest.raises(UserError, match='none of the 2 saved states can be read'):
    _train(tiny_data, tmp_path, _settings(2), resume=True)


@pytest.mark.parametrize(('secure', 'rounds'), [(False, 1), (True, 2)])
def test_dropped_client_is_reported_by_name(
  tiny_data, tmp_path, monkeypatch, caplog, secure, rounds
):
  sample = RoundSampler.sample

  def with_one_bad_client(self, round_num):
    tasks = sample(self, round_num)
    bad = tasks[1].dataset.map(lambda batch: {**batch, 'x': batch['x'] * np.float32('nan')})
    return [tasks[0], dataclasses.replace(tasks[1], dataset=bad), tasks[2]]

  monkeypatch.setattr(RoundSampler, 'sample', with_one_bad_client)
  reports = []
  settings = _settings(rounds, secure_measurements=secure)
  with caplog.at_level(logging.WARNING):
    model = _train(tiny_data, tmp_path, settings, report=reports.append)
  assert reports[0].dropped == ('client_01',)
  assert 'round 1: the update of client_01' in caplog.text
  assert [float(row['train/dropped_clients']) for row in _rows(tmp_path)] == [1] * rounds
  if rounds > 1:
    # Nobody sees the updates of the second round.
    assert reports[1].dropped == ()
    assert 'round 2: 1 of 3 updates were not finite' in caplog.text
  observation = read_observation(tmp_path / 'observations' / 'round_00001')
  assert [client.dropped for client in observation.clients] == [False, True, False]
  assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_round_without_a_finite_update_ends_the_run(tiny_data, tmp_path):
  with pytest.raises(UserError, match='lower --client_learning_rate'):
    _train(tiny_data, tmp_path, _settings(3, _local(learning_rate=1e30)))


def test_sampler_is_a_function_of_seed_and_round(tiny_data):
  settings = _settings(3, clients_per_round=2)

  def chosen(sampler, round_num):
    return [(task.client_id, task.truth.images.tobytes()) for task in sampler.sample(round_num)]

  first, second = RoundSampler(tiny_data, settings), RoundSampler(tiny_data, settings)
  assert [chosen(first, r) for r in (1, 2, 3)] == [chosen(second, r) for r in (1, 2, 3)]
  assert len({str(chosen(first, r)) for r in (1, 2, 3)}) == 3
  other = RoundSampler(tiny_data, dataclasses.replace(settings, seed=6))
  assert chosen(other, 1) != chosen(first, 1)


def test_clients_have_batch_sizes_of_their_own(tiny_data, tmp_path):
  settings = _settings(1, client_batch_sizes={'client_00': 8, 'client_02': 1})
  _train(tiny_data, tmp_path, settings)
  clients = read_observation(tmp_path / 'observations' / 'round_00001').clients
  assert [client.batch_size for client in clients] == [8, None, 1]
  assert [client.num_steps for client in clients] == [1, 3, 16]
  tasks = RoundSampler(tiny_data, settings).sample(1)
  assert [next(iter(task.dataset))['x'].shape[0] for task in tasks] == [8, 4, 1]


@pytest.mark.parametrize(
  ('sizes', 'message'), [({'nobody': 2}, "no client 'nobody'"), ({'client_00': 0}, 'at least 1')]
)
def test_batch_sizes_that_fit_no_client(tiny_data, sizes, message):
  with pytest.raises(UserError, match=message):
    RoundSampler(tiny_data, _settings(1, client_batch_sizes=sizes))


def test_more_clients_than_there_are(tiny_data):
  with pytest.raises(UserError, match='--clients_per_round=4: the partition has 3'):
    RoundSampler(tiny_data, _settings(1, clients_per_round=4))


def test_validation_of_local_batch_norm_uses_estimated_statistics(tiny_data, tmp_path):
  data = dataclasses.replace(tiny_data, validation=make_examples(64, 9))
  settings = _settings(10, batch_norm_sharing='local')
  _train(data, tmp_path, settings, model=_model('batch'))
  assert float(_rows(tmp_path)[-1]['validation/f1']) > 0.8


@pytest.mark.parametrize('frozen', [True, False])
def test_frozen_noise_is_the_same_in_every_round_and_after_a_resume(tiny_data, tmp_path, frozen):
  noise = ShadowNoise('correlated', NoiseStrength('ratio', 1.0), SaliencyConfig(kind='given'))
  path = tmp_path / 'secrets.json'
  write_client_secrets(path, {client_id: draw_secret() for client_id in tiny_data.clients})

  def train(rounds, *, resume):
    settings = _settings(
      rounds,
      _local(batch_size=16),  # One step on all images, whatever their order.
      server_learning_rate=1e-9,  # The global weights stay, so only the noise can differ.
      observed_rounds=(1, 2, 3),
      defense=ShadowDefense(noise, frozen, read_client_secrets(path, tiny_data.clients)),
    )
    _train(tiny_data, tmp_path / 'run', settings, resume=resume)

  train(2, resume=False)
  train(3, resume=True)
  observations = [
    read_observation(tmp_path / 'run' / 'observations' / f'round_0000{r}') for r in (1, 2, 3)
  ]
  for client_id in tiny_data.clients:
    sent = [
      np.concatenate([t.ravel() for t in o.client(client_id).update.trainable])
      for o in observations
    ]
    for other in sent[1:]:
      difference = np.linalg.norm(other - sent[0]) / np.linalg.norm(sent[0])
      assert difference < 1e-4 if frozen else difference > 0.3
  assert observations[0].defense['name'] == 'shadow'
  assert 'secret' not in str(observations[0].defense)
  row = _rows(tmp_path / 'run')[-1]
  norms = [
    np.linalg.norm(np.concatenate([t.ravel() for t in client.update.trainable]))
    for client in observations[-1].clients
  ]
  assert float(row['noise/sent_norm']) == pytest.approx(np.mean(norms), rel=1e-3)


def test_unreadable_secrets_are_one_clear_line(tmp_path):
  path = tmp_path / 'secrets.json'
  with pytest.raises(UserError, match='secrets cannot be read'):
    read_client_secrets(path, ['a'])
  write_client_secrets(path, {'a': b'x' * 32})
  assert path.stat().st_mode & 0o077 == 0
  assert read_client_secrets(path, ['a']) == {'a': b'x' * 32}
  with pytest.raises(UserError, match='KeyError'):
    read_client_secrets(path, ['b'])
  with pytest.raises(FileExistsError):
    write_client_secrets(path, {'a': b'y' * 32})


def test_secrets_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'secrets.json'

  def stop_halfway(value, file):
    file.write('{"a": ')
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(client_secrets.json, 'dump', stop_halfway)
    with pytest.raises(KeyboardInterrupt):
      write_client_secrets(path, {'a': b'x' * 32})
  assert not path.exists()
  write_client_secrets(path, {'a': b'x' * 32})
  assert read_client_secrets(path, ['a']) == {'a': b'x' * 32}
  assert [kept.name for kept in tmp_path.iterdir()] == ['secrets.json']


def _published(data, **changes):
  generator = make_generator(tuple(data.image_shape))
  settings = PublishedSettings(
    latents=LatentFit(steps=5), **{'shadow_steps': 1, 'shadow_rounds': 2, **changes}
  )
  return PublishedDefense(settings, generator, (0.4,), (0.2,))


class TestPublishedDefense:
  def test_the_computation_is_that_of_no_defense(self, tiny_data, tmp_path):
    """So nothing of the shadow, latents, maps or clean images can be in it or leave it."""
    runs = [
      TrainingRun(tiny_data, _model(), _settings(2, defense=defense), tmp_path)
      for defense in (None, _published(tiny_data))
    ]
    types = [run._process_of(1).next.type_signature for run in runs]
    assert types[0] == types[1]

  def test_clients_train_on_noised_images(self, tiny_data, tmp_path):
    settings = _settings(1, _local(max_local_steps=1), defense=_published(tiny_data))
    _train(tiny_data, tmp_path, settings)
    observation = read_observation(tmp_path / 'observations' / 'round_00001')
    truth = read_truth(tmp_path / 'truth' / 'round_00001.safetensors')
    assert observation.defense['name'] == 'published'
    client = observation.clients[0]
    own = truth[client.client_id]
    # Scoring compares with what the client has, not with what it trained on.
    np.testing.assert_array_equal(own.images * 255 % 1, 0)
    model = model_from_config(observation.model_config)
    model.set_weights(observation.global_weights.trainable)
    with tf.GradientTape() as tape:
      loss = classification_loss(model)(own.labels, model(own.images, training=True))
    clean = tape.gradient(loss, model.trainable_variables)
    difference = np.concatenate(
      [np.ravel(s + 0.1 * g) for s, g in zip(client.update.trainable, clean, strict=True)]
    )
    assert np.abs(difference).max() > 1e-4
    row = _rows(tmp_path)[0]
    assert float(row['noise/image_rms']) > 0
    assert 0 < float(row['shadow/psnr']) < 60

  def test_interrupted_run_goes_on_as_it_would_have(self, tiny_data, tmp_path):
    settings = _settings(5, defense=_published(tiny_data))
    whole = _train(tiny_data, tmp_path / 'whole', settings, save_every_rounds=2)

    def stop_in_round_three(report):
      if report.round_num == 3:
        raise _StopError

    with pytest.raises(_StopError):
      _train(tiny_data, tmp_path / 'cut', settings, save_every_rounds=2, report=stop_in_round_three)
    cut = _train(tiny_data, tmp_path / 'cut', settings, resume=True, save_every_rounds=2)
    for actual, wanted in zip(cut.get_weights(), whole.get_weights(), strict=True):
      np.testing.assert_allclose(actual, wanted, atol=1e-5)
    shutil.rmtree(tmp_path / 'cut' / 'client_state')
    with pytest.raises(UserError, match='kept after round 5 is gone'):
      _train(tiny_data, tmp_path / 'cut', settings, resume=True)
