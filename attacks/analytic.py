"""Images read off the gradient of a first dense layer, without any optimisation.

Image i of a batch adds delta_ij x_i to the kernel's gradient of unit j and delta_ij to its bias',
so the quotient of the two is an average of the images, weighted by delta (Phong et al. 2017,
"Privacy-preserving deep learning via additively homomorphic encryption"; it is where the recursion
of Zhu and Blaschko 2021, "R-GAP", ends). For one image it is the image. For several, behind a
rectifier, a unit that a single image switches on has that image in its quotient (Boenisch et al.
2023, "When the curious abandon honesty"); here the server is honest, so its weights are what
training made of them, not a trap.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tff_shadow.errors import UserError

# Root mean square, in image units: two quotients closer than this are the same image. At 1e-3 an
# image is right to 60 dB; two images of patients are further apart by far.
_SAME = 1e-3
# Members of a cluster are at most this many times as far from its middle as the median member:
# beyond are mixtures with a little of another image. The floor is what rounding does to distances.
_SPREAD, _SPREAD_FLOOR = 5.0, 1e-6
# Pixels may leave their range by this much through rounding.
_RANGE_MARGIN = 0.01
# A unit whose bias has less than this share of the largest gradient is rounding noise.
_SILENT = 1e-6
# This many units, or this share, may contradict an image: they are about to switch.
_STRAY_UNITS, _STRAY_SHARE = 1, 0.05

_ELEMENTWISE = (
  tf.keras.layers.InputLayer,
  tf.keras.layers.Rescaling,
  tf.keras.layers.Normalization,
  tf.keras.layers.Flatten,
  tf.keras.layers.Reshape,
)


@dataclasses.dataclass(frozen=True)
class AnalyticResult:
  """Images that were found, the best supported first.

  Attributes:
    images: float32 [K, H, W, C] in [0, 1]; K is at most the number asked for, and may be 0.
    support: int64 [K], the number of units that agree on the image. What few units say may be an
      average of images, where no other unit tells these apart.
    units: How many units of the layer had a gradient.
  """

  images: np.ndarray
  support: np.ndarray
  units: int


def has_first_dense(model: tf.keras.Model) -> bool:
  """Whether `recover_from_first_dense` takes `model`, for one image at least."""
  try:
    _first_dense(model)
  except UserError:
    return False
  return True


def recover_from_first_dense(
  model: tf.keras.Model,
  gradient: Sequence[np.ndarray | tf.Tensor],
  num_images: int,
  image_shape: tuple[int, int, int],
) -> AnalyticResult:
  """Recovers images from the gradient of the dense layer that sees them first.

  One image is exact up to the rounding of the gradient. Of several, those are found that switch on
  a unit which no other one does: the wider the layer and the fewer the images, the more. Averages
  of several images are told from images by their pixels, which may leave their range, and by the
  units that they would switch on.

  Args:
    model: With the global weights. Its first trainable layer is dense, has a bias and sees all
      pixels at once, at most rescaled and flattened. No dropout behind it, where there are several
      images.
    gradient: Of the loss, one array per `model.trainable_variables`; any common factor cancels.
    num_images: B.
    image_shape: (H, W, C).

  Returns:
    At most B images.

  Raises:
    UserError: If the model is another one, or has no rectifier behind that layer and B > 1.
  """
  layer = _first_dense(model)
  size = int(np.prod(image_shape))
  if layer.kernel.shape[0] != size:
    raise UserError(
      f'analytic attack: layer {layer.name!r} sees {layer.kernel.shape[0]} values, an image of'
      f' shape {tuple(image_shape)} has {size}'
    )
  if num_images > 1 and not _is_rectified(layer):
    raise UserError(
      f'analytic attack: {num_images} images can be told apart only where a rectifier follows layer'
      f' {layer.name!r} at once'
    )
  position = {id(variable): i for i, variable in enumerate(model.trainable_variables)}
  kernel, bias = (
    np.asarray(gradient[position[id(variable)]], np.float64)
    for variable in (layer.kernel, layer.bias)
  )
  scale, offset = _rescaling(model, layer, image_shape)
  heard = np.abs(bias) > _SILENT * np.abs(bias).max()

  def image(units: np.ndarray) -> np.ndarray:
    # Least squares: the larger a unit's gradient, the less its relative rounding.
    inputs = kernel[:, units] @ bias[units] / np.sum(bias[units] ** 2)
    return (inputs - offset) / scale

  if num_images == 1:
    clusters = [np.flatnonzero(heard)] if heard.any() else []
  else:
    # The strongest units first, so that they stand for their clusters.
    units = np.flatnonzero(heard)[np.argsort(-np.abs(bias[heard]), kind='stable')]
    quotients = ((kernel[:, units] / bias[units]).T - offset) / scale
    inside = np.abs(quotients - 0.5).max(axis=1) <= 0.5 + _RANGE_MARGIN
    clusters = [units[inside][group] for group in _clusters(quotients[inside])]
    if clusters:
      inputs = np.stack([image(cluster) for cluster in clusters]) * scale + offset
      switched_on = inputs @ layer.kernel.numpy() + layer.bias.numpy() > 0
      clusters = [clusters[i] for i in _images_among(clusters, switched_on)]
  clusters = clusters[:num_images]
  images = np.reshape([image(cluster) for cluster in clusters], (-1, *image_shape))
  return AnalyticResult(
    images=np.clip(images, 0, 1).astype(np.float32),
    support=np.array([len(cluster) for cluster in clusters], np.int64),
    units=int(heard.sum()),
  )


def _clusters(quotients: np.ndarray) -> list[np.ndarray]:
  """Indices of the quotients [units, pixels] that agree; the largest clusters first."""
  squares = np.sum(quotients**2, axis=1)
  products = quotients @ quotients.T
  distances = np.maximum(squares[:, None] + squares[None] - 2 * products, 0)
  distances = np.sqrt(distances / quotients.shape[1])
  near = distances < _SAME
  neighbours = near.sum(axis=1)
  free = np.ones(len(quotients), bool)
  clusters = []
  while free.any():
    group = np.flatnonzero(near[np.argmax(np.where(free, neighbours, 0))] & free)
    free[group] = False
    neighbours = neighbours - near[:, group].sum(axis=1)
    within = distances[np.ix_(group, group)]
    medians = np.median(within, axis=1)
    middle = np.argmin(medians)
    clusters.append(group[within[middle] <= max(_SPREAD * medians[middle], _SPREAD_FLOOR)])
  return sorted(clusters, key=len, reverse=True)


def _images_among(clusters: list[np.ndarray], switched_on: np.ndarray) -> list[int]:
  """Tells images from mixtures: the clusters that may be images of the batch.

  Many units that agree are no proof: with two classes and one hidden layer, all units that the same
  images switch on have the same quotient. But as the units of a cluster were switched on by the
  same images, an image of the batch has all of them on or all of them off, and all of its own on:
  what does not is no image. Of what is left, the units of a mixture are on for its parts, and those
  of an image are on for no other.

  Args:
    clusters: Units of each.
    switched_on: bool [clusters, units], which units each cluster's mean would switch on.

  Returns:
    Indices of clusters, in their order.
  """
  sizes = np.array([len(cluster) for cluster in clusters])
  member = np.zeros(switched_on.shape)
  for row, cluster in zip(member, clusters, strict=True):
    row[cluster] = 1
  # [a, b]: how many units of cluster a the image b switches on.
  on = member @ switched_on.T
  stray = np.maximum(_STRAY_UNITS, _STRAY_SHARE * sizes)[:, None]
  all_on = on >= sizes[:, None] - np.minimum(stray, (sizes[:, None] - 1) / 2)
  split = np.minimum(on, sizes[:, None] - on) > stray
  possible = ~split.any(axis=0) & np.diag(all_on)
  part = all_on & ~np.eye(len(clusters), dtype=bool)
  while True:
    kept = np.flatnonzero(possible)
    parts = part[np.ix_(kept, kept)].sum(axis=1)
    if not parts.any():
      return kept.tolist()
    # Of the most mixed, the last is the one that fewest units vouch for.
    possible[kept[np.flatnonzero(parts == parts.max())[-1]]] = False


def _first_dense(model: tf.keras.Model) -> tf.keras.layers.Dense:
  """The first trainable layer, if it is dense with a bias and sees the image as it is."""
  layer = next((layer for layer in model.layers if layer.trainable_variables), None)
  needs = 'analytic attack: needs a model whose first trainable layer is dense with a bias'
  if layer is None:
    raise UserError(f'{needs}; this one has no trainable layer')
  if not isinstance(layer, tf.keras.layers.Dense):
    raise UserError(f'{needs}; this one begins with {layer.name!r}, a {type(layer).__name__}')
  if not layer.use_bias:
    raise UserError(f'{needs}; {layer.name!r} has none')
  if layer.input.shape.rank != 2:
    raise UserError(f'{needs}; {layer.name!r} sees pixels one by one, not a flat image')
  before = layer
  while not isinstance(before, tf.keras.layers.InputLayer):
    before = before.inbound_nodes[0].inbound_layers
    if not _is_elementwise(before):
      raise UserError(
        f'{needs}; {layer.name!r} sees not the image but what {before.name!r} makes of it'
      )
  return layer


def _is_elementwise(layer: tf.keras.layers.Layer) -> bool:
  """Whether a layer rescales and reshapes pixels, and leaves their order."""
  if isinstance(layer, tf.keras.Model):
    return all(_is_elementwise(inner) for inner in layer.layers)
  if isinstance(layer, tf.keras.layers.Flatten):
    return layer.data_format == 'channels_last'
  return isinstance(layer, _ELEMENTWISE)


def _rescaling(
  model: tf.keras.Model, layer: tf.keras.layers.Dense, image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Scale and offset, each [pixels], with which pixels reach `layer`."""
  front = tf.keras.Model(model.inputs, layer.input)
  ends = np.stack([np.zeros(image_shape), np.ones(image_shape)])
  at_zero, at_one = front(tf.constant(ends, model.inputs[0].dtype)).numpy().astype(np.float64)
  return at_one - at_zero, at_zero


def _is_rectified(layer: tf.keras.layers.Dense) -> bool:
  """Whether what follows `layer` at once is zero below zero, and leaves the rest as it is."""
  probe = tf.constant([[-3.0, -0.5, 0.5, 30.0]], layer.dtype)

  def rectifies(function: Callable[[tf.Tensor], tf.Tensor]) -> bool:
    return np.array_equal(function(probe), np.maximum(probe, 0))

  if layer.activation is not tf.keras.activations.linear:
    return rectifies(layer.activation)
  following = [node.layer for node in layer.outbound_nodes]
  kinds = (tf.keras.layers.Activation, tf.keras.layers.ReLU)
  return bool(following) and all(isinstance(f, kinds) and rectifies(f) for f in following)
