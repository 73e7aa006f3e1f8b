"""The program as a process: an audit of a defended run, killed and resumed; its error lines."""

import json
import math
import shutil
import signal

import numpy as np
import pytest

from attacks.audit.comparison import compare, read_audit
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tests.binaries.programs import Running, assert_one_error_line, run, run_all
from tff_shadow.data import Examples
from tff_shadow.learning import record_round
from tff_shadow.observations import Truth

_TRAIN = [
  '--dataset=chest_phantom',
  '--image_size=32',
  '--max_examples=60',
  '--partition=iid:3',
  '--batch_size=1',
  '--max_local_steps=1',
  '--rounds=2',
  '--observed_rounds=1,2',
  '--client_learning_rate=0.05',
  '--defense=shadow',
  '--noise_shape=isotropic',
  '--noise_strength_kind=ratio',
  '--noise_strength=0.5',
  '--saliency=given',
]
_AUDIT = ['--budget=quick', '--iterations=8', '--annex', '--separate_rounds=2']


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run') / 'run'
  done = run('train', f'--run_dir={directory}', *_TRAIN)
  assert done.returncode == 0, done.stderr
  return directory


@pytest.fixture(scope='module')
def summary(run_dir):
  """Of an audit that was killed on the way."""
  audit = run_dir / 'audits' / 'audit'
  process = Running('audit', f'--run_dir={run_dir}', *_AUDIT)
  half = audit / 'round_00002' / 'observed' / 'best' / 'result.json'
  process.wait_until(half.exists)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert half.exists()
  assert not (audit / 'report.html').exists()
  before = half.stat().st_mtime_ns
  cache = run_dir.parent / 'cache'
  done = run('audit', f'--run_dir={run_dir}', *_AUDIT, '--resume', f'--cache_dir={cache}')
  assert done.returncode == 0, done.stderr
  assert half.stat().st_mtime_ns == before  # Not attacked again.
  # For an audit of another run from the same start.
  (kept,) = cache.glob('undefended-*')
  assert (kept / 'best' / 'result.json').exists()
  found = json.loads((audit / 'summary.json').read_text())
  assert found['headline'] in done.stdout
  return found


def test_an_audit_has_all_its_parts(summary, run_dir):
  assert [entry['rounds'] for entry in summary['rounds']] == [[2], [1, 2]]
  for entry in summary['rounds'][:1]:
    assert [own['name'] for own in entry['attacks']] == ['best']
    assert entry['images'] == entry['clients'] == entry['control']['images'] == 3
    assert entry['undefended']['psnr']['n'] == 3
    assert entry['change']['region_psnr']['n'] == 3
  assert summary['rounds'][1]['undefended'] is None
  # Three images and no attacker who knows the defence are too little to say that nothing leaked.
  assert summary['verdict'] in ('inconclusive', 'partly_leaked', 'leaked')
  assert summary['guarantee'].startswith('no formal guarantee')
  assert set(summary['utility']['test']) >= {'f1', 'accuracy'}
  assert summary['scope']['Rounds audited'] == '1, 2 of 2'
  assert 'Annex' in (run_dir / 'audits' / 'audit' / 'report.html').read_text()


def test_a_run_that_cannot_be_attacked_has_a_report_that_says_so(run_dir, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(run_dir, other, ignore=shutil.ignore_patterns('audits', 'state', 'attacks'))
  for path in other.glob('observations/*/observation.json'):
    document = json.loads(path.read_text())
    document['client_training']['optimizer'] = 'adam'
    path.write_text(json.dumps(document))
  done = run('audit', f'--run_dir={other}', '--budget=quick', '--rounds=1', '--bound_clients=0')
  assert done.returncode == 0, done.stderr
  path = other / 'audits' / 'audit' / 'summary.json'
  found = json.loads(path.read_text())
  assert found['verdict'] == 'inconclusive'
  (reason,) = [text for text in found['reasons'] if 'positive control could not' in text]
  assert "'adam'" in reason
  assert 'positive control could not be made' in (path.parent / 'report.html').read_text()
  assert compare([read_audit(path)])


def test_rounds_of_another_program_are_audited(tmp_path):
  images = smooth_images(8)
  labels, regions = np.array([0, 1], np.int32), np.ones((2, 8, 8, 1), np.float32)
  clients = {
    f'client_{k:02d}': Truth(images[k : k + 1], labels[k:][:1], regions[:1]) for k in (0, 1)
  }
  observation = play_round(small_model(), [(own.images, own.labels) for own in clients.values()])
  public = np.round(255 * images[2:]).astype(np.uint8)
  record_round(
    tmp_path / 'own',
    observation,
    clients,
    public=Examples(public, np.tile(labels, 3), np.full_like(public, 255)),
    client_images=dict.fromkeys(clients, 1),
    rounds=1,
  )
  done = run('audit', f'--run_dir={tmp_path / "own"}', '--budget=quick', '--iterations=4')
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'own' / 'audits' / 'audit' / 'summary.json').read_text())
  assert found['scope']['Clients attacked'].startswith('2 of 2')
  assert found['utility'] == {'test': None, 'undefended': None}
  assert found['rounds'][0]['images'] == 2


def test_who_knows_the_defence_may_attack_alone(run_dir):
  settings = [
    '--iterations=5',
    '--calibration_clients=2',
    '--denoiser_steps=2',
    '--inversion_clients=8',
    '--xla=off',
  ]
  command = [f'--run_dir={run_dir}', '--name=knowing', '--knows=regions', *settings]
  done = run('attack', *command)
  assert done.returncode == 0, done.stderr
  assert '3 of 3 targets attacked' in done.stdout
  directory = run_dir / 'attacks' / 'knowing'
  config = json.loads((directory / 'config.json').read_text())
  assert config['attack']['knows'] == 'regions'
  assert 'It is told the region maps of the clients.' in config['threat_model']
  assert 'Traceback' not in done.stderr


def test_who_has_public_images_may_attack_with_what_they_say(run_dir):
  command = [f'--run_dir={run_dir}', '--iterations=3', '--xla=off', '--max_targets=1']
  prior = ['--preset=best_public', '--augment=mirror,turns']
  informed, not_at_all = run_all(
    'attack', [[*command, '--name=public', *prior], [*command, '--name=none', '--public_prior=0']]
  )
  for done, name, is_fitted in ((informed, 'public', True), (not_at_all, 'none', False)):
    assert done.returncode == 0, done.stderr
    config = json.loads((run_dir / 'attacks' / name / 'config.json').read_text())
    assert bool(config['all_settings']['gaussian_images']) == is_fitted
    facts = ' '.join(config['threat_model'])
    assert ('a Gaussian fitted to public images' in facts) == is_fitted
  config = json.loads((run_dir / 'attacks' / 'public' / 'config.json').read_text())
  values = math.prod(config['image_shape'])
  assert config['all_settings']['gaussian_images']['weight'] == pytest.approx(0.03 / values)
  assert config['attack']['augment'] == ['mirror', 'turns']
  again = run('attack', *command, '--name=public', *prior[:1], '--augment=mirror', '--resume')
  assert_one_error_line(again, '--resume: --augment')


@pytest.mark.usefixtures('summary')
def test_wrong_flags_end_in_one_line(run_dir, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(run_dir, other)
  config = json.loads((other / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps({**config, 'data_sha256': 'another'}))
  generator = tmp_path / 'generator'
  generator.mkdir()
  (generator / 'config.json').write_text(json.dumps({**config, 'program': 'train_shadow'}))
  again = tmp_path / 'again'
  shutil.copytree(run_dir, again)
  shutil.copy(
    again / 'truth' / 'round_00001.safetensors', again / 'truth' / 'round_00002.safetensors'
  )
  empty = tmp_path / 'empty'
  empty.mkdir()
  at = f'--run_dir={run_dir}'
  cases = [
    ([], '--run_dir'),
    (['--run_dir=/nowhere'], '--run_dir=/nowhere'),
    ([f'--run_dir={generator}'], 'tff-shadow-train'),
    ([f'--run_dir={empty}'], 'config.json'),
    ([at, '--name=../x'], '--name'),
    ([at, *_AUDIT], '--name=audit'),
    ([at, '--name=b', '--rounds=3'], '--rounds=3'),
    ([at, '--name=b', '--rounds=2', '--separate_rounds=1'], '--separate_rounds=1'),
    ([at, '--name=b', '--rounds=2', '--separate_rounds='], '--separate_rounds='),
    ([at, '--name=b', '--tolerated_db=-1'], '--tolerated_db'),
    ([at, '--name=b', '--delta=2'], '--delta'),
    ([at, '--name=b', '--generator=/nowhere.keras'], '--generator'),
    ([at, '--name=b', '--augment=colour'], '--augment'),
    ([at, '--resume', '--seed=5', *_AUDIT], '--seed'),
    ([at, '--name=b', f'--undefended_run_dir={run_dir}'], '--undefended_run_dir'),
    ([f'--run_dir={other}', '--name=b'], 'SHA-256'),
    ([f'--run_dir={again}', '--resume', *_AUDIT], '--resume: observations_sha256'),
  ]
  results = run_all('audit', [arguments for arguments, _ in cases])
  for (arguments, part), ended in zip(cases, results, strict=True):
    assert ended.returncode == 1, arguments
    assert_one_error_line(ended, part)
  assert not (run_dir / 'audits' / 'b').exists()
