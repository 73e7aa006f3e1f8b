"""Which of a client's images each of its local steps trained on, as far as the server can tell."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE, ClientObservation, ClientTraining, Observation


class LocalSteps(NamedTuple):
  """The steps of a client.

  Attributes:
    batches: For each step the positions of its images among those of the client.
  """

  batches: tuple[tuple[int, ...], ...]

  @property
  def is_single(self) -> bool:
    """Whether one step on all images is all there is."""
    return len(self.batches) == 1 and len(set(self.batches[0])) == len(self.batches[0])

  @property
  def is_ordered(self) -> bool:
    """Whether it matters how the images are numbered; not if each step has all equally often."""
    images = {image for batch in self.batches for image in batch}
    return any(len({batch.count(image) for image in images}) > 1 for batch in self.batches)

  def drawn(self, rng: np.random.Generator, *, keeps_first: bool) -> 'LocalSteps':
    """The same steps of a client that goes through its images in orders of its own.

    Args:
      rng: Decides the order of each pass.
      keeps_first: Whether the first pass stays as it is: the images are numbered by it.
    """
    if not self.is_ordered:
      return self
    order = self.order
    images = np.unique(order)
    for start in range(len(images) if keeps_first else 0, len(order), len(images)):
      own = order[start : start + len(images)]
      own[:] = rng.permutation(images)[: len(own)]
    return self.in_order(order)

  def in_order(self, order: Sequence[int]) -> 'LocalSteps':
    """The same steps with other images, given one after another."""
    cuts = np.cumsum([len(batch) for batch in self.batches])[:-1]
    batches = np.split(np.asarray(order), cuts)
    return self._replace(batches=tuple(tuple(map(int, own)) for own in batches))

  @property
  def order(self) -> np.ndarray:
    """The images of all steps one after another, int32 [M]."""
    return np.concatenate(self.batches).astype(np.int32)

  def segments(self) -> list[tuple[int, int]]:
    """The steps in runs of equally large batches: how many, and how large."""
    runs = itertools.groupby(map(len, self.batches))
    return [(len(list(run)), size) for size, run in runs]


def local_steps(client: ClientObservation, training: ClientTraining) -> LocalSteps:
  """The batches of `client`, its images numbered in the order in which it first used them.

  A client goes through its images once an epoch, each time in a new order, without a break between
  epochs, cut after the most steps allowed (`tff_shadow.data.local_training_order`). The order of
  later epochs is not known; that of the first one stands here. Where the number of steps does not
  follow from that, every step is taken to see batches of the public size in turn.
  """
  images = range(client.num_images)
  order = [*images] * training.local_epochs
  size = client.images_per_step(training)
  if training.max_local_steps is not None:
    order = order[: training.max_local_steps * size]
  batches = tuple(tuple(order[k : k + size]) for k in range(0, len(order), size))
  if len(batches) == client.num_steps:
    return LocalSteps(batches)
  size = min(size, client.num_images)
  return LocalSteps(
    tuple(
      tuple((step * size + k) % client.num_images for k in range(size))
      for step in range(client.num_steps)
    )
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
