import json

import pytest

from binaries.run_directory import claim, read_config
from tff_shadow.errors import UserError

_CONFIG = {'program': 'train', 'flags': {'seed': 1, 'rounds': 5, 'observed_rounds': ['1']}}


def test_new_directory_is_claimed_once(tmp_path):
  run_dir = tmp_path / 'a' / 'b'
  claim(run_dir, _CONFIG, resume=False, may_change=frozenset())
  written = read_config(run_dir)
  assert written['flags'] == _CONFIG['flags']
  assert 'tensorflow' in written['versions']
  with pytest.raises(UserError, match='exists already'):
    claim(run_dir, _CONFIG, resume=False, may_change=frozenset())


def test_resume_checks_flags_and_everything_else(tmp_path):
  claim(tmp_path / 'r', _CONFIG, resume=False, may_change=frozenset())
  more = {**_CONFIG, 'flags': {**_CONFIG['flags'], 'rounds': 9}}
  with pytest.raises(UserError, match='--rounds=5, now it is 9'):
    claim(tmp_path / 'r', more, resume=True, may_change=frozenset())
  claim(tmp_path / 'r', more, resume=True, may_change=frozenset({'rounds'}))
  assert read_config(tmp_path / 'r')['flags']['rounds'] == 9
  with pytest.raises(UserError, match='program of the run'):
    claim(tmp_path / 'r', {**more, 'program': 'other'}, resume=True, may_change=frozenset())


def test_resume_without_a_run_and_damaged_config(tmp_path):
  with pytest.raises(UserError, match='not a run directory'):
    claim(tmp_path, _CONFIG, resume=True, may_change=frozenset())
  (tmp_path / 'config.json').write_text(json.dumps([1]))
  with pytest.raises(UserError, match='damaged'):
    read_config(tmp_path)
