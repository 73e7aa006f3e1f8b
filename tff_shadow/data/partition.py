"""How the training examples are dealt to the clients."""

import dataclasses
import math

import numpy as np

from tff_shadow.errors import UserError

_FORMS = "'iid:9', 'dirichlet:9:0.5', 'sizes:8/32/128' or 'manifest'"


@dataclasses.dataclass(frozen=True)
class Partition:
  """A rule that deals examples to clients.

  Attributes:
    kind: 'iid' (equal shares at random), 'dirichlet' (each class is dealt in proportions drawn
      from Dir(alpha), after Hsu et al. 2019, arXiv:1909.06335), 'sizes' (these numbers of
      examples, stratified by class, without replacement; the rest is left out) or 'manifest'
      (the manifest's client column).
    num_clients: number of clients; for 'sizes' it follows from `sizes`, for 'manifest' it is 0.
    alpha: concentration for 'dirichlet': small is skewed, large is close to iid.
    sizes: examples of each client, for 'sizes'.

  Raises:
    UserError: a field is missing, out of range or does not belong to the kind.
  """

  kind: str
  num_clients: int = 0
  alpha: float | None = None
  sizes: tuple[int, ...] = ()

  def __post_init__(self):
    if self.kind not in ('iid', 'dirichlet', 'sizes', 'manifest'):
      raise UserError(f'partition kind {self.kind!r} is unknown: use {_FORMS}')
    if self.sizes and self.kind != 'sizes':
      raise UserError(f'partition {self.kind!r} takes no sizes')
    if self.kind == 'sizes':
      object.__setattr__(self, 'sizes', tuple(self.sizes))
      if not self.sizes or min(self.sizes) < 1:
        raise UserError(f'partition sizes must be positive whole numbers, got {self.sizes}')
      if self.num_clients not in (0, len(self.sizes)):
        raise UserError(f'partition has {len(self.sizes)} sizes for {self.num_clients} clients')
      object.__setattr__(self, 'num_clients', len(self.sizes))
    elif self.kind == 'manifest':
      if self.num_clients:
        raise UserError("partition 'manifest' takes its clients from the manifest, not a number")
    elif self.num_clients < 1:
      raise UserError(f'partition {self.kind!r} needs at least 1 client, got {self.num_clients}')
    if (self.kind == 'dirichlet') != (self.alpha is not None):
      raise UserError("partition alpha belongs to 'dirichlet', and 'dirichlet' needs it")
    if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
      raise UserError(f'partition alpha must be a positive number, got {self.alpha}')

  @classmethod
  def parse(cls, text: str) -> 'Partition':
    """Returns the partition that `text` describes: 'iid:9', 'dirichlet:9:0.5', 'sizes:8/32'...

    Raises:
      UserError: `text` has none of these forms, or a number in it is out of range.
    """
    kind, *fields = text.strip().split(':')
    try:
      if kind == 'iid' and len(fields) == 1:
        return cls('iid', _whole(fields[0]))
      if kind == 'dirichlet' and len(fields) == 2:
        return cls('dirichlet', _whole(fields[0]), float(fields[1]))
      if kind == 'sizes' and len(fields) == 1:
        return cls('sizes', sizes=tuple(_whole(field) for field in fields[0].split('/')))
      if kind == 'manifest' and not fields:
        return cls('manifest')
    except ValueError:
      pass
    raise UserError(f'partition {text!r} is not understood: use {_FORMS}')

  def __str__(self) -> str:
    """Returns the text that `parse` reads back."""
    return {
      'iid': f'iid:{self.num_clients}',
      'dirichlet': f'dirichlet:{self.num_clients}:{self.alpha!r}',
      'sizes': 'sizes:' + '/'.join(map(str, self.sizes)),
      'manifest': 'manifest',
    }[self.kind]


def _whole(text: str) -> int:
  if not (text.isascii() and text.isdigit()):
    raise ValueError(text)
  return int(text)


def partition_indices(
  partition: Partition,
  labels: np.ndarray,
  rng: np.random.Generator,
  client_column: list[str] | None = None,
) -> dict[str, np.ndarray]:
  """Deals the examples with `labels` to clients.

  Args:
    partition: the rule.
    labels: int [N].
    rng: the only source of chance.
    client_column: the client of each example, for the kind 'manifest'.

  Returns:
    Client id to its example indices (int64, in random order but for 'manifest', which keeps the
    file's). Clients never share an example and each has at least one; every kind but 'sizes'
    deals all examples.

  Raises:
    UserError: there are too few examples, or no client column where one is needed.
  """
  labels = np.asarray(labels)
  if partition.kind == 'manifest':
    if client_column is None:
      raise UserError("partition 'manifest' needs a training manifest with the column 'client'")
    column = np.asarray(client_column)
    return {name: np.flatnonzero(column == name) for name in dict.fromkeys(client_column)}
  wanted = sum(partition.sizes) if partition.kind == 'sizes' else partition.num_clients
  if wanted > len(labels):
    raise UserError(
      f"partition '{partition}' needs at least {wanted} training examples, "
      f'but the set has {len(labels)}'
    )
  if partition.kind == 'iid':
    parts = np.array_split(rng.permutation(len(labels)), partition.num_clients)
  elif partition.kind == 'dirichlet':
    parts = _dirichlet(labels, partition.num_clients, partition.alpha, rng)
  else:
    parts = _stratified(labels, partition.sizes, rng)
  digits = max(2, len(str(len(parts) - 1)))
  return {f'client_{i:0{digits}d}': np.asarray(part, np.int64) for i, part in enumerate(parts)}


def _dirichlet(labels, num_clients, alpha, rng):
  parts = [[] for _ in range(num_clients)]
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    shares = rng.dirichlet(np.full(num_clients, alpha))
    if not np.isfinite(shares).all():  # A tiny alpha underflows to 0/0: its limit is one client.
      shares = np.eye(num_clients)[rng.integers(num_clients)]
    cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
    for part, chunk in zip(parts, np.split(members, cuts), strict=True):
      part.extend(chunk.tolist())
  for part in parts:
    if not part:  # A client without an example cannot train: the largest gives one up.
      donor = max(parts, key=len)
      part.append(donor.pop(int(rng.integers(len(donor)))))
  return [rng.permutation(part) for part in parts]


def _stratified(labels, sizes, rng):
  pools = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
  parts = []
  for size in sizes:
    left = np.array([len(pool) for pool in pools])
    exact = size * left / left.sum()
    counts = np.floor(exact).astype(np.int64)
    # Largest remainders, ties by lot. A class with a remainder has an example to spare for it.
    order = np.lexsort((rng.random(len(pools)), counts - exact))
    counts[order[: size - counts.sum()]] += 1
    parts.append(
      rng.permutation(np.concatenate([p[:n] for p, n in zip(pools, counts, strict=True)]))
    )
    pools = [pool[n:] for pool, n in zip(pools, counts, strict=True)]
  return parts
