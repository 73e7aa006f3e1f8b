"""Which version of the attacks made what is kept: nothing is reused that other code has made."""

import functools
import hashlib
import pathlib

# What only shows results and makes none.
_SHOWS = ('report/', 'audit/page.py', 'audit/comparison.py', 'audit/comparison_page.py')


@functools.cache
def attacks_digest() -> str:
  """Of the sources of this package, as they were when it was first asked for."""
  return digest_of(pathlib.Path(__file__).parent)


def digest_of(package: pathlib.Path) -> str:
  """SHA-256 of names and contents of all Python files in `package` but those that only show."""
  sha = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    name = path.relative_to(package).as_posix()
    if not name.startswith(_SHOWS):
      sha.update(f'{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n'.encode())
  return sha.hexdigest()
