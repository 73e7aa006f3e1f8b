"""LPIPS: distance of two images in the feature space of a classification network.

R. Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR
2018, equation 1, version 0.1 of the published weights. Lower is closer; 0 for equal images.

The weights are a safetensors file that the user names; nothing is downloaded. It holds float32
tensors in torch's layout (kernels [out, in, height, width]), named as in torchvision's AlexNet or
VGG16 and in the package `lpips`: `features.N.weight`, `features.N.bias` for every convolution N
(`LAYERS`), and `linK.model.1.weight` [1, channels, 1, 1] for K = 0 to 4. Other tensors are ignored.
The widths are read from the file. Whoever has torch makes it so (for VGG: `vgg16`, `net='vgg'`):

    import lpips, torchvision
    from safetensors.torch import save_file
    tensors = torchvision.models.alexnet(weights='IMAGENET1K_V1').state_dict()
    tensors |= {k: v for k, v in lpips.LPIPS(net='alex').state_dict().items() if '.model.' in k}
    save_file({k: v for k, v in tensors.items() if not k.startswith('lins')}, 'alex.safetensors')
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError
from tff_shadow.observations import load_tensors

# Of inputs in [-1, 1]: the statistics of ImageNet that the networks were trained with.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10
# Images at a time: features of VGG at 224 px take 25 MB an image.
_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class _Convolution:
  """`index` is torchvision's position in `features`; a ReLU follows; `tap`: its output is used."""

  index: int
  kernel: int
  stride: int = 1
  padding: int = 1
  tap: bool = False


@dataclasses.dataclass(frozen=True)
class _Pooling:
  """Maximum over windows, without padding."""

  kernel: int
  stride: int


def _vgg16() -> tuple[_Convolution | _Pooling, ...]:
  layers = []
  index = 0
  for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
    if stage:
      layers.append(_Pooling(2, 2))
      index += 1
    for number in range(convolutions):
      layers.append(_Convolution(index, 3, tap=number == convolutions - 1))
      index += 2
  return tuple(layers)


LAYERS: dict[str, tuple[_Convolution | _Pooling, ...]] = {
  'alex': (
    _Convolution(0, 11, stride=4, padding=2, tap=True),
    _Pooling(3, 2),
    _Convolution(3, 5, padding=2, tap=True),
    _Pooling(3, 2),
    _Convolution(6, 3, tap=True),
    _Convolution(8, 3, tap=True),
    _Convolution(10, 3, tap=True),
  ),
  'vgg': _vgg16(),
}
# The side at which the last feature map is one pixel. At 32 px the maps of 'alex' are 7, 3, 1, 1
# and 1 pixels wide, so its region value hardly knows where; those of 'vgg' are 32, 16, 8, 4, 2.
MIN_SIDE = {'alex': 31, 'vgg': 16}


class Lpips:
  """The metric with one set of weights; `load_lpips` makes it.

  Attributes:
    net: 'alex' or 'vgg'.
    digest: SHA-256 of the weights file, in hex: values are comparable only where it is the same.
  """

  def __init__(
    self,
    net: str,
    convolutions: list[tuple[np.ndarray, np.ndarray]],
    heads: list[np.ndarray],
    digest: str,
  ):
    """Takes kernels [height, width, in, out] with biases [out], and heads [channels]."""
    self.net = net
    self.digest = digest
    self._convolutions = [(tf.constant(kernel), tf.constant(bias)) for kernel, bias in convolutions]
    self._heads = [tf.constant(head) for head in heads]
    signature = [tf.TensorSpec([None, None, None, 3], tf.float32)]
    self._features = tf.function(self._features_of, input_signature=signature, autograph=False)

  def __call__(self, first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
    """Distance of two images [H, W, C] in [0, 1], C = 1 or 3, and its map [H, W].

    The distance is the sum over layers of the spatial mean. The map is the sum of the layers' maps,
    each brought to the size of the image bilinearly (the reference's `spatial=True`), so that its
    mean differs a little from the distance.

    Raises:
      ValueError: If the shapes differ.
      UserError: If the images are under `MIN_SIDE`, or have neither 1 nor 3 channels.
    """
    if first.shape != second.shape:
      raise ValueError(f'images must share one shape, found {first.shape} and {second.shape}')
    size = first.shape[:2]
    value, total = 0.0, np.zeros(size)
    layers = zip(self._normalised(first[None]), self._normalised(second[None]), strict=True)
    for head, (one, other) in zip(self._heads, layers, strict=True):
      distance = tf.reduce_sum(tf.square(one - other) * head, axis=-1, keepdims=True)
      value += float(tf.reduce_mean(distance))
      # Half-pixel centres, as torch has without align_corners.
      total += tf.image.resize(distance, size, method='bilinear').numpy()[0, :, :, 0]
    return value, total

  def pairwise(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distances [N, M] of every image of `first` [N, H, W, C] to every one of `second`."""
    rows = [self._normalised(image[None]) for image in first]
    columns = []
    for start in range(0, len(second), _CHUNK):
      gallery = self._normalised(second[start : start + _CHUNK])
      columns.append([self._to_gallery(row, gallery) for row in rows])
    if not rows or not columns:
      return np.zeros((len(first), len(second)))
    return np.concatenate([np.array(column, np.float64) for column in columns], axis=1)

  def _to_gallery(self, row: list[tf.Tensor], gallery: list[tf.Tensor]) -> np.ndarray:
    layers = [
      tf.reduce_mean(tf.reduce_sum(tf.square(one - others) * head, axis=-1), axis=(1, 2))
      for head, one, others in zip(self._heads, row, gallery, strict=True)
    ]
    return tf.add_n(layers).numpy()

  def _normalised(self, images: np.ndarray) -> list[tf.Tensor]:
    """Features of the five layers, each of length 1 over its channels."""
    self.check_shape(images.shape[1:])
    images = tf.constant(np.broadcast_to(images, (*images.shape[:3], 3)), tf.float32)
    return self._features(images)

  def check_shape(self, shape: tuple[int, ...]) -> None:
    """Raises `UserError` unless images of shape [H, W, C] can be measured."""
    smallest = MIN_SIDE[self.net]
    if len(shape) != 3 or shape[2] not in (1, 3):
      raise UserError(f'LPIPS needs images with 1 or 3 channels, found shape {list(shape)}')
    if min(shape[:2]) < smallest:
      raise UserError(
        f'--lpips_net={self.net} needs images of at least {smallest}x{smallest} pixels, found '
        f'{shape[0]}x{shape[1]}; '
        + ('use vgg or ' if self.net == 'alex' and min(shape[:2]) >= MIN_SIDE['vgg'] else '')
        + 'leave out --lpips_weights'
      )

  def _features_of(self, images: tf.Tensor) -> list[tf.Tensor]:
    x = (2 * images - 1 - _SHIFT) / _SCALE
    convolutions = iter(self._convolutions)
    taps = []
    for layer in LAYERS[self.net]:
      if isinstance(layer, _Pooling):
        x = tf.nn.max_pool2d(x, layer.kernel, layer.stride, 'VALID')
        continue
      kernel, bias = next(convolutions)
      sides = [layer.padding] * 2
      x = tf.nn.conv2d(x, kernel, layer.stride, [[0, 0], sides, sides, [0, 0]])
      x = tf.nn.relu(x + bias)
      if layer.tap:
        length = tf.sqrt(tf.reduce_sum(tf.square(x), axis=-1, keepdims=True))
        taps.append(x / (length + _EPSILON))
    return taps


def load_lpips(path: str | pathlib.Path, net: str) -> Lpips:
  """Reads the weights of `net` ('alex' or 'vgg') from a safetensors file.

  Raises:
    UserError: If the file or a tensor is missing, or a tensor does not fit; it names both.
  """
  path = pathlib.Path(path)
  if net not in LAYERS:
    raise UserError(f'--lpips_net={net}: use one of {", ".join(LAYERS)}')
  weights = _Weights(path, net, load_tensors(path))
  convolutions = list(weights.convolutions())
  taps = [layer.tap for layer in LAYERS[net] if isinstance(layer, _Convolution)]
  widths = [len(bias) for (_, bias), tap in zip(convolutions, taps, strict=True) if tap]
  heads = [
    weights.take(f'lin{number}.model.1.weight', (1, width, 1, 1)).reshape(width)
    for number, width in enumerate(widths)
  ]
  return Lpips(net, convolutions, heads, hashlib.sha256(path.read_bytes()).hexdigest())


@dataclasses.dataclass(frozen=True)
class _Weights:
  """A weights file, with checks that name the file and the tensor."""

  path: pathlib.Path
  net: str
  tensors: dict[str, np.ndarray]

  def convolutions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Kernels [height, width, in, out] and biases [out]."""
    channels = 3
    for layer in LAYERS[self.net]:
      if isinstance(layer, _Convolution):
        name, side = f'features.{layer.index}', layer.kernel
        kernel = self.take(f'{name}.weight', (None, channels, side, side))
        channels = len(kernel)
        yield kernel.transpose(2, 3, 1, 0), self.take(f'{name}.bias', (channels,))

  def take(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The tensor `name`; a None in `shape` is a side that may have any length but 0."""
    if name not in self.tensors:
      raise UserError(f'{self.path}: tensor {name} is missing, --lpips_net={self.net} needs it')
    tensor = self.tensors[name]
    fits = len(tensor.shape) == len(shape) and all(
      found == side or (side is None and found > 0)
      for found, side in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != np.float32:
      expected = ', '.join('any' if side is None else str(side) for side in shape)
      raise UserError(
        f'{self.path}: tensor {name} must be float32 [{expected}] for --lpips_net={self.net}, '
        f'found {tensor.dtype} {list(tensor.shape)}'
      )
    if not np.isfinite(tensor).all():
      raise UserError(f'{self.path}: tensor {name} holds values that are not finite')
    return tensor
