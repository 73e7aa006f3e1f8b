"""Reading the pixels of a DICOM file for display."""

import contextlib
import logging
import pathlib
import warnings

import numpy as np
import pydicom
from pydicom import pixels as dicom_pixels

from tff_shadow.errors import UserError

SUFFIXES = ('.dcm', '.dicom')


def is_dicom(path: pathlib.Path) -> bool:
  """Whether the file says so itself: archives export DICOM under names without a suffix."""
  with path.open('rb') as file:
    return file.read(132)[128:] == b'DICM'


@contextlib.contextmanager
def _quiet():
  """Keeps pydicom's own warnings and tracebacks off the terminal: our error says it in a line."""
  logger = logging.getLogger('pydicom')
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logger.setLevel(level)


@_quiet()
def read_dicom(path: pathlib.Path) -> np.ndarray:
  """Reads one frame as float64 [H, W, 1] if it is grey, as uint8 [H, W, 3] if it has colour.

  Grey images pass the modality LUT or rescale, then the VOI LUT or the first window if there is
  one; MONOCHROME1 is inverted so that dense is bright; padding becomes the lowest value of the
  rest. Their range is their own. Colour images are brought to RGB. Only pixels are returned: no
  patient data leaves this function.

  Raises:
    UserError: not DICOM, no pixel data, several frames, or a compression without a decoder here. It
      does not name the file: the caller knows how the user called it.
  """
  try:
    dataset = pydicom.dcmread(path)
  except Exception as error:  # noqa: BLE001, RUF100 - pydicom raises nearly anything on damage.
    raise UserError(f'not a readable DICOM file ({_reason(error)})') from error
  try:
    if 'PixelData' not in dataset:
      raise UserError('the DICOM file has no pixel data')
    if int(dataset.get('NumberOfFrames') or 1) > 1:
      raise UserError(f'the DICOM file has {dataset.NumberOfFrames} frames: export one frame')
    stored = dataset.pixel_array
    photometric = str(dataset.PhotometricInterpretation)
    if photometric in ('MONOCHROME1', 'MONOCHROME2'):
      return _gray(dataset, stored, photometric)
    return _color(dataset, stored, photometric)
  except UserError:
    raise
  except Exception as error:  # noqa: BLE001, RUF100 - the same while decoding.
    raise UserError(f'the DICOM pixels cannot be decoded ({_reason(error)})') from error


def _reason(error):
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _gray(dataset, stored, photometric):
  shown = dicom_pixels.apply_voi_lut(dicom_pixels.apply_modality_lut(stored, dataset), dataset)
  shown = np.array(shown, np.float64)
  if photometric == 'MONOCHROME1':
    shown = -shown
  if 'PixelPaddingValue' in dataset:
    # Padding marks what is not image; it lies far outside and would squeeze the real range.
    ends = sorted(
      (
        int(dataset.PixelPaddingValue),
        int(dataset.get('PixelPaddingRangeLimit', dataset.PixelPaddingValue)),
      )
    )
    image = (stored < ends[0]) | (stored > ends[1])
    shown[~image] = shown[image].min() if image.any() else 0
  return shown[..., None]


def _color(dataset, stored, photometric):
  if photometric == 'PALETTE COLOR':
    stored = dicom_pixels.apply_color_lut(stored, dataset)
  # pydicom itself has brought YBR data to RGB.
  if stored.ndim != 3 or stored.shape[-1] != 3:
    raise UserError(f'the DICOM colour space {photometric} is not supported')
  if stored.dtype == np.uint8:
    return np.ascontiguousarray(stored)
  return (stored >> (8 * stored.dtype.itemsize - 8)).astype(np.uint8)
