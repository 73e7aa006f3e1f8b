"""Reading images and bringing them to one size and one number of channels."""

import io
import math
import pathlib

import numpy as np
import PIL
import scipy.ndimage
from PIL import Image, ImageOps

from tff_shadow.data import dicom
from tff_shadow.errors import UserError

COLORS = ('native', 'gray', 'rgb')
# Below this, models with a few pooling steps and the attacks' metrics have nothing to work on.
MIN_IMAGE_SIZE = 16
# Whole numbers of a region that all stay below this are those of classes, not shades up to 255.
_FAINTEST_PEAK = 32


def check_size_and_color(image_size: int, color: str) -> None:
  """Raises UserError unless both settings make sense."""
  if image_size < MIN_IMAGE_SIZE:
    raise UserError(f'image size {image_size} is too small: use at least {MIN_IMAGE_SIZE} px')
  if color not in COLORS:
    raise UserError(f'color {color!r} is unknown: use one of {", ".join(COLORS)}')


def read_image(path: pathlib.Path) -> np.ndarray:
  """Reads PNG, JPEG or what else Pillow reads, and DICOM, as uint8 [H, W, 1 or 3].

  DICOM is known by its content, or the suffix .dcm or .dicom. It and images of more than 8 bits are
  scaled from their own minimum and maximum. Transparency is dropped.

  Raises:
    UserError: the file is missing, damaged or holds no image. It does not name the file: the
      caller knows how the user called it.
  """
  pixels = _read_pixels(path)
  return pixels if pixels.dtype == np.uint8 else _scale(pixels)


def read_region(path: pathlib.Path) -> np.ndarray:
  """Reads a sensitive region, from a file as `read_image` takes it, as uint8 [H, W, 1].

  What its values mean: see `as_region`. Colours of a palette stand for classes and are no shades:
  black is the background, and there may be one other.

  Raises:
    UserError: as `read_image` does, but not for a single grey value; or as `as_region` does.
  """
  return as_region(_read_pixels(path, is_region=True))


def as_region(pixels: np.ndarray) -> np.ndarray:
  """Returns a region of [H, W, C] pixels of any type as uint8 [H, W, 1]; 255 is fully sensitive.

  Masks are 0 and 1 (a label map) or 0 and the highest value of their type; values between say how
  sensitive. Pixels of another type than uint8 are scaled from their own minimum and maximum, as
  those of images. A single value other than 0 is the whole image. Of several channels the highest
  counts, so that it does not matter in which colour a region was painted.

  Raises:
    UserError: the values are small whole numbers above 1: a label map of several classes, which
      as shades would be next to no region. It does not name the file.
  """
  pixels = pixels.max(axis=-1, keepdims=True)
  low, high = pixels.min(), pixels.max()
  if low == high:
    return np.full(pixels.shape, 255 if high else 0, np.uint8)
  if low >= 0 and 1 < high < _FAINTEST_PEAK and (pixels == np.round(pixels)).all():
    raise UserError(
      f'a region with whole numbers up to {high:.0f} is a label map of several classes: write 255'
      ' where the image is sensitive and 0 elsewhere, or 1 and 0'
    )
  return pixels if pixels.dtype == np.uint8 and high > 1 else _scale(pixels)


def _read_pixels(path, is_region=False):
  """Returns uint8 [H, W, 1 or 3], or float64 [H, W, 1] in the file's own range.

  Args:
    path: The file.
    is_region: Whether colours of a palette are classes.
  """
  if not path.is_file():
    raise UserError('there is no such file')
  try:
    if path.suffix.lower() in dicom.SUFFIXES or dicom.is_dicom(path):
      return dicom.read_dicom(path)
    with Image.open(path) as opened:
      if getattr(opened, 'n_frames', 1) > 1:
        raise UserError(f'holds {opened.n_frames} frames: export one image a file')
      # As viewers show it, and masks are drawn.
      opened = ImageOps.exif_transpose(opened)
      if opened.mode[0] in 'IF':
        return np.asarray(opened, np.float64)[..., None]
      gray = opened.mode in ('1', 'L', 'LA')
      pixels = _with_channels(np.asarray(opened.convert('L' if gray else 'RGB')))
      is_painted = opened.mode == 'P' and (pixels != pixels[..., :1]).any()
      return _classes(pixels) if is_region and is_painted else pixels
  except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
    raise UserError(f'not a readable image ({error})') from error


def _classes(painted):
  """0 where uint8 [H, W, 3] is black and 1 where it has its other colour: uint8 [H, W, 1]."""
  is_background = (painted == 0).all(axis=-1, keepdims=True)
  others = np.unique(painted[~is_background[..., 0]], axis=0)
  if len(others) > 1:
    raise UserError(
      f'a region with a palette of {len(others)} colours beside black is a label map of several'
      ' classes: paint what is sensitive in one colour and the rest black'
    )
  return np.uint8(~is_background)


def _scale(pixels):
  pixels = np.asarray(pixels, np.float64)
  low, high = pixels.min(), pixels.max()
  if not (np.isfinite(low) and np.isfinite(high) and high > low):
    raise UserError('the image has a single grey value or none that is finite')
  return np.round((pixels - low) / (high - low) * 255).astype(np.uint8)


def _with_channels(pixels):
  return pixels[..., None] if pixels.ndim == 2 else pixels


def fit(
  image: np.ndarray, image_size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
  """Returns `image` (uint8 [H, W, 1 or 3]) as uint8 [image_size, image_size, same channels].

  The longer side is scaled to the image size, by an antialiasing bicubic filter unless told
  otherwise, the shorter side by the same factor, and the rest is filled with black on both sides:
  anatomy is neither cut off nor stretched.
  """
  height, width, channels = image.shape
  if (height, width) == (image_size, image_size):
    return image
  new = _scaled(image, image_size)
  pillow = Image.fromarray(image[..., 0] if channels == 1 else image)
  scaled = _with_channels(np.asarray(pillow.resize(new[::-1], resampling)))
  result = np.zeros((image_size, image_size, channels), np.uint8)
  top, left = (image_size - new[0]) // 2, (image_size - new[1]) // 2
  result[top : top + new[0], left : left + new[1]] = scaled
  return result


def fit_region(region: np.ndarray, image_size: int) -> np.ndarray:
  """Returns `region` (uint8 [H, W, 1]) where `fit` puts its image.

  Made smaller, a pixel is as sensitive as the most sensitive of those that it stands for: of a
  lesion of a few pixels an average would leave next to nothing.
  """
  if max(region.shape) <= image_size:
    return fit(region, image_size)
  new = _scaled(region, image_size)
  reach = [2 * math.ceil(old / own / 2) + 1 for old, own in zip(region.shape, new, strict=False)]
  grown = scipy.ndimage.maximum_filter(region, (*reach, 1))
  return fit(grown, image_size, Image.Resampling.NEAREST)


def _scaled(image, image_size):
  """Height and width of [H, W, C] when the longer of both is the image size."""
  factor = image_size / max(image.shape[:2])
  return [max(1, round(side * factor)) for side in image.shape[:2]]


def to_gray(image: np.ndarray) -> np.ndarray:
  """Returns uint8 [H, W, 1]: luma (ITU-R 601) of a colour image, a grey one unchanged."""
  if image.shape[-1] == 1:
    return image
  return np.asarray(Image.fromarray(image).convert('L'))[..., None]


def to_rgb(image: np.ndarray) -> np.ndarray:
  """Returns uint8 [H, W, 3]: a grey image three times, a colour one unchanged."""
  return image.repeat(3, axis=-1) if image.shape[-1] == 1 else image


def png_bytes(image: np.ndarray) -> bytes:
  """Encodes uint8 [H, W, 1 or 3] as PNG; several times faster than TFDS, which packs harder."""
  buffer = io.BytesIO()
  pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  pillow.save(buffer, 'PNG', compress_level=1)
  return buffer.getvalue()


def stack(images: list[np.ndarray], color: str) -> np.ndarray:
  """Stacks images of one size into uint8 [N, H, W, C].

  C is 1 for the color 'gray', 3 for 'rgb'; for 'native' it is 3 if any image has colour.
  """
  if color == 'native':
    color = 'rgb' if any(image.shape[-1] == 3 for image in images) else 'gray'
  convert = to_gray if color == 'gray' else to_rgb
  return np.stack([convert(image) for image in images])
