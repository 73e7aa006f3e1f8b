"""The program as a process: its error lines, Ctrl-C and --resume."""

import json
import signal

import numpy as np
import pytest

from attacks.scoring.scores import score_attack
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tests.binaries.programs import Running, assert_one_error_line, run, run_all
from tff_shadow.observations import (
  Truth,
  load_tensors,
  write_observation,
  write_truth,
)


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run')
  images = smooth_images(2)
  observation = play_round(small_model(), [(images[:1], [1]), (images[1:], [0])])
  write_observation(directory / 'observations' / 'round_00001', observation)
  regions = np.ones((1, 8, 8, 1), np.float32)
  truth = {
    f'client_{k:02d}': Truth(images[k : k + 1], np.array([1 - k], np.int32), regions)
    for k in range(2)
  }
  write_truth(directory / 'truth' / 'round_00001.safetensors', 1, truth)
  return directory


def _flags(run_dir, *arguments):
  return [f'--run_dir={run_dir}', '--xla=off', *arguments]


def _run(run_dir, *arguments):
  return run('attack', *_flags(run_dir, *arguments))


def test_attack_writes_the_run_and_refuses_to_write_over_it(run_dir):
  done = _run(run_dir, '--name=first', '--iterations=30', '--labels=truth')
  assert done.returncode == 0, done.stderr
  assert '2 of 2 targets attacked' in done.stdout
  output = run_dir / 'attacks' / 'first'
  config = json.loads((output / 'config.json').read_text())
  assert config['attack']['iterations'] == 30
  assert config['observation'] == 'observations/round_00001'
  assert any('told the labels' in fact for fact in config['threat_model'])
  targets = json.loads((output / 'result.json').read_text())['targets']
  assert [target['labels'] for target in targets] == [[1], [0]]
  assert {target['labels_source'] for target in targets} == {'known'}
  assert load_tensors(output / 'reconstructions.safetensors')['client_01/attack'].shape == (
    1,
    8,
    8,
    1,
  )

  arguments = _flags(run_dir, '--name=first', '--labels=truth')
  again, other = run_all(
    'attack', [[*arguments, '--iterations=30'], [*arguments, '--iterations=31', '--resume']]
  )
  assert_one_error_line(again, '--name=first:')
  assert_one_error_line(other, '--resume: --iterations was 30 and is 31 now')


def test_interrupted_attack_resumes_to_the_same_bits(run_dir):
  arguments = ('--targets=client_00', '--iterations=1500')
  whole = _run(run_dir, '--name=whole', *arguments)
  assert whole.returncode == 0, whole.stderr

  process = Running(
    'attack', *_flags(run_dir, '--name=broken', *arguments, '--checkpoint_every_secs=0')
  )
  output = run_dir / 'attacks' / 'broken'
  process.wait_until((output / 'checkpoint.safetensors').exists, 100)
  process.send_signal(signal.SIGINT)
  ended = process.wait(60)
  assert ended.returncode == 130, ended.stderr
  assert 'Traceback' not in ended.stderr
  assert not (output / 'result.json').exists()

  resumed = _run(run_dir, '--name=broken', *arguments, '--resume')
  assert resumed.returncode == 0, resumed.stderr
  a, b = (
    load_tensors(run_dir / 'attacks' / name / 'reconstructions.safetensors')
    for name in ('whole', 'broken')
  )
  np.testing.assert_array_equal(a['client_00/attack'], b['client_00/attack'])
  assert not (output / 'checkpoint.safetensors').exists()


def test_a_preset_with_changes_on_the_mean_of_all_clients(run_dir):
  done = _run(
    run_dir,
    *('--name=mean', '--targets=aggregate', '--labels=truth', '--preset=inverting_gradients'),
    *('--iterations=20', '--learning_rate=0.05', '--depth=0,0.5', '--restarts=2'),
  )
  assert done.returncode == 0, done.stderr
  assert 'Geiping' in done.stdout
  config = json.loads((run_dir / 'attacks' / 'mean' / 'config.json').read_text())
  settings = config['all_settings']
  assert settings['optimizer']['signed']
  assert settings['optimizer']['learning_rate'] == 0.05
  assert settings['matching']['depth'] == [0.0, 0.5]
  assert any('only the mean update' in fact for fact in config['threat_model'])
  # Scored against the images of all clients.
  scored = score_attack(run_dir, 'mean')
  assert [row.label for row in scored] == [1, 0]
  assert all(row.status == 'ok' for row in scored)


_WRONG = [
  (('--labels=cat',), '--labels=cat: use infer, truth or a list'),
  (('--round=7',), 'round_00007: no observation here'),
  (('--preset=generative',), '--preset=generative: needs --generator'),
  (('--optimizer=lbfgs', '--signed'), '--signed: lbfgs has no use for it'),
  (('--rounds=1,1',), '--rounds=1,1: rounds are counted from 1, each once'),
  (('--tv_weight=-1',), '--tv_weight=-1.0: must not be negative'),
  (('--analytic',), 'dense'),
  (('--targets=aggregate', '--label_rule=idlg'), "label rule 'idlg': tells the label of one image"),
  (('--knows=defense',), 'config.json is missing'),
  (('--knows=defense', '--labels=0'), '--knows: goes neither with --analytic'),
  (('--denoiser_steps=3',), '--denoiser_steps: needs --knows'),
  (('--inversion_clients=3',), '--inversion_clients: needs --knows'),
  (('--augment=mirror',), '--augment: needs --knows=defense, --knows=regions or --public_prior'),
  (('--preset=best_public',), 'config.json is missing'),
  (('--public_prior=-1',), '--public_prior'),
]


def test_error_lines(run_dir):
  runs = [_flags(run_dir, '--name=wrong', *arguments) for arguments, _ in _WRONG]
  for ended, (_, message) in zip(run_all('attack', runs), _WRONG, strict=True):
    assert_one_error_line(ended, message)
  assert not (run_dir / 'attacks' / 'wrong').exists()
