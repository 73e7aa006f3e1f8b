"""What the baseline defences that change a finished update have in common."""

import collections
from collections.abc import Callable

import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.aggregators.client_side import ClientSide, Factory, client_side_factory
from tff_shadow.aggregators.measurements import federated_average
from tff_shadow.aggregators.shadow_noise import check_float32, squared_norm

Transform = Callable[[list[tf.Tensor]], list[tf.Tensor]]


def update_transform_factory(
  transform: Transform, inner: Factory | None, *, secure_measurements: bool = False
) -> Factory:
  """Returns a factory whose clients send `transform` of their update, for `inner` to aggregate.

  Takes any structure of float32 tensors, so it drops into every stock
  `tff.learning.algorithms.build_*(model_aggregator=...)`. An update that is not finite, before or
  after the transform, is sent as zeros.

  State: the inner one's. Measurements: `OrderedDict(inner, distortion)`; the mean over clients of
  |sent - update| / |update|, 0 for an update of zeros. That of a single client tells of its clean
  update, so let the server see no more than the mean where it is not trusted with that. Weighted if
  `inner` is.

  Args:
    transform: From the tensors of the update, flattened, to as many of the same shapes; traced once
      for each place where the process runs.
    inner: Aggregates what the clients send; the weighted mean where it is None.
    secure_measurements: Whether the mean distortion is computed by secure summation, in steps of
      1e-6 and with at most 4096 from a client. What `inner` aggregates and measures is its matter.

  Raises:
    TypeError: If `inner` is no factory; by `create`, if the update is not of float32 tensors.
  """

  def build(value_type: tff.types.Type) -> ClientSide:
    check_float32(value_type)

    @tff.tensorflow.computation(value_type)
    @tf.function(autograph=False)
    def send(value):
      update = _finite_or_zeros(tf.nest.flatten(value))
      sent = _finite_or_zeros(transform(update))
      difference = [a - b for a, b in zip(sent, update, strict=True)]
      distortion = tf.sqrt(tf.math.divide_no_nan(squared_norm(difference), squared_norm(update)))
      # Squares of a finite update can overflow.
      distortion = tf.where(tf.math.is_finite(distortion), distortion, 0.0)
      return tf.nest.pack_sequence_as(value, sent), collections.OrderedDict(distortion=distortion)

    def measure(statistics):
      return collections.OrderedDict(
        distortion=federated_average(statistics.distortion, secure_measurements)
      )

    return ClientSide(send, value_type, measure)

  return client_side_factory(build, inner)


def _finite_or_zeros(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
  finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])
  return [tf.where(finite, tensor, 0.0) for tensor in tensors]
