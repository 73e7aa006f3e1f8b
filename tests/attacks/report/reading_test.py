import json

import pytest

from attacks.report import reading
from attacks.scoring.identification import identify
from tests.attacks import synthetic_run
from tests.attacks.scoring.lpips_reference import seeded_lpips
from tff_shadow.errors import UserError


def test_reads_every_attack_and_the_training(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=2, size=8)
  (directory / 'attacks' / 'pixels').rename(directory / 'attacks' / 'second')
  other = synthetic_run.write_run(tmp_path / 'other', targets=2, size=8, attack='first')
  (other / 'attacks' / 'first').rename(directory / 'attacks' / 'first')
  run = reading.read_run(directory)
  assert [attack.result.name for attack in run.attacks] == ['first', 'second']
  assert [len(attack.scores) for attack in run.attacks] == [2, 2]
  assert run.config['command'].startswith('tff-shadow-train')
  assert run.training.rounds == list(range(1, 21))
  assert list(run.training.curves) == ['train/loss', 'validation/f1', 'validation/accuracy']
  # The fixture validates every second round.
  assert [value is None for value in run.training.curves['validation/f1'][:4]] == [
    True,
    False,
    True,
    False,
  ]


def test_unfinished_attacks_are_left_out_and_named(tmp_path, caplog):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=2, size=8)
  for name in ('stopped', 'begun'):
    (directory / 'attacks' / name).mkdir()
    (directory / 'attacks' / name / 'config.json').write_text('{}')
  run = reading.read_run(directory)
  assert [attack.result.name for attack in run.attacks] == ['pixels']
  (warning,) = caplog.messages
  assert warning == f'{directory}: left out attacks without a result.json yet: begun, stopped'
  (directory / 'attacks' / 'pixels' / 'result.json').unlink()
  with pytest.raises(UserError, match=r'has a result\.json yet, of begun, pixels, stopped; go on'):
    reading.read_run(directory)


def test_gallery(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=3, size=8)
  other = synthetic_run.write_run(tmp_path / 'other', targets=4, size=8, seed=9)
  path = directory / 'attacks/pixels/result.json'
  result = json.loads(path.read_text())
  result['targets'] = result['targets'][:2]
  path.write_text(json.dumps(result))

  def choices(gallery):
    (attack,) = reading.read_run(directory, reading.Measures(gallery=gallery)).attacks
    return attack.identification.choices

  # Two were attacked, a third took part; another run has four more.
  assert choices(None) == 2
  assert choices(reading.RUN_GALLERY) == 3
  assert choices(str(other / 'truth')) == 6
  with pytest.raises(UserError, match=r'--gallery=.*no truth file'):
    choices(str(other))
  grey = synthetic_run.write_run(tmp_path / 'grey', targets=1, size=8, channels=1)
  with pytest.raises(UserError, match=r'no image of the size of those attacked, \[8, 8, 3\]'):
    choices(str(grey / 'truth'))


def test_lpips_identifies_beside_correlation(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=3, size=16)
  lpips = seeded_lpips(tmp_path, 'vgg')
  (attack,) = reading.read_run(directory, reading.Measures(lpips)).attacks
  assert attack.identification == identify(attack.result, attack.scores)
  assert attack.identification_by_lpips == identify(
    attack.result, attack.scores, distance=lpips.pairwise
  )
  assert attack.identification_by_lpips != attack.identification
  assert all(row.quality['attack'].lpips is not None for row in attack.scores)
  (plain,) = reading.read_run(directory).attacks
  assert plain.identification_by_lpips is None
  assert plain.identification == attack.identification


def test_training_and_config_are_optional(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=1, size=8)
  (directory / 'metrics.csv').unlink()
  (directory / 'config.json').unlink()
  run = reading.read_run(directory)
  assert (run.config, run.training) == (None, None)


def test_cells_that_are_no_numbers(tmp_path):
  path = tmp_path / 'metrics.csv'
  path.write_text('round,a,text,b\n3,nan,x,1e-3\n4,2,[1],inf\n')
  training = reading.read_training(path)
  assert training.rounds == [3, 4]
  assert training.curves == {'a': [None, 2.0], 'b': [0.001, None]}


def test_header_without_rows_is_no_training(tmp_path):
  path = tmp_path / 'metrics.csv'
  path.write_text('round,a\n')
  assert reading.read_training(path) is None


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'step,a\n1,2\n', 'must have a column "round"'),
    (b'', 'must have a column "round"'),
    (b'round,a\n1,2\nx,3\n', 'line 3: "round" must be an integer'),
    (b'round,a\n\xff\xfe,3\n', 'not readable as CSV'),
  ],
)
def test_damaged_metrics(tmp_path, content, message):
  path = tmp_path / 'metrics.csv'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    reading.read_training(path)
  assert str(path) in str(caught.value)


def test_not_a_run_directory(tmp_path):
  with pytest.raises(UserError, match='directory not found'):
    reading.read_run(tmp_path / 'absent')
  with pytest.raises(UserError, match='no attack under'):
    reading.read_run(tmp_path)
