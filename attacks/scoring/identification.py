"""Whether an original can be told from other images by its reconstruction.

PSNR and SSIM punish noise, while an eye, or a denoiser, sees through it: a picture may be plain to
see and still be further from the original than a flat grey image. So each reconstruction is also
used to pick its original out of a gallery: image identifiability precision, IIP-k, the share of
reconstructions whose own original is among the k images of the gallery nearest to them (H. Yin et
al., "See through gradients: image batch recovery via GradInversion", CVPR 2021, section 4.4). The
distance is Pearson correlation, which noise without structure does not change on average, or LPIPS.

Of a client's several images the originals decide which reconstruction stands for which, so that
some are picked out by chance more often than one in as many as there are to pick from. What that
does is seen where reconstructions of one client stand, by the same rule, for the images of another:
a permutation test over clients with as many images each. It is exact, as without a leak it makes no
difference whose reconstructions they are.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from attacks.scoring import results
from attacks.scoring.scores import ImageScore, match

# Sizes of the short list.
KS = (1, 3, 5)
CONTROLS = ('prior_only', results.OTHER_UPDATE)
_PERMUTATIONS = 1999
# Distances closer than rounding are a tie, and a tie is no identification.
_TIE = 1e-6

# From images [N, H, W, C] and a gallery [M, H, W, C] to distances [N, M]; a row of NaN identifies
# nothing.
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Precision:
  """IIP-k.

  Attributes:
    k: Length of the short list.
    correct: Reconstructions of the attack with their own original on it.
    control_correct: As `correct`, with a control in place of the attack.
  """

  k: int
  correct: int
  control_correct: int


@dataclasses.dataclass(frozen=True)
class Identification:
  """How many originals were picked out rightly.

  Attributes:
    correct: Reconstructions whose own original is nearer to them than any other of the gallery.
    of: Reconstructions.
    choices: Images to pick from, each counted once however often it is there.
    control_correct: As `correct`, with a control in place of the attack: whichever of `CONTROLS`
      picks out more.
    p_value: `chance_p_value`; where a client has several images the larger of that and the
      permutation test's, of `correct` among as many when clients change their reconstructions.
    control_of: Reconstructions of the control.
    precisions: IIP-k for each of `KS`; the first repeats `correct`.
    chance_p_value: One-sided binomial test of `correct` against the largest of 1 / `choices`, the
      rate of 'prior_only' and (k + 1) / (n + 1) where 'other_update' picks out k of n; 1 where
      there is nothing to test. Too low where a client has several images.
    least_p_value: The least that `p_value` may be: 1 where a client has several images and no other
      has as many.
  """

  correct: int
  of: int
  choices: int
  control_correct: int
  p_value: float
  control_of: int = 0
  precisions: tuple[Precision, ...] = ()
  chance_p_value: float = 1.0
  least_p_value: float = 0.0


def correlation_distance(images: np.ndarray, gallery: np.ndarray) -> np.ndarray:
  """One minus Pearson correlation over pixels and channels, [N, M] in [0, 2]; NaN for flat images.

  An image of the gallery that is flat correlates with nothing, so its distance is 1.
  """
  rows = np.array([_standardised(image) for image in images])
  columns = [rows @ _standardised(image) for image in gallery]
  distances = 1 - np.array(columns).reshape(len(gallery), len(images)).T
  distances[~rows.any(axis=1)] = np.nan
  return distances


def identify(
  attack: results.AttackResult,
  scores: Sequence[ImageScore],
  distractors: Sequence[np.ndarray] = (),
  distance: Distance = correlation_distance,
) -> Identification:
  """Picks originals by the reconstructions of `attack`, matched as in `scores`.

  Args:
    attack: The attack.
    scores: Its scores, a row for every original.
    distractors: Images [H, W, C] to pick from besides all attacked originals.
    distance: See `Distance`.
  """
  choices = len(_gallery(attack, distractors))
  ranks = original_ranks(attack, scores, distractors, distance)
  attacked, prior_only, other_update = (
    [rank for rank in ranks[set_name] if rank is not None]
    for set_name in (results.ATTACK, *CONTROLS)
  )
  control = max(prior_only, other_update, key=lambda own: own.count(1))
  precisions = tuple(
    Precision(k, sum(rank <= k for rank in attacked), sum(rank <= k for rank in control))
    for k in KS
  )
  first = precisions[0]
  # Without originals there is nothing to pick, and nothing picked.
  chance = max(1 / max(choices, 1), prior_only.count(1) / len(prior_only) if prior_only else 0.0)
  if other_update:
    # What the attack is told may show more than chance, which few draws may not: one more hit.
    chance = max(chance, (other_update.count(1) + 1) / (len(other_update) + 1))
  p_value, least = 1.0, 0.0
  if attacked:
    test = stats.binomtest(first.correct, len(attacked), chance, alternative='greater')
    p_value = float(test.pvalue)
  chance_p_value = p_value
  if attacked and any(len(target.images) > 1 for target in attack.targets):
    exchanged, least = _exchanged(attack, distractors, distance)
    p_value = max(p_value, exchanged)
  return Identification(
    correct=first.correct,
    of=len(attacked),
    choices=choices,
    control_correct=first.control_correct,
    p_value=p_value,
    control_of=len(control),
    precisions=precisions,
    chance_p_value=chance_p_value,
    least_p_value=least,
  )


def original_ranks(
  attack: results.AttackResult,
  scores: Sequence[ImageScore],
  distractors: Sequence[np.ndarray] = (),
  distance: Distance = correlation_distance,
) -> dict[str, list[int | None]]:
  """Place of each original, from 1, in the gallery sorted by distance from its reconstruction.

  Images as near as the original go before it: a tie is no identification. Exact copies of the
  original do not count, whichever of them is picked shows the same; nor do images of another size.
  An image that looks like nothing (`Distance`) has its original behind all others.

  Returns:
    For the attack and for each of `CONTROLS` one rank for each of `scores`; None where that set has
    no usable image.
  """
  originals = _originals(attack)
  gallery = _gallery(attack, distractors)
  made = {target.name: target.reconstructions for target in attack.targets}
  ranks: dict[str, list[int | None]] = {
    set_name: [None] * len(scores) for set_name in (results.ATTACK, *CONTROLS)
  }
  for shape in {image.shape for image in originals}:
    candidates = {key: image for key, image in gallery.items() if image.shape == shape}
    columns = {key: column for column, key in enumerate(candidates)}
    # Both sets at once: features of the gallery cost most.
    asked = [
      (set_name, place)
      for set_name in ranks
      for place, row in enumerate(scores)
      if set_name in row.matches and originals[place].shape == shape
    ]
    if not asked:
      continue
    images = [
      made[scores[place].target][set_name][scores[place].matches[set_name]]
      for set_name, place in asked
    ]
    distances = distance(np.stack(images), np.stack(list(candidates.values())))
    for (set_name, place), row in zip(asked, distances, strict=True):
      ranks[set_name][place] = _rank(row, columns[_key(originals[place])])
  return ranks


def original_places(
  originals: Sequence[np.ndarray], distractors: Sequence[np.ndarray]
) -> tuple[list[int], list[int]]:
  """Images to pick from, each of which is there once, and where the originals are among these.

  Args:
    originals: Images [H, W, C].
    distractors: Others, behind them.

  Returns:
    Their places in originals and distractors together; and of each original the place among them.
  """
  first: dict[bytes, int] = {}
  keys = [_key(image) for image in [*originals, *distractors]]
  for place, key in enumerate(keys):
    first.setdefault(key, place)
  order = {key: column for column, key in enumerate(first)}
  return list(first.values()), [order[key] for key in keys[: len(originals)]]


def identify_by_likelihood(
  ranks: np.ndarray, owners: Sequence[int], choices: int
) -> Identification:
  """How many originals the updates themselves pick out; see `likelihood_ranks`.

  The control stands each client's update for the images of the next one. The p-value is that of the
  permutation test over clients with as many images each.

  Args:
    ranks: int [N, K].
    owners: K clients.
    choices: Images to pick from.
  """
  owners = np.asarray(owners)
  clients, places = np.arange(len(ranks)), np.arange(len(owners))
  own = ranks[owners, places]
  others = ranks[(owners + 1) % len(ranks), places] if len(ranks) > 1 else own[:0]
  precisions = tuple(Precision(k, int(np.sum(own <= k)), int(np.sum(others <= k))) for k in KS)
  correct = precisions[0].correct
  # Of each client by each update.
  hits = np.stack([np.sum(ranks[:, owners == client] == 1, axis=1) for client in clients], axis=1)
  counts = np.bincount(owners, minlength=len(ranks))
  alike = [np.flatnonzero(counts == count) for count in np.unique(counts)]
  p_value, least = _permuted(
    [(hits[np.ix_(group, group)], int(counts[group[0]])) for group in alike]
  )
  chance = stats.binomtest(correct, len(owners), 1 / choices, alternative='greater').pvalue
  return Identification(
    correct=correct,
    of=len(owners),
    choices=choices,
    control_correct=precisions[0].control_correct,
    p_value=max(p_value, float(chance)),
    control_of=len(others),
    precisions=precisions,
    chance_p_value=float(chance),
    least_p_value=least,
  )


def likelihood_ranks(
  likelihoods: np.ndarray, own: Sequence[int], owners: Sequence[int]
) -> np.ndarray:
  """Place, from 1, of each original among those to pick from, by each client's update.

  Other images of the client that has it do not count, as they are no mistakes.

  Args:
    likelihoods: [N, M], of the update of each client for each image.
    own: K columns.
    owners: Of each of these, which client has it.

  Returns:
    int [N, K]. As likely images go before it, and with an update for which there are no likelihoods
    it is behind all.
  """
  own, owners = np.asarray(own), np.asarray(owners)
  ranks = []
  for column, owner in zip(own, owners, strict=True):
    counted = np.ones(likelihoods.shape[1], bool)
    counted[own[owners == owner]] = False
    above = likelihoods[:, counted] >= likelihoods[:, [column]]
    ranks.append(1 + np.sum(above, axis=1))
  ranks = np.stack(ranks, axis=1)
  ranks[np.isnan(likelihoods).any(axis=1)] = _behind_all(likelihoods.shape[1])
  return ranks


def _permuted(groups: Sequence[tuple[np.ndarray, int]]) -> tuple[float, float]:
  """p-value of the permutation test, and the least that it may be.

  The latter is 1 where a client of several images can change places with no other.

  Args:
    groups: Of clients that change places: [N, N], how many originals of the second what is known of
      the first picks out, and how many images each has.
  """
  generator = np.random.default_rng(0)
  correct, permuted = 0, np.zeros(_PERMUTATIONS, np.int64)
  least = 1.0
  for hits, _ in groups:
    places = np.arange(len(hits))
    correct += int(hits[places, places].sum())
    orders = generator.permuted(np.tile(places, (_PERMUTATIONS, 1)), axis=1)
    permuted += hits[orders, places].sum(axis=1)
    least /= math.factorial(len(hits))
  p_value = (1 + int((permuted >= correct).sum())) / (1 + _PERMUTATIONS)
  if any(len(hits) == 1 and images > 1 for hits, images in groups):
    least = 1.0
  return p_value, max(least, 1 / (1 + _PERMUTATIONS))


def _exchanged(
  attack: results.AttackResult, distractors: Sequence[np.ndarray], distance: Distance
) -> tuple[float, float]:
  """p-value of the permutation test over clients, and the least that it may be.

  Clients change reconstructions with those that have as many originals and as many reconstructions.
  """
  gallery = _gallery(attack, distractors)
  alike: dict[tuple, list[results.Target]] = {}
  for target in attack.targets:
    made = target.reconstructions.get(results.ATTACK)
    if made is not None:
      alike.setdefault((target.images.shape, made.shape), []).append(target)
  return _permuted([(_hits(own, gallery, distance), len(own[0].images)) for own in alike.values()])


def _hits(
  targets: Sequence[results.Target], gallery: dict[bytes, np.ndarray], distance: Distance
) -> np.ndarray:
  """[N, N]: how many originals of the second the reconstructions of the first pick out."""
  shape = targets[0].images.shape[1:]
  candidates = {key: image for key, image in gallery.items() if image.shape == shape}
  columns = {key: column for column, key in enumerate(candidates)}
  own = [[columns[_key(image)] for image in target.images] for target in targets]
  made = [target.reconstructions[results.ATTACK] for target in targets]
  usable = [np.isfinite(images).all(axis=(1, 2, 3)) for images in made]
  asked = np.concatenate([images[kept] for images, kept in zip(made, usable, strict=True)])
  hits = np.zeros((len(targets), len(targets)), np.int64)
  if not len(asked):
    return hits
  distances = distance(asked, np.stack(list(candidates.values())))
  row = 0
  for first, (images, kept) in enumerate(zip(made, usable, strict=True)):
    nearest = dict(zip(np.flatnonzero(kept), distances[row : row + kept.sum()], strict=True))
    row += kept.sum()
    for second, target in enumerate(targets):
      matched = match(images, target.images, reuse=False)
      hits[first, second] = sum(
        _rank(nearest[index], own[second][truth]) == 1 for truth, index in matched.items()
      )
  return hits


def _rank(distances: np.ndarray, own: int) -> int:
  if np.isnan(distances).any():
    return _behind_all(len(distances))
  margin = _TIE * max(1.0, abs(distances[own]))
  others = np.delete(distances, own)
  return 1 + int((others <= distances[own] + margin).sum())


def _behind_all(choices: int) -> int:
  """One more than there are places, so that not even the only image of a gallery is identified."""
  return max(choices, *KS) + 1


def _originals(attack: results.AttackResult) -> list[np.ndarray]:
  return [image for target in attack.targets for image in target.images]


def _gallery(
  attack: results.AttackResult, distractors: Sequence[np.ndarray]
) -> dict[bytes, np.ndarray]:
  """By digest, each image that is as large as an original, once."""
  originals = _originals(attack)
  shapes = {image.shape for image in originals}
  images = [*originals, *(image for image in distractors if image.shape in shapes)]
  return {_key(image): image for image in images}


def _key(image: np.ndarray) -> bytes:
  pixels = np.ascontiguousarray(image, np.float32).tobytes()
  return hashlib.sha256(repr(image.shape).encode() + pixels).digest()


def _standardised(image: np.ndarray) -> np.ndarray:
  """Flat, of mean 0 and length 1, so that a product is a Pearson correlation; 0 if constant."""
  flat = np.asarray(image, np.float64).reshape(-1)
  flat = flat - flat.mean()
  length = np.linalg.norm(flat)
  # A constant image keeps rounding noise of this order.
  return flat / length if length > 1e-9 * np.sqrt(flat.size) else np.zeros_like(flat)
