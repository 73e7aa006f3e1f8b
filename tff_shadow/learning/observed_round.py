"""From what the tap logged of a round to the observation that attacks read."""

import logging
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_shadow.errors import UserError
from tff_shadow.models import batch_norm_layers, check_model, model_to_config
from tff_shadow.observations import (
  AGGREGATE,
  BatchNormSharing,
  ClientObservation,
  ClientTraining,
  Observation,
  WeightArrays,
  mean_update,
)

_UNDEFENDED = types.MappingProxyType({'name': 'none'})
_GREY = 0.5


class Participant(NamedTuple):
  """What a server knows of a client of a round besides what it sent.

  Attributes:
    client_id: Its name.
    num_images: Distinct images that it trained on in the round.
    num_steps: Local steps; by default as many as `ClientTraining` makes of the images, batches
      being filled over the ends of epochs: `images.repeat(epochs).batch(batch_size)`.
    batch_size: Its own, where that is not the one of `ClientTraining`.
    dropped: Whether it sent zeros because its update was not finite ('non_finite' of the client
      work of `build_weighted_fed_avg`).
  """

  client_id: str
  num_images: int
  num_steps: int | None = None
  batch_size: int | None = None
  dropped: bool = False


def observation_of(
  seen: Mapping[str, Any],
  global_weights: tff.learning.models.ModelWeights,
  model: tf.keras.Model,
  client_training: ClientTraining,
  participants: Sequence[Participant],
  *,
  round_num: int = 1,
  dataset: str = 'own data',
  image_shape: tuple[int, int, int] | None = None,
  class_names: Sequence[str] | None = None,
  batch_norm_sharing: BatchNormSharing | None = None,
  defense: Mapping[str, Any] = _UNDEFENDED,
  public_mean_image: np.ndarray | None = None,
) -> Observation:
  """Makes the observation of a round, for `tff_shadow.observations.write_observation`.

  TFF's updates are initial minus trained weights; those of the observation are trained minus
  initial.

  Args:
    seen: 'observation' of the measurements of `observation_tap_factory`.
    global_weights: What the server sent: `process.get_model_weights(state)` of the state that went
      into the round, not of the one that came out.
    model: The architecture that the clients trained; its weights do not count.
    client_training: The local training.
    participants: The clients, in the order in which their data were given.
    round_num: The round, from 1.
    dataset: Name of the data.
    image_shape: (H, W, C); by default that of the model's input.
    class_names: By default numbers.
    batch_norm_sharing: What of BatchNorm was sent; by default told from updates and model. Stock
      TFF sends nothing, which is 'local'.
    defense: Public settings of the defence with its 'name', such as
      `ShadowDefense.public_settings()`; none by default.
    public_mean_image: [H, W, C], the mean of public images of the modality, from which attacks
      start and which they have to beat; grey by default, which is easy to beat.

  Returns:
    The observation. The weights of clients are 1 and its aggregate is their mean where the tap saw
    no weights.

  Raises:
    ValueError: If there are not as many participants as updates, or two of a name or one named
      'aggregate'; weights or updates do not have the shapes of the model; the model does not tell
      the shape of its images, or attacks cannot simulate it, who take the clients' loss for the
      sparse cross-entropy of one output per class.
  """
  _check_shapes('global_weights', global_weights.trainable, model)
  stacked = observed_update(seen['updates'])
  sent = len(stacked.trainable[0])
  if len(participants) != sent:
    raise ValueError(f'participants: {len(participants)} given, {sent} clients have sent an update')
  _check_names([own.client_id for own in participants])
  updates = [
    WeightArrays(
      tuple(array[index] for array in stacked.trainable),
      tuple(array[index] for array in stacked.non_trainable),
    )
    for index in range(sent)
  ]
  _check_shapes("seen['updates']", updates[0].trainable, model)
  weights = seen.get('weights', np.ones(sent, np.float32))
  clients = tuple(
    ClientObservation(
      client_id=own.client_id,
      num_images=own.num_images,
      num_steps=_num_steps(own, client_training) if own.num_steps is None else own.num_steps,
      weight=float(weight),
      update=update,
      dropped=bool(own.dropped),
      batch_size=own.batch_size,
    )
    for own, update, weight in zip(participants, updates, weights, strict=True)
  )
  _warn_of_swapped(clients)
  image_shape = tuple(model.inputs[0].shape[1:] if image_shape is None else image_shape)
  if None in image_shape:
    raise ValueError(f'image_shape: must be given, for the model takes images of {image_shape}')
  _check_can_be_simulated(model, image_shape)
  if class_names is None:
    class_names = [f'class {number}' for number in range(model.outputs[0].shape[-1])]
  if public_mean_image is None:
    public_mean_image = np.full(image_shape, _GREY, np.float32)
  return Observation(
    round_num=round_num,
    dataset=dataset,
    image_shape=image_shape,
    class_names=tuple(class_names),
    model_name=model.name,
    model_config=model_to_config(model),
    batch_norm_sharing=batch_norm_sharing or _batch_norm_sharing(model, updates[0]),
    client_training=client_training,
    defense=dict(defense),
    global_weights=WeightArrays(
      tuple(np.asarray(w) for w in global_weights.trainable),
      tuple(np.asarray(w) for w in global_weights.non_trainable),
    ),
    clients=clients,
    # Without weights it may be a sum.
    aggregate=(observed_update(seen['aggregate']) if 'weights' in seen else mean_update(clients)),
    public_mean_image=public_mean_image,
  )


def observed_update(update: Any) -> WeightArrays:
  """From TFF's initial minus trained to the observation's trained minus initial weights."""
  if isinstance(update, Mapping):
    trainable, non_trainable = update['trainable'], update['non_trainable']
  else:
    trainable, non_trainable = update, ()
  return WeightArrays(
    tuple(-np.asarray(tensor) for tensor in trainable),
    tuple(-np.asarray(tensor) for tensor in non_trainable),
  )


def _num_steps(own: Participant, training: ClientTraining) -> int:
  batch_size = training.batch_size if own.batch_size is None else own.batch_size
  steps = -(-own.num_images * training.local_epochs // batch_size)
  return steps if training.max_local_steps is None else min(steps, training.max_local_steps)


def _check_names(names: Sequence[str]) -> None:
  if AGGREGATE in names:
    raise ValueError(f'participants: {AGGREGATE!r} is the name of the mean of all clients')
  if len(set(names)) < len(names):
    raise ValueError(f'participants: two have the same client_id among {", ".join(names)}')


def _check_can_be_simulated(model: tf.keras.Model, image_shape: tuple[int, int, int]) -> None:
  num_classes = model.outputs[0].shape[-1]
  if num_classes is None or num_classes < 2:
    raise ValueError(
      f'model {model.name}: has {num_classes} output; attacks simulate the sparse cross-entropy of'
      ' one output per class, so that two classes need two'
    )
  try:
    check_model(
      model, image_shape=image_shape, num_classes=num_classes, source=f'model {model.name}'
    )
  except UserError as error:
    raise ValueError(str(error)) from error


def _warn_of_swapped(clients: Sequence[ClientObservation]) -> None:
  """TFF weighs clients by their images, or all alike."""
  sent = [own for own in clients if not own.dropped and own.num_images > 0]
  ratios = [own.weight / own.num_images for own in sent]
  if np.ptp([own.weight for own in sent] or [0]) == 0 or np.ptp(ratios) <= 1e-6 * max(ratios):
    return
  logging.warning(
    'observation_of: the weights of %s are not in proportion to the %s images of the participants:'
    ' are these in the order of the data?',
    ', '.join(f'{own.weight:g}' for own in sent[:3]),
    ', '.join(str(own.num_images) for own in sent[:3]),
  )


def _batch_norm_sharing(model: tf.keras.Model, update: WeightArrays) -> BatchNormSharing:
  layers = batch_norm_layers(model)
  if update.non_trainable or not layers:
    return 'aggregate'
  return 'local' if any(layer.trainable for layer in layers) else 'frozen'


def _check_shapes(name: str, arrays: Sequence[Any], model: tf.keras.Model) -> None:
  found = [tuple(np.shape(array)) for array in arrays]
  expected = [tuple(variable.shape) for variable in model.trainable_variables]
  if found != expected:
    raise ValueError(
      f'{name}: of shapes {found}, the trainable weights of model {model.name} have {expected}'
    )
