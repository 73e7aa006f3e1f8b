import numpy as np
import pytest

from attacks.scoring import gallery, results
from tests.attacks import synthetic_run
from tff_shadow.errors import UserError
from tff_shadow.observations import Truth, write_truth


def _truth(images):
  count = len(images)
  return Truth(images, np.zeros(count, np.int32), np.ones((count, 8, 8, 1), np.float32))


def test_reads_all_rounds_and_clients(tmp_path):
  images = synthetic_run.photographs(5, 8, 1)
  first = {'a': _truth(images[:1]), 'b': _truth(images[1:3])}
  write_truth(tmp_path / 'round_00001.safetensors', 1, first)
  write_truth(tmp_path / 'round_00002.safetensors', 2, {'a': _truth(images[3:])})
  np.testing.assert_array_equal(gallery.read_gallery(tmp_path), images)


def test_mistakes_take_one_line(tmp_path):
  with pytest.raises(UserError, match=f'--gallery={tmp_path}: no truth file'):
    gallery.read_gallery(tmp_path)
  path = tmp_path / 'round_00001.safetensors'
  write_truth(path, 1, {'a': _truth(np.full((1, 8, 8, 1), np.nan, np.float32))})
  with pytest.raises(UserError, match='a/images must be finite') as caught:
    gallery.read_gallery(tmp_path)
  assert str(path) in str(caught.value)
  path.write_bytes(b'')
  with pytest.raises(UserError, match='not readable as safetensors'):
    gallery.read_gallery(tmp_path)


def test_a_gallery_must_have_the_size_of_the_attacked(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=1, size=8)
  attack = results.load_attack(directory, 'pixels')
  other = list(synthetic_run.photographs(2, 8, 1))
  with pytest.raises(UserError, match=r'--gallery=x: no image of the size .* \[8, 8, 3\]'):
    gallery.check_gallery(attack, other, 'x')
  gallery.check_gallery(attack, [*other, np.zeros((8, 8, 3), np.float32)], 'x')
