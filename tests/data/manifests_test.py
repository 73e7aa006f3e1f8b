import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tff_shadow.data import Partition, load_manifests, manifests
from tff_shadow.errors import UserError

HEADERS = {
  'train': 'img_path,label,client',
  'validation': 'img_path,label',
  'test': 'img_path,label',
}


@pytest.fixture
def root(tmp_path):
  """A folder of 12 grey images, p00.png to p11.png, 40x20 px, and three good manifests."""
  folder = tmp_path / 'images'
  (folder / 'sub').mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(12):
    pixels = rng.integers(0, 256, (20, 40), np.uint8)
    Image.fromarray(pixels).save(folder / (f'p{i:02d}.png' if i else 'sub/p00.png'))
  write(tmp_path, 'train', 'sub/p00.png,0,a', 'p01.png,1,b', 'p02.png,0,b', 'p03.png,1,a')
  write(tmp_path, 'validation', 'p04.png,0', 'p05.png,1')
  write(tmp_path, 'test', 'p06.png,1', 'p07.png,0')
  return folder


def write(folder, split, *rows, header=None):
  text = '\n'.join([HEADERS[split] if header is None else header, *rows]) + '\n'
  (folder / f'{split}.csv').write_text(text)


def load(root, **options):
  paths = [root.parent / f'{split}.csv' for split in HEADERS]
  return load_manifests(*paths, root, **({'image_size': 16} | options))


def test_clients_come_from_the_manifest(root):
  data = load(root)
  assert list(data.clients) == ['a', 'b']
  assert [len(examples) for examples in data.clients.values()] == [2, 2]
  assert data.clients['a'].labels.tolist() == [0, 1]
  assert data.image_shape == (16, 16, 1)
  assert data.class_names == ('0', '1')
  assert data.test.labels.tolist() == [1, 0]
  assert (data.test.regions == 255).all()
  assert load(root).digest() == data.digest()


def test_other_partitions_need_no_client_column(root):
  write(root.parent, 'train', 'p01.png,1', 'p02.png,0', 'p03.png,1', header='img_path,label')
  data = load(root, partition=Partition.parse('iid:3'))
  assert list(data.clients) == ['client_00', 'client_01', 'client_02']
  with pytest.raises(UserError, match="column 'client' is missing"):
    load(root)


def test_one_colour_image_makes_all_rgb(root):
  Image.new('RGB', (30, 30), (255, 0, 0)).save(root / 'p04.png')
  assert load(root).image_shape == (16, 16, 3)
  assert load(root, color='gray').image_shape == (16, 16, 1)


def test_a_validation_manifest_may_name_clients(root):
  write(root.parent, 'validation', 'p04.png,0,a', 'p05.png,1,zz', header='img_path,label,client')
  assert len(load(root).validation) == 2


def test_regions_are_read_and_fitted(root):
  mask = np.zeros((20, 40), np.uint8)
  mask[:, :20] = 255
  Image.fromarray(mask).save(root / 'mask.png')
  write(
    root.parent, 'test', 'p06.png,1,mask.png', 'p07.png,0,', header='img_path,label,region_path'
  )
  data = load(root)
  region = data.test.regions[0, ..., 0]
  assert (region[4:12, :6] == 255).all()
  assert not region[:4].any()
  assert not region[:, 10:].any()
  assert (data.test.regions[1] == 255).all()
  Image.fromarray(mask[:10]).save(root / 'mask.png')
  with pytest.raises(UserError, match=r'test\.csv, row 2: region mask\.png is 40x10 px'):
    load(root)


@pytest.mark.parametrize(
  ('dtype', 'value', 'expected'),
  [(np.uint8, 1, 255), (np.uint8, 255, 255), (np.uint16, 1, 255), (np.uint16, 0, 0)],
)
def test_regions_may_be_label_maps_or_empty(root, dtype, value, expected):
  mask = np.zeros((20, 40), dtype)
  mask[:, :20] = value
  Image.fromarray(mask).save(root / 'mask.png')
  write(root.parent, 'test', 'p06.png,1,mask.png', header='img_path,label,region_path')
  region = load(root).test.regions[0, ..., 0]
  assert (region[4:12, :6] == expected).all()
  assert not region[:, 10:].any()


def test_a_label_map_of_several_classes_names_its_row(root):
  Image.fromarray(np.arange(800, dtype=np.uint8).reshape(20, 40) % 3).save(root / 'mask.png')
  write(root.parent, 'test', 'p06.png,1,mask.png', header='img_path,label,region_path')
  with pytest.raises(UserError, match=r'test\.csv, row 2: mask\.png: a region with .* up to 2 is'):
    load(root)


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('gone.png,0,a', r'gone\.png: there is no such file'),
    ('broken.png,0,a', r'broken\.png: not a readable image'),
    ('broken.dcm,0,a', r'broken\.dcm: not a readable DICOM'),
    ('../train.csv,0,a', 'leaves the image root'),
    ('sub/../../x.png,0,a', 'leaves the image root'),
    ('sub\\..\\..\\x.png,0,a', 'leaves the image root'),
    ('/etc/passwd,0,a', 'absolute'),
    ('C:\\x.png,0,a', 'absolute'),
    ('link.png,0,a', 'link that leaves'),
    (',0,a', 'not a file name'),
    ('p08.png,cat,a', "label 'cat' is not a whole number"),
    ('p08.png,-1,a', "label '-1' is not a whole number"),
    ('p08.png,1.0,a', "label '1.0' is not a whole number"),
    ('p08.png,,a', "label '' is not a whole number"),
    ('p08.png,0,', "client '' must be"),
    ('p08.png,0,a/b', "client 'a/b' must be"),
    ('p08.png,0,aggregate', "client 'aggregate' is the name of the mean"),
    ('p08.png,0', '2 fields under 3 columns'),
    ('p08.png,0,a,x', '4 fields under 3 columns'),
    ('p01.png,0,a', r'p01\.png is already listed in .*train\.csv, row 2'),
    ('"p08.png,0,a', 'not CSV'),
  ],
)
def test_a_bad_row_is_named(root, row, message):
  for name in ('broken.png', 'broken.dcm'):
    (root / name).write_bytes(b'nonsense')
  os.symlink(root.parent / 'train.csv', root / 'link.png')
  write(root.parent, 'train', 'p01.png,0,a', 'p02.png,1,a', row)
  with pytest.raises(UserError, match=message) as caught:
    load(root)
  assert f'manifest {root.parent / "train.csv"}, row 4' in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('split', 'header', 'message'),
  [
    ('train', 'img_path,label', "column 'client' is missing"),
    ('train', 'path,label,client', "column 'img_path' is missing"),
    ('train', 'img_path,label,client,age', "unknown column 'age'"),
    ('train', 'img_path,label,client,label', "column 'label' appears twice"),
    ('validation', 'img_path', "column 'label' is missing"),
    ('test', 'img_path,label,client', "unknown column 'client'"),
    ('test', '', 'is empty'),
    ('test', 'img_path,label', 'is empty'),
  ],
)
def test_a_bad_header_is_named(root, split, header, message):
  write(root.parent, split, header=header)
  with pytest.raises(UserError, match=message) as caught:
    load(root)
  assert f'{split}.csv' in str(caught.value)


def test_missing_files_and_folders(root):
  with pytest.raises(UserError, match='is not a folder'):
    load_manifests('a', 'b', 'c', root / 'gone', image_size=16)
  (root.parent / 'test.csv').unlink()
  with pytest.raises(UserError, match=r'test\.csv: there is no such file'):
    load(root)
  (root.parent / 'test.csv').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UserError, match='UTF-8'):
    load(root)


def test_a_leak_by_path_or_by_content_is_refused(root):
  write(root.parent, 'test', 'p06.png,1', './p01.png,1')
  with pytest.raises(UserError, match=r'test\.csv, row 3: p01\.png .* leaks train into test'):
    load(root)
  (root / 'copy.png').write_bytes((root / 'p05.png').read_bytes())
  write(root.parent, 'test', 'copy.png,1')
  with pytest.raises(UserError, match=r'test\.csv, row 2: .* leaks validation into test'):
    load(root)


def test_labels_must_be_known_and_without_gaps(root):
  write(root.parent, 'test', 'p06.png,1', 'p07.png,2')
  with pytest.raises(UserError, match=r'test\.csv, row 3: label 2 is unknown: train has 0\.\.1'):
    load(root)
  write(root.parent, 'train', 'p00.png,0,a', 'p01.png,2,a')
  with pytest.raises(UserError, match=r'train\.csv: labels must be 0\.\.K-1'):
    load(root)
  write(root.parent, 'train', 'p00.png,0,a', 'p01.png,0,a')
  with pytest.raises(UserError, match='K at least 2'):
    load(root)


def test_settings_are_checked_first(root):
  with pytest.raises(UserError, match='image size 4'):
    load(root, image_size=4)
  with pytest.raises(UserError, match=r'5 .* 4'):
    load(root, partition=Partition.parse('iid:5'))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.one_of(st.text(), st.text().map(lambda text: 'img_path,label,client\n' + text)))
def test_any_text_is_rows_or_a_user_error(tmp_path, text):
  path = tmp_path / 'train.csv'
  path.write_text(text, encoding='utf-8', errors='replace')
  try:
    rows = manifests.read_manifest(path, tmp_path, 'train')
  except UserError:
    return
  assert rows
  for row in rows:
    assert row.image.is_relative_to(tmp_path.resolve())
    assert row.label >= 0
    assert row.client


NAMES = st.from_regex(r'[a-z0-9][a-z0-9 ,"_-]{0,8}\.png', fullmatch=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
  st.lists(
    st.tuples(NAMES, st.integers(0, 99), st.from_regex(r'[a-z][a-z0-9_.-]{0,5}', fullmatch=True)),
    min_size=1,
    max_size=8,
  )
)
def test_what_is_written_is_read_back(tmp_path, listed):
  path = tmp_path / 'train.csv'
  with path.open('w', newline='', encoding='utf-8') as file:
    writer = manifests.csv.writer(file)
    writer.writerow(['img_path', 'label', 'client'])
    writer.writerows(listed)
  rows = manifests.read_manifest(path, tmp_path, 'train')
  assert [(row.image.name, row.label, row.client) for row in rows] == listed
  assert [row.where.split(', row ')[1] for row in rows] == [
    str(number + 2) for number in range(len(listed))
  ]
