import numpy as np
import pytest
from PIL import Image

from tff_shadow.data import load_published
from tff_shadow.errors import UserError


def _image(folder, name, seed):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)
  Image.fromarray(pixels).save(path)


def _manifest(path, *rows):
  path.write_text('\n'.join(rows) + '\n')


@pytest.fixture
def chest(tmp_path):
  """Two of the nine clients, in the form of the authors' files."""
  folder = tmp_path / 'Chest_X-ray'
  for k in range(4):
    _image(folder, f'COVID/images/COVID-{k}.png', k)
    _image(folder, f'Normal/images/Normal-{k}.png', 10 + k)
  covid, normal = (
    '../data/Chest_X-ray/COVID/images/COVID-',
    '../data/Chest_X-ray/Normal/images/Normal-',
  )
  head = 'img_path,label,client'
  rows = (f'{normal}0.png,0,8', f'{covid}0.png,1,0', f'{normal}0.png,0,0', f'{covid}1.png,1,0')
  _manifest(folder / 'Chest_Xray_train.csv', head, *rows)
  rows = (f'{covid}2.png,1,0', f'{normal}2.png,0,0', f'{covid}2.png,1,8', f'{normal}2.png,0,8')
  _manifest(folder / 'Chest_Xray_val.csv', head, *rows)
  _manifest(folder / 'Chest_Xray_test.csv', 'img_path,label', f'{covid}3.png,1', f'{normal}3.png,0')
  return folder


def test_clients_are_those_of_the_authors(chest):
  data = load_published('chestxray', chest, image_size=16)
  assert data.image_shape == (16, 16, 3)
  assert {name: len(own) for name, own in data.clients.items()} == {'0': 3, '8': 1}
  assert list(data.clients) == ['0', '8']
  # The one image of client 8 is also one of client 0.
  np.testing.assert_array_equal(data.clients['8'].images[0], data.clients['0'].images[1])
  assert data.clients['0'].labels.tolist() == [1, 0, 1]
  assert (len(data.validation), len(data.test)) == (4, 2)
  assert data.class_names == ('0', '1')


def test_eyes_have_another_folder_and_other_names(tmp_path):
  for k in range(5):
    _image(tmp_path, f'RG/TRAIN{k}.jpg', k)
  path = '../data/EyePACS_AIROGS/RG/TRAIN'
  head = 'img_path,label,client'
  _manifest(tmp_path / 'eye_train.csv', head, f'{path}0.jpg,0,6', f'{path}1.jpg,1,0')
  _manifest(tmp_path / 'eye_val.csv', head, f'{path}2.jpg,1,3')
  _manifest(tmp_path / 'eye_test.csv', 'img_path,label', f'{path}3.jpg,0')
  assert list(load_published('eyepacs', tmp_path, image_size=16).clients) == ['0', '6']


def test_mistakes_name_the_file(chest, caplog):
  with pytest.raises(UserError, match=r'eye_train\.csv is missing.*EyePACS'):
    load_published('eyepacs', chest, image_size=16)
  with pytest.raises(UserError, match="'chest' is unknown: use one of chestxray, eyepacs"):
    load_published('chest', chest, image_size=16)
  test = chest / 'Chest_Xray_test.csv'
  _manifest(test, 'img_path,label', 'COVID/images/COVID-3.png,1')
  with pytest.raises(UserError, match=r"row 2: path 'COVID.*does not begin with '../data/Chest"):
    load_published('chestxray', chest, image_size=16)
  _manifest(test, 'img_path,label', '../data/Chest_X-ray/COVID/images/COVID-0.png,1')
  with pytest.raises(UserError, match='leaks train into test'):
    load_published('chestxray', chest, image_size=16)
  _manifest(test, 'img_path,label', '../data/Chest_X-ray/../../x.png,1')
  with pytest.raises(UserError, match='leaves the image root'):
    load_published('chestxray', chest, image_size=16)
  # The same picture under another name: told, but the published lists are what they are.
  copy = chest / 'COVID/images/COVID-9.png'
  copy.write_bytes((chest / 'COVID/images/COVID-0.png').read_bytes())
  _manifest(test, 'img_path,label', '../data/Chest_X-ray/COVID/images/COVID-9.png,1')
  load_published('chestxray', chest, image_size=16)
  assert 'COVID-9.png has the same content as COVID-0.png' in caplog.text
