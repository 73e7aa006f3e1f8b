import csv
import json
import re
import signal

import numpy as np
import pytest
from PIL import Image

from tests.binaries.programs import Running, assert_one_error_line, run, run_all
from tff_shadow.data import Partition, load
from tff_shadow.models import load_generator
from tff_shadow.shadow.generator_training import GeneratorSettings, GeneratorTraining

_STEPS = 80
_FLAGS = (
  '--dataset=chest_phantom',
  '--max_examples=12',
  '--partition=iid:2',
  '--latent_size=3',
  '--channels=1',
  '--batch_size=2',
  '--augment=mirror',
  '--inversion_images=2',
  '--sample_every_steps=40',
  f'--steps={_STEPS}',
)


def _start(run_dir, *more):
  return Running('train_shadow', f'--run_dir={run_dir}', *_FLAGS, *more)


def _saved(run_dir):
  names = [path.stem for path in (run_dir / 'checkpoints').glob('ckpt-*.index')]
  return max((int(name.removeprefix('ckpt-')) for name in names), default=-1)


def test_killed_and_interrupted_and_resumed_as_if_never_ended(tmp_path):
  run_dir = tmp_path / 'run'
  process = _start(run_dir, '--save_every_secs=0')
  process.wait_until(lambda: _saved(run_dir) >= 2)
  process.send_signal(signal.SIGKILL)
  process.wait(60)
  killed_at = _saved(run_dir)
  assert 2 <= killed_at < _STEPS
  process = _start(run_dir, '--save_every_secs=0', '--resume')
  process.wait_until(lambda: _saved(run_dir) > killed_at + 1)
  process.send_signal(signal.SIGINT)
  ended = process.wait(60)
  assert ended.returncode == 130, ended.stderr
  assert '--resume' in ended.stderr
  assert 'Traceback' not in ended.stderr
  assert killed_at < _saved(run_dir) < _STEPS
  ended = _start(run_dir, '--resume').wait()
  assert ended.returncode == 0, ended.stderr
  assert f'step {_STEPS}/{_STEPS}' in ended.stdout
  assert ' dB' in ended.stdout

  data = load(
    'chest_phantom', image_size=32, partition=Partition('iid', 2), seed=0, max_examples=12
  )
  settings = GeneratorSettings(3, 1, _STEPS, 2, augmentations=('mirror',))
  training = GeneratorTraining(data.validation.images, settings, tmp_path / 'whole')
  for _ in range(_STEPS):
    training.train()
  generator = load_generator(str(run_dir / 'generator.keras'), (32, 32, 1))
  for one, other in zip(generator.get_weights(), training.generator.get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)

  found = json.loads((run_dir / 'inversion.json').read_text())
  assert (found['split'], found['images']) == ('test', 2)
  assert found['published']['learning_rate'] == 0.001
  assert found['chosen']['learning_rate'] == 0.1
  for part in (found['mean_image'], found['published']['latent'], found['chosen']['latent']):
    assert part['low'] <= part['mean'] <= part['high']
    assert np.mean(part['values']) == pytest.approx(part['mean'], abs=1e-3)
    assert 5 < part['mean'] < 50
  assert json.loads((run_dir / 'config.json').read_text())['training_images'] == 12
  # Rows of eight, or as many unseen images as there are, and a gap of a pixel.
  assert Image.open(run_dir / 'inversion.png').size == (2 * 33, 3 * 33)
  assert Image.open(run_dir / 'samples' / f'step_{_STEPS:06d}.png').size == (8 * 33, 4 * 33)
  assert list((run_dir / 'tensorboard').iterdir())

  table = tmp_path / 'table.csv'
  done = run('generator_table', f'--run_dirs={run_dir}', f'--output={table}')
  assert done.returncode == 0, done.stderr
  with table.open() as file:
    assert file.readline().startswith('# command: python -m binaries.generator_table')
    rows = list(csv.DictReader(file))
  assert [row['learning_rate'] for row in rows] == ['0.001', '0.1']
  for row, name in zip(rows, ('published', 'chosen'), strict=True):
    assert row['split'] == 'validation'
    assert float(row['latent_psnr']) == pytest.approx(found[name]['latent']['mean'], abs=0.01)


_BAD = [
  ([], '--run_dir is required'),
  (['--run_dir=RUN', '--split=test'], '--split=test: .*--inversion_split'),
  (['--run_dir=RUN', '--split=drawn', '--dataset=fundus_patches'], 'only chest_phantom'),
  (['--run_dir=RUN', '--inversion_images=13'], '--inversion_images=13: .* has 12'),
  (['--run_dir=RUN', '--latent_learning_rate=0'], '--latent_learning_rate=0'),
  (['--run_dir=RUN', '--kl_weight=nan'], '--kl_weight=nan'),
  (['--run_dir=RUN', '--augment=flips'], '--augment=flips'),
  (['--run_dir=RUN', '--resume'], 'config.json is missing'),
]


def test_bad_flags_name_themselves_and_write_nothing(tmp_path):
  run_dir = tmp_path / 'run'
  # Made by now, or TFDS would show beside the error how it makes them.
  load('chest_phantom', image_size=32, partition=Partition.parse('iid:2'), seed=0, max_examples=4)
  cases = [[flag.replace('RUN', str(run_dir)) for flag in (*_FLAGS, *more)] for more, _ in _BAD]
  for (_, pattern), ended in zip(_BAD, run_all('train_shadow', cases), strict=True):
    assert_one_error_line(ended)
    assert re.search(pattern, ended.stderr), (pattern, ended.stderr)
  assert not run_dir.exists()
