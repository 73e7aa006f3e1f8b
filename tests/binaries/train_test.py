import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

from binaries import train
from binaries.recorded_data import MANIFESTS
from tests.binaries.programs import ROOT, assert_one_error_line, run_all
from tests.conftest import make_generator
from tff_shadow.errors import UserError
from tff_shadow.models import build_model
from tff_shadow.observations import read_observation, read_truth

_SMALL = {'dataset': 'chest_phantom', 'max_examples': 48, 'partition': 'iid:3', 'rounds': 2}


@pytest.fixture(autouse=True)
def _parsed_flags():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['train'])


def _train(run_dir, **changes):
  with flagsaver.flagsaver(run_dir=str(run_dir), **{**_SMALL, **changes}):
    train.main()


def test_run_directory_holds_what_it_promises_and_resumes(tmp_path, capsys, monkeypatch):
  run_dir = tmp_path / 'run'
  _train(run_dir, norm='batch')
  assert 'test  loss' in capsys.readouterr().out
  config = json.loads((run_dir / 'config.json').read_text())
  assert config['flags']['partition'] == 'iid:3'
  assert config['versions']['tensorflow-federated'] == '0.87.0'
  observation = read_observation(run_dir / 'observations' / 'round_00001')
  truth = read_truth(run_dir / 'truth' / 'round_00001.safetensors')
  assert list(truth) == [client.client_id for client in observation.clients]
  assert 0 <= json.loads((run_dir / 'test.json').read_text())['f1'] <= 1
  assert list((run_dir / 'tensorboard').iterdir())

  before = (run_dir / 'config.json').read_text()
  with pytest.raises(UserError, match='exists already; add --resume'):
    _train(run_dir, norm='batch')
  with pytest.raises(UserError, match='started with --batch_size=8, now it is 4'):
    _train(run_dir, norm='batch', resume=True, batch_size=4)
  assert (run_dir / 'config.json').read_text() == before
  _train(run_dir, norm='batch', resume=True, rounds=3)
  with (run_dir / 'metrics.csv').open() as file:
    assert [row['round'] for row in csv.DictReader(file)] == ['1', '2', '3']

  # What was trained and observed cannot be said otherwise afterwards.
  before = (run_dir / 'config.json').read_text()
  with pytest.raises(UserError, match='--rounds=2: 3 rounds are done already'):
    _train(run_dir, norm='batch', resume=True, rounds=2)
  with pytest.raises(UserError, match='--observed_rounds: round 3 is done already'):
    _train(run_dir, norm='batch', resume=True, rounds=4, observed_rounds=['1', '3'])
  assert (run_dir / 'config.json').read_text() == before

  monkeypatch.setattr(train, 'evaluate', lambda *_: {'loss': float('nan'), 'accuracy': 0.5})
  with pytest.raises(UserError, match='no finite outputs on the test images'):
    _train(run_dir, norm='batch', resume=True, rounds=3)


@pytest.mark.parametrize(
  ('changes', 'repeats'),
  [
    ({}, 10),
    ({'max_local_steps': 8}, 1),
    ({'max_local_steps': 9}, 2),
    ({'max_local_steps': 8, 'client_batch_sizes': '8/16'}, 2),
    ({'max_local_steps': 1000}, 10),
  ],
)
def test_an_image_repeats_as_often_as_steps_allow(changes, repeats):
  data = types.SimpleNamespace(clients={'a': range(64), 'b': range(64)})
  with flagsaver.flagsaver(local_epochs=10, batch_size=8, **changes):
    batch_sizes = train._parse_batch_sizes(list(data.clients))
    assert train._repeats(data, batch_sizes) == repeats


def test_a_run_that_was_stopped_at_once_resumes_with_secrets_of_its_own(tmp_path, monkeypatch):
  run_dir = tmp_path / 'run'
  arguments = {'defense': 'shadow', 'noise_shape': 'isotropic', 'rounds': 1}

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(train, 'write_client_secrets', stop)
    with pytest.raises(KeyboardInterrupt):
      _train(run_dir, **arguments)
  assert [path.name for path in run_dir.iterdir()] == ['config.json']
  _train(run_dir, **arguments, resume=True)
  assert (run_dir / 'model.keras').is_file()
  secrets = run_dir / 'client_state' / 'secrets.json'
  assert len(json.loads(secrets.read_text())) == 3
  # They have been used: others would give other noise.
  secrets.unlink()
  with pytest.raises(UserError, match='secrets cannot be read'):
    _train(run_dir, **arguments, resume=True)


def test_own_keras_model(tmp_path):
  model = build_model('conv_small', image_shape=(32, 32, 1), num_classes=2, norm='group', seed=0)
  model.save(tmp_path / 'mine.keras')
  _train(tmp_path / 'run', model=str(tmp_path / 'mine.keras'), rounds=1)
  assert (tmp_path / 'run' / 'model.keras').is_file()


def test_published_defense_keeps_the_clients_state_and_says_when_it_is_gone(tmp_path, capsys):
  make_generator((32, 32, 1)).save(tmp_path / 'generator.keras')
  arguments = {
    'defense': 'published',
    'published_generator': str(tmp_path / 'generator.keras'),
    'published_latent_steps': 3,
    'published_shadow_steps': 1,
    'published_shadow_rounds': 1,
    'norm': 'batch',
    'max_examples': 12,
  }
  run_dir = tmp_path / 'run'
  _train(run_dir, **arguments)
  assert 'latents 12/12' in capsys.readouterr().out
  observation = read_observation(run_dir / 'observations' / 'round_00001')
  assert observation.defense['name'] == 'published'
  assert observation.defense['shadow_steps'] == 1
  state = sorted(path.name for path in (run_dir / 'client_state').iterdir())
  assert state == ['latents', 'round_00000', 'round_00002']
  with pytest.raises(UserError, match='started with --rounds=2'):
    _train(run_dir, **arguments, resume=True, rounds=3)
  (run_dir / 'client_state' / 'round_00002' / 'client_001.safetensors').unlink()
  with pytest.raises(UserError, match='client_01 kept after round 2 is gone'):
    _train(run_dir, **arguments, resume=True)


@pytest.mark.parametrize('shape', ['isotropic', 'decoy'])
def test_noise_without_a_region_needs_no_convolution(tmp_path, monkeypatch, shape):
  inputs = tf.keras.Input((32, 32, 1))
  outputs = tf.keras.layers.Dense(2)(tf.keras.layers.Flatten()(inputs))
  tf.keras.Model(inputs, outputs).save(tmp_path / 'mine.keras')

  def built(*args, **kwargs):
    raise UserError('built')

  monkeypatch.setattr(train.run_directory, 'claim', built)
  with pytest.raises(UserError, match='built'):
    _train(
      tmp_path / 'run',
      model=str(tmp_path / 'mine.keras'),
      defense='shadow',
      noise_shape=shape,
      noise_strength_kind='scale',
    )


_PUBLISHED = {'defense': 'published', 'published_generator': 'nowhere.keras'}
_PER_STEP = {'defense': 'shadow', 'propagation': 'per_step'}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'dataset': 'chest_fantom'}, 'chest_fantom'),
    ({'model': 'resnet19'}, '--model=resnet19'),
    ({'model': 'nowhere.keras'}, 'no such file'),
    ({'client_learning_rate': 0.0}, '--client_learning_rate=0.0'),
    ({'client_learning_rate': float('nan')}, '--client_learning_rate'),
    ({'client_batch_sizes': '4/8'}, '--client_batch_sizes=4/8: use 3 whole numbers'),
    ({'client_batch_sizes': '4/8/0'}, '--client_batch_sizes=4/8/0'),
    ({'client_learning_rate_drops': ['4x']}, '--client_learning_rate_drops=4x'),
    ({'observed_rounds': ['0']}, '--observed_rounds=0'),
    ({'observed_rounds': ['3']}, '--observed_rounds=3'),
    ({'partition': 'iid:x'}, 'iid:x'),
    ({'partition': 'sizes:4000'}, '4000'),
    ({'clients_per_round': 9}, '--clients_per_round=9'),
    ({'train_manifest': 'x.csv'}, '--train_manifest needs --dataset=manifests'),
    ({'dataset': 'manifests'}, '--train_manifest is required'),
    ({'resume': True}, 'config.json is missing'),
    ({'defense': 'shadow', 'noise_strength_kind': 'ratio', 'noise_strength': -1.0}, '=-1.0'),
    ({'defense': 'shadow', 'noise_strength': float('nan')}, '--noise_strength=nan'),
    ({'defense': 'shadow', 'noise_floor': 1.0}, '--noise_floor: floor must be above 0 and below 1'),
    ({'defense': 'shadow', 'noise_freshness': 'frozen'}, '--noise_freshness=frozen: the map'),
    ({'defense': 'shadow', 'saliency_layer': 'nowhere'}, 'nowhere'),
    ({'defense': 'shadow', 'saliency_top_fraction': 1.5}, '1.5'),
    (_PER_STEP | {'client_momentum': 0.9}, '--defense=shadow: .*per_step'),
    (_PER_STEP | {'norm': 'batch'}, '--defense=shadow: .*BatchNorm'),
    ({'defense': 'shadow', 'propagation': 'images', 'noise_shape': 'diagonal'}, 'correlated noise'),
    ({'defense': 'published'}, '--published_generator is required'),
    (_PUBLISHED, '--published_generator=nowhere.keras'),
    (_PUBLISHED | {'published_amplitude': -1.0}, '--published_amplitude must be .* found -1.0'),
    (_PUBLISHED | {'published_cam_weights': ['1', 'x']}, '--published_cam_weights=1,x'),
    (_PUBLISHED | {'published_latent_steps': 0}, '--published_latent_steps must be'),
    (_PUBLISHED | {'published_latents': 'nowhere'}, '--published_latents=nowhere: has no folder'),
    (
      {'defense': 'percentile_gaussian', 'percentile_gaussian_sigma0': -1.0},
      '--percentile_gaussian_sigma0 must be .* found -1.0',
    ),
    ({'defense': 'dp_sgd', 'norm': 'batch'}, '--defense=dp_sgd: BatchNorm .* use --norm=group'),
  ],
)
def test_bad_flags_name_themselves_and_write_nothing(tmp_path, changes, message):
  run_dir = tmp_path / 'run'
  with pytest.raises(UserError, match=message) as error:
    _train(run_dir, **changes)
  assert '\n' not in str(error.value)
  assert not run_dir.exists()


def _start(run_dir, rounds):
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'binaries.train',
      f'--run_dir={run_dir}',
      '--max_examples=48',
      '--partition=iid:3',
      f'--rounds={rounds}',
      '--save_every_rounds=2',
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )


def _children(pid):
  tasks = pathlib.Path(f'/proc/{pid}/task').glob('*/children')
  return [int(child) for path in tasks for child in path.read_text().split()]


def _wait_for(condition, seconds=120.0):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'timed out'
    time.sleep(0.1)


@pytest.mark.parametrize('end_with', [signal.SIGINT, signal.SIGKILL])
def test_ended_run_leaves_no_worker_and_resumes(tmp_path, end_with):
  run_dir = tmp_path / 'run'
  process = _start(run_dir, rounds=100_000)
  _wait_for(lambda: (run_dir / 'state' / 'round_4').is_dir())
  workers = _children(process.pid)
  assert workers
  process.send_signal(end_with)
  _, errors = process.communicate(timeout=60)  # Ends only when no one holds the pipes.
  assert process.returncode == (130 if end_with == signal.SIGINT else -signal.SIGKILL)
  if end_with == signal.SIGINT:
    assert 'Traceback' not in errors
    assert '--resume' in errors
  _wait_for(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in workers), 10)
  saved = max(
    int(path.name.removeprefix('round_'))
    for path in (run_dir / 'state').iterdir()
    if path.name.removeprefix('round_').isdigit()
  )
  assert saved >= 4
  with (run_dir / 'metrics.csv').open() as file:
    done = len(list(csv.DictReader(file)))
  # At most the rounds since the last save are done again.
  assert done - saved <= (0 if end_with == signal.SIGINT else 2)
  if end_with == signal.SIGINT:
    return  # How that goes on: tests/learning/training_test.py.
  _train(run_dir, resume=True, rounds=saved + 1, save_every_rounds=2)
  with (run_dir / 'metrics.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [int(row['round']) for row in rows] == list(range(1, saved + 2))


def test_user_mistake_is_one_line_and_exit_code_1(tmp_path):
  build_model('conv_small', image_shape=(32, 32, 1), num_classes=2, norm='none', seed=0).save(
    tmp_path / 'own.keras'
  )
  manifests = [f'--{name}=x' for name in MANIFESTS]
  cases = [
    (['--rounds=none'], '--rounds'),
    # Who has forgotten --defense sends updates as they are.
    (['--noise_strength=3'], '--noise_strength: needs --defense=shadow'),
    (['--defense=shadow', '--top_k_fraction=0.1'], '--top_k_fraction: needs --defense=top_k'),
    (
      ['--defense=top_k', '--published_amplitude=1'],
      '--published_amplitude: needs --defense=published',
    ),
    ([f'--model={tmp_path}/own.keras', '--norm=batch'], '--norm: is for built-in models'),
    (['--dataset=manifests', *manifests, '--max_examples=2'], '--max_examples: has no use'),
  ]
  runs = [[f'--run_dir={tmp_path}/r', *flags] for flags, _ in cases]
  for ended, (_, message) in zip(run_all('train', runs), cases, strict=True):
    assert_one_error_line(ended, message)
  assert not (tmp_path / 'r').exists()
