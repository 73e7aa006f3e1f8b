import pytest

from attacks.sources import attacks_digest, digest_of


@pytest.fixture
def package(tmp_path):
  for name in ('engine.py', 'audit/suite.py', 'audit/page.py', 'report/findings.py'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('pass')
  return tmp_path


@pytest.mark.parametrize(
  ('name', 'same'),
  [
    ('engine.py', False),
    ('audit/suite.py', False),
    ('audit/new.py', False),
    ('audit/page.py', True),
    ('report/findings.py', True),
    ('report/style.css', True),
  ],
)
def test_the_digest_follows_what_makes_results(package, name, same):
  before = digest_of(package)
  (package / name).write_text('changed')
  assert (digest_of(package) == before) == same


def test_a_file_that_moves_changes_the_digest(package):
  before = digest_of(package)
  (package / 'engine.py').rename(package / 'solver.py')
  assert digest_of(package) != before


def test_the_package_has_one():
  assert len(attacks_digest()) == 64
