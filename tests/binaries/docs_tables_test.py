import pytest

from binaries import docs_tables
from tests.binaries.programs import ROOT
from tff_shadow.errors import UserError


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('name', ['README.md', 'docs/results.md'])
def test_the_page_has_what_the_files_have(name):
  page = (ROOT / name).read_text()
  tables = page.count('<!-- table: ') + page.count('<!-- overview: ')
  assert tables == page.count('<!-- end of table -->') > 0
  assert docs_tables.with_tables(page) == page


def test_a_table_stands_between_its_marks():
  mark = '<!-- table: results/audit_batch4.csv, against decoy scale 3, fresh -->'
  page = f'Before.\n{mark}\nold\n<!-- end of table -->\nAfter.\n'
  made = docs_tables.with_tables(page)
  lines = made.splitlines()
  assert (lines[:2], lines[-2:]) == (['Before.', mark], ['<!-- end of table -->', 'After.'])
  assert 'More than decoy scale 3, fresh' in lines[3]
  assert 'old' not in made
  assert sum('histology_patches' in line for line in lines) >= 4
  assert docs_tables.with_tables(made) == made


def test_an_overview_stands_in_a_list():
  page = '* This:\n\n  <!-- overview: results/audit.csv -->\n  <!-- end of table -->\n* That.\n'
  lines = docs_tables.with_tables(page).splitlines()
  assert lines[4].startswith('  | Defence | chest_phantom | fundus_patches | histology_patches |')
  assert lines[-3:] == ['', '  <!-- end of table -->', '* That.']
  assert docs_tables.with_tables('\n'.join(lines)).splitlines() == lines


def test_a_file_that_is_not_there_is_named():
  page = '<!-- table: results/none.csv, against x -->\n<!-- end of table -->\n'
  with pytest.raises(UserError, match=r'results/none\.csv: no rows'):
    docs_tables.with_tables(page)
