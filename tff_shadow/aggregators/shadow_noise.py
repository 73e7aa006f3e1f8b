"""Client-side noise of a private shape in front of any aggregation."""

import collections
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators.client_side import ClientSide, Factory, client_side_factory
from tff_shadow.aggregators.measurements import federated_average, federated_count
from tff_shadow.aggregators.noise_strength import NOISE_SHAPES, NoiseShape, NoiseStrength

# Share of the noise's energy that is isotropic: a direction without noise leaks whatever it holds.
# Of decoy noise it is most: a part of each image lies outside of all that the public ones span, and
# whoever knows them can take their noise away. With 99 % that part tells which of known images an
# update was made of.
DEFAULT_FLOOR = 0.01
DECOY_FLOOR = 0.999


def floor_of(shape: NoiseShape, floor: float | None = None) -> float:
  """The share of the energy of noise of `shape` that is isotropic: `floor`, or its default.

  Raises:
    ValueError: If there is a floor that is not in (0, 1).
  """
  if floor is None:
    return DECOY_FLOOR if shape == 'decoy' else DEFAULT_FLOOR
  if not 0.0 < floor < 1.0:
    raise ValueError(f'floor must be above 0 and below 1, found {floor}')
  return floor


def shaped_update_type(update_type: tff.types.Type, shape: NoiseShape) -> tff.types.StructType:
  """The type that `shadow_noise_factory` takes from a client for updates of `update_type`.

  `OrderedDict` of
    update: the update itself.
    noise_key: int32 [2], the client's own.
    image_energy: float32, mean over images of the squared norm of what one adds to the update; only
      used with 'image_ratio'.
    region_energy, region_fourth_moment: float32, sum of m^2 and of m^4 over the region maps.
    sensitivity_energy: float32, sum_j S_j^2; only used for isotropic noise of a target bound.
    decoy_energy: float32, expected squared norm of decoy noise of scale 1; only used for that.
    shape: 'diagonal': S_j^2, a structure like the update, not negative. 'correlated', 'decoy': the
      unit noise itself, a structure like the update. 'isotropic': empty.
  """
  fields = collections.OrderedDict(
    update=update_type,
    noise_key=tff.types.TensorType(np.int32, (2,)),
    image_energy=tff.types.TensorType(np.float32),
    region_energy=tff.types.TensorType(np.float32),
    region_fourth_moment=tff.types.TensorType(np.float32),
    sensitivity_energy=tff.types.TensorType(np.float32),
    decoy_energy=tff.types.TensorType(np.float32),
    shape=() if shape == 'isotropic' else update_type,
  )
  return tff.types.to_type(fields)


def shadow_noise_factory(
  shape: NoiseShape,
  strength: NoiseStrength,
  inner: Factory | None = None,
  *,
  floor: float | None = None,
  secure_measurements: bool = False,
) -> Factory:
  """Returns a factory that noises each client's update, on the client, and aggregates with `inner`.

  The process takes `shaped_update_type(update_type, shape)` from each client and gives the inner
  factory the noised update alone; its result is the inner one's. The noise is

    (1 - floor) of its energy: unit noise of `shape` times the scale that `strength` asks for,
    floor of it: isotropic Gaussian.

  A client whose shape is all zero or not finite (no region, a map of NaN), or of whose images none
  adds anything that can be measured, gets isotropic noise of the strength's ratio to its update
  (ratio 1 for absolute strengths); it is counted, never left
  without noise. An update that is not finite, or zero because the client was dropped, is passed on
  as zeros.

  Freshness is the key's matter: the same key gives the same noise. Fresh noise averages out over
  rounds while frozen correlated noise of a constant scale does not (see `NoiseStrength`). Other
  frozen noise, and the floor, repeats one draw, which the difference of two rounds is free of.

  The shape depends on private data, so no (epsilon, delta) can be stated; see
  `public_shadow_noise_factory`.

  State: the inner one's. Measurements: `OrderedDict(inner, sent_norm, fell_back)`; mean over
  clients of the norm of what they send, number of clients whose shape fell back. Nothing of the
  clean update is measured: its norm, or its angle to what is sent, would confirm a guessed image.
  Weighted if `inner` is.

  Args:
    shape: One of `NOISE_SHAPES`.
    strength: See `NoiseStrength`.
    inner: Aggregates the noised updates; the weighted mean by default.
    floor: Share of the noise's energy that is isotropic, in (0, 1); unused for 'isotropic'. By
      default that of `floor_of`.
    secure_measurements: Whether sent_norm and fell_back are computed by secure summation, the mean
      in steps of 1e-6 and with at most 4096 from a client.

  Raises:
    ValueError: For an unknown shape, a floor out of range, or 'region_psnr' of decoy noise.
    TypeError: If `inner` is no factory.
  """
  if shape not in NOISE_SHAPES:
    raise ValueError(f'shape must be one of {NOISE_SHAPES}, found {shape!r}')
  check_strength(shape, strength)
  floor = floor_of(shape, floor)

  def build(value_type: tff.types.Type) -> ClientSide:
    update_type = _check_value_type(value_type, shape)

    @tff.tensorflow.computation(value_type)
    @tf.function(autograph=False)
    def add_noise(value):
      return noised_update(value, shape, strength, floor)

    def measure(statistics):
      return collections.OrderedDict(
        sent_norm=federated_average(statistics.sent_norm, secure_measurements),
        fell_back=federated_count(statistics.fell_back, secure_measurements),
      )

    return ClientSide(add_noise, update_type, measure)

  return client_side_factory(build, inner)


def check_strength(shape: NoiseShape, strength: NoiseStrength) -> None:
  """Raises ValueError for a strength that noise of this shape cannot have."""
  if shape == 'decoy' and strength.kind == 'region_psnr':
    raise ValueError(
      "'region_psnr' needs a bound of the region error, and decoy noise has none; use the strength"
      " kind 'scale', 'ratio' or 'image_ratio'"
    )


def _check_value_type(value_type: tff.types.Type, shape: NoiseShape) -> tff.types.Type:
  """Returns the type of the update; TypeError unless `value_type` is a shaped update."""
  if not isinstance(value_type, tff.types.StructType) or 'update' not in dir(value_type):
    raise TypeError(f'value_type must be a shaped_update_type, found {value_type}')
  update_type = value_type.update
  check_float32(update_type)
  expected = shaped_update_type(update_type, shape)
  if not expected.is_equivalent_to(value_type):
    raise TypeError(f'for {shape} noise value_type must be {expected}, found {value_type}')
  return update_type


def check_float32(update_type: tff.types.Type) -> None:
  """Raises TypeError unless every tensor of the update is float32."""
  leaves = tff.structure.flatten(update_type)
  for leaf in leaves:
    if not isinstance(leaf, tff.types.TensorType) or leaf.dtype != np.float32:
      raise TypeError(f'the update must be of float32 tensors, found {leaf}')
  if not leaves:
    raise TypeError('the update must be of float32 tensors, found an empty one')


def noised_update(
  value: Any, shape: NoiseShape, strength: NoiseStrength, floor: float
) -> tuple[Any, collections.OrderedDict]:
  """What one client sends, and its statistics; the arithmetic of `shadow_noise_factory`.

  Args:
    value: A shaped update.
    shape: See there.
    strength: See there.
    floor: See there.

  Returns:
    The noised update, and OrderedDict(sent_norm, fell_back).
  """
  update = tf.nest.flatten(value['update'])
  normal = stateless_normal_like(update, value['noise_key'], draw=0)
  num_weights = sum(int(np.prod(tensor.shape)) for tensor in update)
  if shape == 'isotropic':
    unit, shape_energy = normal, tf.constant(float(num_weights))
  elif shape == 'diagonal':
    # Variances in proportion to S_j (not S_j^2): the least sum of variances for a given error.
    deviations = [tf.sqrt(tf.sqrt(squared)) for squared in tf.nest.flatten(value['shape'])]
    unit = [d * n for d, n in zip(deviations, normal, strict=True)]
    shape_energy = squared_norm(deviations)
  elif shape == 'decoy':
    unit = tf.nest.flatten(value['shape'])
    drawn = squared_norm(unit)
    shape_energy = tf.where((drawn > 0) & tf.math.is_finite(drawn), value['decoy_energy'], drawn)
  else:
    unit = tf.nest.flatten(value['shape'])
    shape_energy = squared_norm(unit)
  update_energy = squared_norm(update)
  squared_scale = strength.squared_scale(
    shape,
    update_energy=update_energy,
    image_energy=value['image_energy'],
    shape_energy=shape_energy,
    sensitivity_energy=value['sensitivity_energy'],
    region_energy=value['region_energy'],
    region_fourth_moment=value['region_fourth_moment'],
    num_weights=num_weights,
  )
  noise_energy = squared_scale * shape_energy
  usable = (
    (shape_energy > 0)
    & tf.math.is_finite(shape_energy)
    & tf.math.is_finite(noise_energy)
    & ((noise_energy > 0) | strength.is_none)
  )
  ratio = strength.value if strength.is_relative or strength.is_none else 1.0
  fallback_energy = ratio**2 * update_energy
  # A ratio divides one budget; an absolute strength or a bound holds for the shaped part alone.
  shaped_share = 1.0 - floor if strength.is_relative and shape != 'isotropic' else 1.0
  floor_energy = noise_energy * (
    0.0 if shape == 'isotropic' else floor if strength.is_relative else floor / (1.0 - floor)
  )
  shaped_scale = tf.sqrt(tf.where(usable, shaped_share * squared_scale, 0.0))
  normal_scale = tf.sqrt(tf.where(usable, floor_energy, fallback_energy) / num_weights)
  # The floor needs draws of its own where the shaped noise has used the first.
  floor_normal = stateless_normal_like(update, value['noise_key'], draw=1)
  noise = [
    tf.where(usable, shaped_scale * u, 0.0) + normal_scale * n
    for u, n in zip(unit, floor_normal, strict=True)
  ]
  sends = tf.math.is_finite(update_energy) & (update_energy > 0)
  noise = [tf.where(sends, tensor, 0.0) for tensor in noise]
  update = [tf.where(sends, tensor, 0.0) for tensor in update]
  noised = [u + n for u, n in zip(update, noise, strict=True)]
  statistics = collections.OrderedDict(
    sent_norm=tf.sqrt(squared_norm(noised)),
    fell_back=tf.cast(sends & tf.logical_not(usable), tf.int32),
  )
  return tf.nest.pack_sequence_as(value['update'], noised), statistics


def stateless_normal_like(tensors, key, *, draw: int) -> list[tf.Tensor]:
  """Standard normal float32 tensors of the same shapes, decided by `key` and `draw`."""
  # stateless_fold_in would keep 32 of the key's 64 bits, few enough to try them all.
  key = tf.random.experimental.stateless_split(key, draw + 1)[draw]
  sizes = [int(np.prod(tensor.shape)) for tensor in tensors]
  parts = tf.split(tf.random.stateless_normal([sum(sizes)], key), sizes)
  return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def squared_norm(tensors) -> tf.Tensor:
  """Sum of squares over all entries of all tensors."""
  return tf.add_n([tf.reduce_sum(tf.square(tensor)) for tensor in tensors])
