"""The order in which a client's local steps took its images: tried out, as no update tells it."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from attacks.local_steps import LocalSteps

# Draws that all repeat what was tried mean that there is hardly anything else.
_DRAWS = 50


class Trial(NamedTuple):
  """An order that was tried.

  Attributes:
    order: The images that the steps train on, one after another.
    loss: The least matching loss that a short attack came to under it.
    seconds: That it took.
  """

  order: tuple[int, ...]
  loss: float
  seconds: float


class OrderSearch:
  """Tries orders of one target: at first any, then such as differ little from the best of these.

  The server knows how many images each step has, and that the client goes through all of them
  before one comes again; not which come when. Before they are found, images are told apart by their
  labels alone: orders are the same that differ in the numbers of images of one label, or within a
  step. A wrong one shows, as the loss stays many times higher where an image is sought in the steps
  of one of another label.

  Attributes:
    tried: So far.
  """

  def __init__(
    self,
    steps: LocalSteps,
    labels: Sequence[int],
    count: int,
    seed: Sequence[int],
    tried: Iterable[Trial] = (),
  ):
    """Continues after what was tried already.

    Args:
      steps: How many images each step has; their order is tried first.
      labels: Of the images.
      count: Orders to try at most.
      seed: Decides which.
      tried: By an interrupted search with the same arguments.
    """
    self._labels = np.asarray(labels)
    self._count = count
    self._seed = list(seed)
    self._steps = steps
    self._step_of_slot = np.repeat(np.arange(len(steps.batches)), list(map(len, steps.batches)))
    self.tried = list(tried)

  @property
  def best(self) -> np.ndarray:
    """The order of least loss, int32 [M]."""
    return np.asarray(min(self.tried, key=lambda trial: trial.loss).order, np.int32)

  def next_orders(self) -> list[tuple[int, ...]]:
    """What to try next; nothing if enough was tried or nothing else is found."""
    first = -(-self._count // 2)
    wanted = (first if len(self.tried) < first else self._count) - len(self.tried)
    rng = np.random.default_rng([*self._seed, len(self.tried)])
    known = {self._kind(trial.order) for trial in self.tried}
    found = []
    order = self._steps.order
    for _ in range(_DRAWS * wanted):
      kind = self._kind(order)
      if kind not in known:
        known.add(kind)
        found.append(tuple(map(int, order)))
      if len(found) >= wanted:
        break
      if len(self.tried) < first:
        order = self._steps.drawn(rng, keeps_first=False).order
      else:
        order = self._changed(rng)
    return found

  def _changed(self, rng: np.random.Generator) -> np.ndarray:
    """The best order with two images in each other's place, in one pass or in all of them."""
    order = self.best
    num_images = len(self._labels)
    one, other = rng.choice(num_images, 2, replace=False)
    chosen = rng.integers(-1, -(-len(order) // num_images))
    own = slice(None) if chosen < 0 else slice(chosen * num_images, (chosen + 1) * num_images)
    part = order[own]
    order[own] = np.where(part == one, other, np.where(part == other, one, part))
    return order

  def _kind(self, order: Sequence[int]) -> Hashable:
    """The same for orders that are the same but for numbering."""
    steps_of = np.zeros((len(self._labels), self._step_of_slot[-1] + 1), np.int32)
    np.add.at(steps_of, (np.asarray(order), self._step_of_slot), 1)
    return tuple(
      sorted((int(label), own.tobytes()) for label, own in zip(self._labels, steps_of, strict=True))
    )
