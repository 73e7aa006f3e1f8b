import pytest

from attacks.report import reading
from tests.attacks import synthetic_run
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
