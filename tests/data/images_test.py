import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from tff_shadow.data import images
from tff_shadow.errors import UserError

RAMP = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48)


def write_dicom(path, pixels, photometric='MONOCHROME2', **fields):
  dataset = pydicom.Dataset()
  dataset.file_meta = pydicom.dataset.FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
  dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = '1.2.3'
  dataset.Rows, dataset.Columns = pixels.shape[:2]
  dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
  if pixels.ndim == 3:
    dataset.PlanarConfiguration = 0
  dataset.PhotometricInterpretation = photometric
  dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
  dataset.HighBit = dataset.BitsStored - 1
  dataset.PixelRepresentation = 0
  dataset.PixelData = pixels.tobytes()
  for name, value in fields.items():
    setattr(dataset, name, value)
  dataset.save_as(path, enforce_file_format=True)
  return path


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_png_and_jpeg(suffix, mode, tmp_path):
  path = tmp_path / f'a.{suffix}'
  pixels = np.full((20, 30) if mode == 'L' else (20, 30, 3), 77, np.uint8)
  Image.fromarray(pixels).save(path)
  read = images.read_image(path)
  assert read.dtype == np.uint8
  assert read.shape == (20, 30, 1 if mode == 'L' else 3)
  assert np.abs(read.astype(int) - 77).max() <= 1


def test_sixteen_bit_png_is_scaled(tmp_path):
  Image.fromarray(RAMP).save(tmp_path / 'a.png')
  read = images.read_image(tmp_path / 'a.png')
  assert read.shape == (64, 48, 1)
  assert (read.min(), read.max()) == (0, 255)


def test_palette_and_transparent_images_become_rgb(tmp_path):
  Image.new('RGBA', (20, 20), (10, 20, 30, 0)).save(tmp_path / 'a.png')
  assert images.read_image(tmp_path / 'a.png')[0, 0].tolist() == [10, 20, 30]
  Image.new('RGB', (20, 20), (10, 20, 30)).quantize().save(tmp_path / 'p.png')
  assert images.read_image(tmp_path / 'p.png')[0, 0].tolist() == [10, 20, 30]


def write_mask(path, pixels, mode='L'):
  if path.suffix == '.dcm':
    return write_dicom(path, pixels)
  Image.fromarray(pixels).convert(mode).save(path)
  return path


BITS = pytest.mark.parametrize(
  ('name', 'dtype'),
  [('a.png', np.uint8), ('a.png', np.uint16), ('a.dcm', np.uint8), ('a.dcm', np.uint16)],
)


@BITS
@pytest.mark.parametrize('full', [1, 255])
def test_a_label_map_of_ones_is_a_full_region(name, dtype, full, tmp_path):
  mask = np.zeros((20, 30), dtype)
  mask[5:, 10:] = full
  read = images.read_region(write_mask(tmp_path / name, mask))
  assert read.dtype == np.uint8
  np.testing.assert_array_equal(read[..., 0], (mask > 0) * 255)


@BITS
@pytest.mark.parametrize(('value', 'expected'), [(0, 0), (1, 255), (200, 255), (255, 255)])
def test_a_region_of_one_value_is_all_or_nothing(name, dtype, value, expected, tmp_path):
  path = write_mask(tmp_path / name, np.full((20, 30), value, dtype))
  read = images.read_region(path)
  assert read.shape == (20, 30, 1)
  assert (read == expected).all()


@BITS
def test_a_region_of_several_classes_is_refused(name, dtype, tmp_path):
  path = write_mask(tmp_path / name, (np.indices((20, 30)).sum(0) % 4).astype(dtype))
  with pytest.raises(UserError, match=r'up to 3 is a label map of several classes: write 255'):
    images.read_region(path)


def test_shades_and_colours_of_a_region(tmp_path):
  shades = np.arange(200, dtype=np.uint8).reshape(20, 10)
  read = images.read_region(write_mask(tmp_path / 'a.png', shades))
  np.testing.assert_array_equal(read[..., 0], shades)
  blue = np.zeros((20, 30, 3), np.uint8)
  blue[:10, :, 2] = 255
  read = images.read_region(write_mask(tmp_path / 'b.png', blue, 'RGB'))
  np.testing.assert_array_equal(read[..., 0], blue[..., 2])
  np.testing.assert_array_equal(
    images.as_region(np.float32([[[0], [0.5], [1]]])).ravel(), [0, 128, 255]
  )


@pytest.mark.parametrize('background', [0, 1])
def test_colours_of_a_palette_are_classes_of_a_region(background, tmp_path):
  mask = np.full((20, 30), background, np.uint8)
  mask[5:, 10:] = 1 - background
  picture = Image.fromarray(mask, 'P')
  dark_red = [128, 0, 0]
  picture.putpalette([0, 0, 0, *dark_red] if background == 0 else [*dark_red, 0, 0, 0])
  picture.save(tmp_path / 'a.png')
  read = images.read_region(tmp_path / 'a.png')
  np.testing.assert_array_equal(read[..., 0], (mask != background) * 255)
  np.testing.assert_array_equal(
    images.read_image(tmp_path / 'a.png').max(axis=-1), read[..., 0] / 255 * 128
  )
  mask[:3] = 2
  picture = Image.fromarray(mask, 'P')
  picture.putpalette([0, 0, 0, *dark_red, 0, 128, 0])
  picture.save(tmp_path / 'b.png')
  with pytest.raises(UserError, match=r'2 colours beside black .* paint what is sensitive in one'):
    images.read_region(tmp_path / 'b.png')


def test_a_palette_of_greys_has_shades(tmp_path):
  shades = np.arange(0, 200, dtype=np.uint8).reshape(20, 10)
  Image.fromarray(shades).quantize(256).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(images.read_region(tmp_path / 'a.png')[..., 0], shades)


def test_bad_files(tmp_path):
  with pytest.raises(UserError, match='no such file'):
    images.read_image(tmp_path / 'a.png')
  for name in ('a.png', 'a.jpg', 'a.dcm'):
    (tmp_path / name).write_bytes(b'not an image')
    with pytest.raises(UserError, match='not a readable'):
      images.read_image(tmp_path / name)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(
    tmp_path / 'whole.png'
  )
  (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:600])
  with pytest.raises(UserError, match='not a readable image'):
    images.read_image(tmp_path / 'cut.png')


def test_fit_keeps_the_aspect_and_fills_with_black():
  image = np.full((40, 80, 1), 200, np.uint8)
  fitted = images.fit(image, 32)
  assert fitted.shape == (32, 32, 1)
  assert not fitted[:8].any()
  assert not fitted[24:].any()
  assert (fitted[8:24] == 200).all()
  square = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  np.testing.assert_array_equal(images.fit(square, 32), square)


def test_fit_is_antialiased():
  checkers = (np.indices((320, 320)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
  # Without a filter this would be all black or all white.
  assert np.abs(images.fit(checkers, 32).astype(int) - 127).max() <= 2


@pytest.mark.parametrize('shape', [(512, 400), (400, 777), (33, 32), (32, 20), (90, 2000)])
def test_nothing_sensitive_fades_when_a_region_is_made_smaller(shape):
  rng = np.random.default_rng(0)
  for _ in range(5):
    row, column = rng.integers(shape)
    region = np.zeros((*shape, 1), np.uint8)
    region[row, column] = 200
    fitted = images.fit_region(region, 32)[..., 0]
    # Where its image shows it.
    height, width = [max(1, round(side * 32 / max(shape))) for side in shape]
    at = (
      (32 - height) // 2 + int((row + 0.5) * height / shape[0]),
      (32 - width) // 2 + int((column + 0.5) * width / shape[1]),
    )
    assert fitted[at] == 200
    assert set(np.unique(fitted)) == {0, 200}
    assert (fitted > 0).sum() <= 9


def test_stack_decides_the_channels_once():
  gray, rgb = np.full((4, 4, 1), 9, np.uint8), np.full((4, 4, 3), 9, np.uint8)
  assert images.stack([gray, gray], 'native').shape == (2, 4, 4, 1)
  assert images.stack([gray, rgb], 'native').shape == (2, 4, 4, 3)
  assert images.stack([gray, gray], 'rgb').shape == (2, 4, 4, 3)
  np.testing.assert_array_equal(images.stack([gray, rgb], 'gray'), np.full((2, 4, 4, 1), 9))


def test_size_and_color_are_checked():
  images.check_size_and_color(16, 'native')
  with pytest.raises(UserError, match='image size 15'):
    images.check_size_and_color(15, 'native')
  with pytest.raises(UserError, match='sepia'):
    images.check_size_and_color(32, 'sepia')


def test_dicom_is_scaled_and_monochrome1_inverted(tmp_path):
  plain = images.read_image(write_dicom(tmp_path / 'a.dcm', RAMP))
  assert plain.shape == (64, 48, 1)
  assert (plain[0, 0, 0], plain[-1, -1, 0]) == (0, 255)
  inverted = images.read_image(write_dicom(tmp_path / 'b.dcm', RAMP, 'MONOCHROME1'))
  np.testing.assert_allclose(inverted, 255.0 - plain, atol=1)


def test_dicom_window_and_rescale(tmp_path):
  read = images.read_image(
    write_dicom(
      tmp_path / 'a.dcm',
      RAMP,
      RescaleSlope=2,
      RescaleIntercept=-1000,
      WindowCenter=1000,
      WindowWidth=200,
    )
  )[..., 0]
  hounsfield = RAMP.astype(float) * 2 - 1000
  assert (read[hounsfield < 895] == 0).all()
  assert (read[hounsfield > 1105] == 255).all()
  assert abs(int(read[hounsfield == 1000][0]) - 128) <= 2


@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
def test_dicom_padding_is_black_and_does_not_squeeze_the_range(photometric, tmp_path):
  pixels = 1000 + RAMP % 100
  pixels[:8] = 65535
  # The element is ambiguous (US or SS); as bytes it needs the value representation.
  path = write_dicom(tmp_path / 'a.dcm', pixels, photometric, PixelPaddingValue=65535)
  read = images.read_image(path)[..., 0]
  assert not read[:8].any()
  assert len(np.unique(read[8:])) == 100


def test_dicom_colour(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
  read = images.read_image(write_dicom(tmp_path / 'a.dcm', pixels, 'RGB'))
  np.testing.assert_array_equal(read, pixels)


def test_dicom_errors(tmp_path):
  with pytest.raises(UserError, match='single grey value'):
    images.read_image(write_dicom(tmp_path / 'a.dcm', np.ones((20, 20), np.uint16)))
  with pytest.raises(UserError, match='cannot be decoded'):
    images.read_image(write_dicom(tmp_path / 'b.dcm', RAMP, Rows=100))
  with pytest.raises(UserError, match='2 frames'):
    images.read_image(write_dicom(tmp_path / 'c.dcm', RAMP, Rows=32, NumberOfFrames=2))


@pytest.mark.parametrize('name', ['IM0001', 'a.img'])
def test_dicom_is_known_by_its_content(name, tmp_path):
  read = images.read_image(write_dicom(tmp_path / name, RAMP))
  np.testing.assert_array_equal(read, images.read_image(write_dicom(tmp_path / 'a.dcm', RAMP)))
  (tmp_path / 'short').write_bytes(b'DICM')
  with pytest.raises(UserError, match='not a readable image'):
    images.read_image(tmp_path / 'short')


@pytest.mark.parametrize('name', ['CT_small.dcm', 'MR_small.dcm'])
def test_real_dicom(name):
  path = pydicom.data.get_testdata_file(name, download=False)
  read = images.read_image(images.pathlib.Path(path))
  assert read.shape[-1] == 1
  assert (read.min(), read.max()) == (0, 255)


def test_odd_real_dicom_is_read_or_a_user_error(caplog, recwarn):
  outcomes = {'read': 0, 'refused': 0}
  folder = images.pathlib.Path(pydicom.data.get_testdata_file('CT_small.dcm', download=False))
  for path in sorted(folder.parent.glob('*.dcm')):
    try:
      read = images.read_image(path)
    except UserError:
      outcomes['refused'] += 1
      continue
    assert read.dtype == np.uint8
    assert read.shape[-1] in (1, 3)
    outcomes['read'] += 1
  assert outcomes['read'] > 10
  assert outcomes['refused'] > 3
  # pydicom reports such files with tracebacks, which are not for the user.
  assert not caplog.records
  assert not recwarn.list


@pytest.mark.parametrize(('suffix', 'frames'), [('tiff', 2), ('gif', 3), ('tiff', 1)])
def test_a_stack_is_refused(suffix, frames, tmp_path):
  path = tmp_path / f'a.{suffix}'
  made = [Image.fromarray(np.full((20, 20), 40 * k, np.uint8)) for k in range(frames)]
  made[0].save(path, save_all=True, append_images=made[1:])
  if frames == 1:
    assert images.read_image(path).shape == (20, 20, 1)
    return
  with pytest.raises(UserError, match=f'holds {frames} frames: export one image a file'):
    images.read_image(path)


def test_an_image_is_turned_as_it_says(tmp_path):
  pixels = np.zeros((16, 24, 3), np.uint8)
  pixels[:8, :8] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # To be shown turned by 90 degrees, clockwise.
  Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
  turned = images.read_image(tmp_path / 'a.png')
  np.testing.assert_array_equal(turned, np.rot90(pixels, -1))
