"""Tables that are measured in parts."""

import pytest

from binaries.tables import RowCache, read_rows, write_table
from tff_shadow.errors import UserError

_COLUMNS = ('name', 'value')


def test_rows_measured_elsewhere_stay(tmp_path):
  path = tmp_path / 'table.csv'
  write_table(path, _COLUMNS, [{'name': 'a', 'value': 1}, {'name': '2', 'value': 2}], key=('name',))
  write_table(path, _COLUMNS, [{'name': 2, 'value': 3}, {'name': 'c', 'value': 4}], key=('name',))
  expected = [('a', '1'), ('2', '3'), ('c', '4')]
  assert [tuple(row.values()) for row in read_rows(path)] == expected
  assert path.read_text().startswith('# command: ')
  write_table(path, _COLUMNS, [{'name': 'd', 'value': 5}])
  assert [tuple(row.values()) for row in read_rows(path)] == [('d', '5')]


def test_a_cache_of_an_earlier_version_is_named(tmp_path):
  path = tmp_path / 'cache.csv'
  RowCache(path, _COLUMNS).add([{'name': 'a', 'value': 1}])
  assert RowCache(path, _COLUMNS).done(('name',)) == {('a',)}
  with pytest.raises(UserError, match=r"cache\.csv: has no column 'seed'"):
    RowCache(path, (*_COLUMNS, 'seed'))
