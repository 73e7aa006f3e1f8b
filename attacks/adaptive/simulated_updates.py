"""Many clients of public images, simulated without and with a defence, and what is seen of them.

What is seen of an update is its projection on the leading directions in which undefended updates of
public images differ, each entry in units of the noise: for white noise a matched filter. And, where
noise is as loud as the update is long, its norm, which many entries of noise tell exactly.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from sklearn.covariance import ledoit_wolf

from attacks.adaptive.players import Equipment, build_player, without_noise
from attacks.adaptive.simulated_defense import noise_key, simulated_steps
from attacks.local_steps import LocalSteps
from attacks.principal_directions import principal_directions
from tff_shadow.data import Examples
from tff_shadow.observations import ClientObservation, Observation, Truth, WeightArrays
from tff_shadow.shadow.augmentation import augment

# Of the updates that directions are taken from: 1 GiB of float32.
MAX_BASIS_ENTRIES = 2**28
# An entry without any noise counts as one with this share of the mean variance.
_LEAST_NOISE = 1e-2
# Of the logarithms of norms that are the same but for rounding.
_LEAST_DEVIATION = 1e-3
# Of how the norms of what is sent vary, so much has to follow from those without noise.
_LEAST_EXPLAINED = 0.1
# Clients that are played at a time; fewer for large models.
_CHUNK = 64
# Of the images, and of the clients.
_HELD_OUT_SHARE = 0.2
# Their keys are none of `simulate_round`, on whose clients is chosen between what was learned of
# these: noise that it was learned from would make that look better than it is.
_OTHER_KEYS = 2**20


class SimulatedClients:
  """Clients of varied public images, drawn anew whenever they are needed.

  Attributes:
    labels: int32 [N, B], of each client's images.
    chosen: int [N, B], which of the public images they are.
    held_out: bool [N], whether a client's images are none of those that the others have; the last
      fifth of the clients.
  """

  def __init__(
    self,
    public: Examples,
    like: ClientObservation,
    count: int,
    augmentations: Sequence[str],
    seed: int,
  ):
    """Draws whose images they have.

    Args:
      public: Images of the modality with labels and regions.
      like: Whose number of images they have.
      count: N.
      augmentations: Of `tff_shadow.shadow.augmentation.AUGMENTATIONS`.
      seed: Decides everything.
    """
    self._both = np.concatenate([public.float_images(), public.float_regions()], axis=-1)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(public))
    num_held = int(_HELD_OUT_SHARE * len(public))
    self.held_out = np.arange(count) >= (1 - _HELD_OUT_SHARE * (num_held > 0)) * count
    self.chosen = np.where(
      self.held_out[:, None],
      order[rng.integers(0, max(num_held, 1), (count, like.num_images))],
      order[rng.integers(num_held, len(public), (count, like.num_images))],
    )
    self.labels = public.labels[self.chosen]
    self._augmentations = augmentations
    self.seed = seed
    entries = sum(array.size for array in like.update.trainable)
    self._chunk = min(_CHUNK, max(1, MAX_BASIS_ENTRIES // 8 // entries))

  def __len__(self) -> int:
    return len(self.chosen)

  def images(self) -> np.ndarray:
    """float32 [N, B H W C], those of a client in an order that can be learned.

    By label, and among those of a label by brightness: nobody knows that of a client.
    """
    chunks = self.chunks(len(self))
    return np.stack([_ordered(own).reshape(-1) for truths in chunks for own in truths.values()])

  def chunks(self, count: int) -> Iterator[dict[int, Truth]]:
    """The first `count`, by their numbers, some at a time."""
    for first in range(0, count, self._chunk):
      numbers = np.arange(first, min(first + self._chunk, count))
      # All of a chunk, so that a client is the same whether or not the others are asked for.
      chosen = self.chosen[first : first + self._chunk]
      flat = self._both[chosen.reshape(-1)]
      seed = tf.constant([self.seed, first])
      varied = augment(tf.constant(flat), self._augmentations, seed).numpy()
      varied = varied.reshape(*chosen.shape, *varied.shape[1:])
      yield {
        int(number): Truth(own[..., :-1], self.labels[number], own[..., -1:])
        for number, own in zip(numbers, varied, strict=False)
      }

  def in_round(
    self, observation: Observation, like: ClientObservation, count: int, is_first: bool
  ) -> Iterator[tuple[dict[str, Truth], dict[str, LocalSteps], dict[str, tuple[int, int]]]]:
    """What `Player.updates` takes of the first `count`, some at a time.

    Args:
      observation: The round.
      like: Whose steps they take.
      count: See above.
      is_first: See `simulate_round`.
    """
    for truths in self.chunks(count):
      yield (
        {str(number): truth for number, truth in truths.items()},
        {
          str(number): simulated_steps(observation, like, self.seed, number, is_first)
          for number in truths
        },
        {str(number): noise_key(observation, self.seed, _OTHER_KEYS + number) for number in truths},
      )


class SimulatedUpdates:
  """Of one round.

  Attributes:
    clean: [clients, k], what is seen of updates without noise: undefended ones, or what a defence
      that does more than add noise makes of them (`players.without_noise`).
    noise: [defended clients, k], by how much defended ones differ from them.
    loudness: [clients], of the noise of each, as far as it follows from the norm of the update;
      the geometric mean is 1.
    norms: [clients, c], the logarithm of the norm of the defended update, as far as it follows from
      that of the update without noise; c is 0 where it does not, and else 1.
    norm_errors: [defended clients, c], by how much it differs.
    shown: Of each defended client, what its update shows of its labels; empty for an attacker who
      is told them.
  """

  def __init__(
    self,
    observation: Observation,
    like: ClientObservation,
    clients: SimulatedClients,
    *,
    num_defended: int,
    num_basis: int,
    num_features: int,
    shown: Callable[[WeightArrays], Any] | None,
    equipment: Equipment,
    is_first: bool,
    progress: Callable[[float, str], None],
  ):
    """Plays the clients.

    Args:
      observation: The round, under its defence.
      like: Whose steps they take.
      clients: Who.
      num_defended: How many of them play under the defence too, for the noise.
      num_basis: How many of them give the directions; fewer for large models.
      num_features: k at most.
      shown: From a defended update to what it shows of the labels; None for an attacker who is
        told them.
      equipment: With which the defence is played.
      is_first: See `simulate_round`.
      progress: Called with the share that is done, in [0, 1], and what is.

    Raises:
      UserError: If the defence cannot be played.
    """
    shares = bool(like.update.non_trainable)
    noiseless = dataclasses.replace(observation, defense=without_noise(observation.defense))
    players = {'clean': build_player(noiseless, shares)}
    draws_noise = noiseless.defense != observation.defense
    if draws_noise:
      players['defended'] = build_player(observation, shares, equipment)
    num_defended = min(num_defended, len(clients))
    self.shown: list[Any] = []

    def play(kind: str, count: int) -> Iterator[np.ndarray]:
      done = 0
      for some in clients.in_round(observation, like, count, is_first):
        sent = players[kind].updates(*some)
        if shown is not None and (kind == 'defended' or not draws_noise):
          left = num_defended - len(self.shown)
          self.shown += map(shown, itertools.islice(sent.values(), left))
        yield np.concatenate([flat(update) for update in sent.values()])
        done += len(sent)
        progress(done / len(clients), f'{kind} clients')

    clean = play('clean', len(clients))
    defended = play('defended', num_defended) if draws_noise else iter(())
    first = next(clean)
    num_basis = min(num_basis, len(clients), max(3, MAX_BASIS_ENTRIES // first.shape[1]))
    basis = _at_least(num_basis, first, clean)
    sent = basis[:0]
    if draws_noise:
      sent = _at_least(min(num_basis, num_defended), next(defended), defended)
    paired = min(len(basis), len(sent))
    differences = sent[:paired] - basis[:paired]
    noise_norms = log_norms(differences)
    self._scale = inverse_deviations(differences, noise_norms)
    is_noised = bool(differences.any())
    del differences
    self._center = basis.mean(axis=0)
    scaled = (basis - self._center) * self._scale
    self._projection, _ = principal_directions(scaled, num_features)
    del scaled
    parts = [(self._features(own), log_norms(own)) for own in (basis, *clean)]
    self.clean, norms = (np.concatenate(column) for column in zip(*parts, strict=True))
    self.noise = np.zeros((num_defended, self.clean.shape[1]), np.float32)
    sent_norms = norms[:0]
    if draws_noise:
      parts = [(self._features(own), log_norms(own)) for own in (sent, *defended)]
      sent, sent_norms = (np.concatenate(column) for column in zip(*parts, strict=True))
      self.noise = sent - self.clean[: len(sent)]
    # Noise of a ratio grows with the update, and noise of a scale does not; where clipping makes
    # all updates of one length there is nothing to tell.
    varies = is_noised and norms[:paired].std() > _LEAST_DEVIATION
    slope = np.polyfit(norms[:paired], noise_norms, 1)[0] if varies else 0.0
    self.loudness = np.exp(slope * (norms - norms.mean()))
    self.norms = self.norm_errors = np.zeros((len(clients), 0))
    if is_noised:
      self.norms, self.norm_errors = explained(norms, sent_norms)

  def features_of(self, update: WeightArrays) -> np.ndarray:
    """[k], what is seen of a client's update."""
    return self._features(flat(update))[0]

  def norms_of(self, update: WeightArrays) -> np.ndarray:
    """[c], the logarithm of a client's norm."""
    return log_norms(flat(update))[: self.norms.shape[1]]

  def _features(self, updates: np.ndarray) -> np.ndarray:
    """[N, k] of updates [N, d]."""
    return (updates - self._center) * self._scale @ self._projection


def _at_least(count: int, first: np.ndarray, more: Iterator[np.ndarray]) -> np.ndarray:
  """Rows of `first` and of so many of `more` that there are `count`."""
  rows = [first]
  while sum(map(len, rows)) < count:
    rows.append(next(more))
  return np.concatenate(rows)


def flat(update: WeightArrays) -> np.ndarray:
  """[1, d], weights and statistics."""
  arrays = (*update.trainable, *(update.non_trainable or ()))
  return np.concatenate([np.ravel(array) for array in arrays]).astype(np.float32)[None]


def inverse_deviations(noises: np.ndarray, norms: np.ndarray) -> np.ndarray:
  """Of each entry [d] of noises [N, d], each client's in units of its norm; 1 without any noise.

  Their geometric mean is 1.

  How far the variances seem to differ by chance alone is taken out (James and Stein 1961).
  """
  variance = np.zeros(noises.shape[1])
  for noise, norm in zip(noises, norms, strict=True):
    variance += np.square(noise * np.exp(-norm), dtype=np.float64) / len(noises)
  if not variance.any():
    return np.ones(noises.shape[1], np.float32)
  logs = np.log(variance + _LEAST_NOISE * variance.mean())
  logs -= logs.mean()
  # The logarithm of a mean of N squares of a normal has the variance 2 / N.
  kept = max(0.0, 1 - 2 / len(noises) / max(logs.var(), 1e-12))
  return np.exp(-kept * logs / 2).astype(np.float32)


def noise_moments(noise: np.ndarray, norm_errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean [k + c] and covariance of noise [n, k] and errors of norms [n, c], of which c are exact.

  The errors are of mean zero, and far smaller than noise: its estimate is none of theirs.
  """
  count = noise.shape[1]
  mean = np.append(noise.mean(axis=0), np.zeros(norm_errors.shape[1]))
  covariance = np.zeros((len(mean),) * 2)
  if noise.any():
    covariance[:count, :count] = ledoit_wolf(noise)[0]
  if norm_errors.shape[1]:
    covariance[count:, count:] = norm_errors.T @ norm_errors / len(norm_errors)
  return mean, covariance


def explained(norms: np.ndarray, sent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What norms tell of others, as far as that is much.

  Args:
    norms: [N], logarithms of the norms of updates without noise.
    sent: [n], of what the first n clients sent, or of the noise in it.

  Returns:
    [N, c], what is expected by a line through both; and [n, c], by how much `sent` differs. c is 0
    where that line explains little, and else 1.
  """
  if norms[: len(sent)].std() <= _LEAST_DEVIATION:
    return np.zeros((len(norms), 0)), np.zeros((len(sent), 0))
  expected = np.polyval(np.polyfit(norms[: len(sent)], sent, 1), norms)[:, None]
  errors = sent[:, None] - expected[: len(sent)]
  count = int(errors.var() < (1 - _LEAST_EXPLAINED) * sent.var())
  return expected[:, :count], errors[:, :count]


def log_norms(rows: np.ndarray) -> np.ndarray:
  """[N], of rows [N, d]."""
  return np.log(np.linalg.norm(rows, axis=1) + 1e-30)


def _ordered(own: Truth) -> np.ndarray:
  return own.images[np.lexsort((own.images.mean(axis=(1, 2, 3)), own.labels))]
