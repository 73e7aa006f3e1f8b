"""Which of a client's images each of its local steps trained on, as far as the server can tell."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE, ClientObservation, ClientTraining, Observation


class LocalSteps(NamedTuple):
  """The steps of a client.

  Attributes:
    batches: For each step the positions of its images among those of the client.
    is_exact: Whether these are the client's own batches up to the order of its images, which no
      attack can tell. Not so where it saw images again in an order of its own, in a later epoch or
      a later round, or where what it says of its steps does not fit the public settings.
  """

  batches: tuple[tuple[int, ...], ...]
  is_exact: bool

  @property
  def is_single(self) -> bool:
    """Whether one step on all images is all there is."""
    return len(self.batches) == 1 and len(set(self.batches[0])) == len(self.batches[0])

  @property
  def is_ordered(self) -> bool:
    """Whether it matters how the images are numbered; not if each step has all equally often."""
    images = {image for batch in self.batches for image in batch}
    return any(len({batch.count(image) for image in images}) > 1 for batch in self.batches)

  def in_a_later_round(self) -> 'LocalSteps':
    """The same, of images that an earlier round has numbered: each round has its own order."""
    return self._replace(is_exact=self.is_exact and not self.is_ordered)

  def reordered(self, seed: Sequence[int]) -> 'LocalSteps':
    """The same with the images in another order, which `seed` decides."""
    if not self.is_ordered:
      return self
    images = sorted({image for batch in self.batches for image in batch})
    order = np.random.default_rng(seed).permutation(images)
    place = dict(zip(images, map(int, order), strict=True))
    return self._replace(batches=tuple(tuple(map(place.get, own)) for own in self.batches))

  def segments(self) -> list[tuple[tuple[int, ...], ...]]:
    """The steps in runs of equally large batches."""
    runs: list[list[tuple[int, ...]]] = []
    for batch in self.batches:
      if runs and len(runs[-1][-1]) == len(batch):
        runs[-1].append(batch)
      else:
        runs.append([batch])
    return [tuple(run) for run in runs]


def local_steps(client: ClientObservation, training: ClientTraining) -> LocalSteps:
  """The batches of `client`, its images numbered in the order in which it first used them.

  A client goes through its images once an epoch, each time in a new order, without a break between
  epochs, cut after the most steps allowed (`tff_shadow.data.local_training_order`). The order of
  later epochs is not known; that of the first one is taken. Where the number of steps does not
  follow from that, every step is taken to see batches of the public size in turn.
  """
  images = range(client.num_images)
  order = [*images] * training.local_epochs
  size = client.images_per_step(training)
  if training.max_local_steps is not None:
    order = order[: training.max_local_steps * size]
  batches = tuple(tuple(order[k : k + size]) for k in range(0, len(order), size))
  if len(batches) == client.num_steps:
    # A batch of all images has no order; else only the first epoch's is a matter of numbering.
    whole = all(len(batch) == client.num_images for batch in batches)
    return LocalSteps(batches, whole or len(order) <= client.num_images)
  size = min(size, client.num_images)
  return LocalSteps(
    tuple(
      tuple((step * size + k) % client.num_images for k in range(size))
      for step in range(client.num_steps)
    ),
    is_exact=client.num_steps == 1,
  )


def may_be_cut(client: ClientObservation, training: ClientTraining) -> bool:
  """Whether `client` may have images that it did not use, and use others in another round.

  So it may where its steps end with the most that are allowed and no image was used twice: whether
  they were all, the server is not told.
  """
  if training.max_local_steps is None:
    return False
  return training.max_local_steps * client.images_per_step(training) <= client.num_images


def check_images_recur(observations: Sequence[Observation], targets: Sequence[str]) -> None:
  """Raises `UserError` if clients may have used other images in each of several rounds."""
  for seen in observations:
    for client in seen.clients:
      attacked = AGGREGATE in targets or client.client_id in targets
      if attacked and may_be_cut(client, seen.client_training):
        raise UserError(
          f'--rounds: with --max_local_steps={seen.client_training.max_local_steps} in the training'
          f' {client.client_id} need not have used all of its images in round {seen.round_num};'
          ' only rounds on the same images can be attacked jointly'
        )
