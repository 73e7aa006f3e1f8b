"""Scores as the published evaluation takes them (Jiang, Ma and Yang 2025), beside the strict ones.

Every reconstruction is stretched to [0, 1] by its own minimum and maximum, compared with *all*
images of the client, and each metric keeps the best value it finds, so that PSNR may come from one
image, SSIM from another and the region's PSNR from a third. This flatters an attack: the best of
512 comparisons is good by chance, the more the larger the client, several reconstructions may claim
the same image, and a blurred mean image resembles some image of a large client. Nothing says that
the best match is what was reconstructed. Stretching helps an attack that lost contrast, but takes
from one that did not where the original has less than the full range; so lenient values exceed
strict ones only in what the choice of the match gives. For measuring what leaks use
`attacks.scoring.scores`; these are for comparing with published numbers, never instead.

Two things differ from the released evaluation. Values over the region are means over the region;
there, squared errors outside count as zero in a mean over all pixels, which adds a constant of
-10 log10(share of the region) dB. And IIP compares pixels or LPIPS features as `identification`
does, not the features of the task model.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from attacks.scoring import results
from attacks.scoring.identification import Distance, correlation_distance
from attacks.scoring.metrics import (
  METRIC_NAMES,
  Perceptual,
  Quality,
  measure,
  relative_data_leakage,
  structural_similarity,
)

# Metrics of `Quality` that are better when lower.
_LOWER_IS_BETTER = frozenset({'mse', 'region_mse', 'lpips', 'region_lpips'})


@dataclasses.dataclass(frozen=True)
class LenientScore:
  """The best that can be said of one reconstruction.

  Attributes:
    target: The client id.
    set_name: 'attack' or a control.
    reconstruction: Its index in the set.
    quality: Each metric at its own best match; a region metric is None where no image of the client
      has a region.
    rdlv: The largest relative data leakage over the images; None where no image has one.
    rank: Place, from 1, of the nearest image of the client in a gallery sorted by distance: any
      image of the client counts as its original. None for an image that looks like nothing.
  """

  target: str
  set_name: str
  reconstruction: int
  quality: Quality
  rdlv: float | None
  rank: int | None


def score_leniently(
  attack: results.AttackResult,
  perceptual: Perceptual | None = None,
  *,
  set_names: Sequence[str] = (results.ATTACK, *results.CONTROLS),
  distractors: Sequence[np.ndarray] = (),
  distance: Distance = correlation_distance,
) -> list[LenientScore]:
  """One score for every reconstruction that is finite, of every target.

  Args:
    attack: The attack.
    perceptual: Measures LPIPS where given.
    set_names: Which sets of reconstructions.
    distractors: Images [H, W, C] in the gallery besides those of all attacked clients.
    distance: Of the gallery, see `identification.Distance`.

  Raises:
    UserError: If the images do not suit `perceptual`.
  """
  rows = []
  for target in attack.targets:
    others = _others(attack, target, distractors)
    prior_ssims = None
    if results.PRIOR in target.reconstructions:
      prior = target.reconstructions[results.PRIOR][0]
      prior_ssims = [structural_similarity(prior, truth)[0] for truth in target.images]
    for set_name in set_names:
      for index, image in enumerate(target.reconstructions.get(set_name, ())):
        if not np.isfinite(image).all():
          continue
        stretched = stretch(image)
        found = _qualities(stretched, target.images, target.regions, perceptual)
        rank = _rank(stretched, target.images, others, distance)
        leakage = None if prior_ssims is None else _best_leakage(found, prior_ssims)
        rows.append(LenientScore(target.name, set_name, index, _best(found), leakage, rank))
  return rows


def stretch(image: np.ndarray) -> np.ndarray:
  """`image` rescaled so that its least value is 0 and its largest 1; a flat one stays as it is."""
  image = np.asarray(image, np.float64)
  low, high = image.min(), image.max()
  return (image - low) / (high - low) if high > low else image


def best_quality(
  image: np.ndarray,
  truths: np.ndarray,
  regions: np.ndarray,
  perceptual: Perceptual | None = None,
) -> Quality:
  """Each metric of `image` [H, W, C] at its own best among `truths` [M, H, W, C].

  Args:
    image: A reconstruction, as it is: `stretch` it first for the published values.
    truths: In [0, 1], at least one.
    regions: [M, H, W, 1] in [0, 1], those of `truths`.
    perceptual: Measures LPIPS where given.

  Raises:
    ValueError: As `metrics.measure`, or if there is no truth.
  """
  return _best(_qualities(image, truths, regions, perceptual))


def lenient_precision(scores: Sequence[LenientScore], set_name: str, k: int) -> float | None:
  """IIP-k: the share of a set's reconstructions near which an image of their client lies.

  Near is among the k nearest of the gallery. None without any reconstruction.
  """
  ranks = [row.rank for row in scores if row.set_name == set_name]
  return sum(rank is not None and rank <= k for rank in ranks) / len(ranks) if ranks else None


def _qualities(
  image: np.ndarray, truths: np.ndarray, regions: np.ndarray, perceptual: Perceptual | None
) -> list[Quality]:
  return [
    measure(image, truth, region, perceptual) for truth, region in zip(truths, regions, strict=True)
  ]


def _best(found: Sequence[Quality]) -> Quality:
  """Each metric at its own best."""
  if not found:
    raise ValueError('there must be at least one true image')
  best = {}
  for name in METRIC_NAMES:
    values = [getattr(quality, name) for quality in found]
    values = [value for value in values if value is not None]
    choose = min if name in _LOWER_IS_BETTER else max
    best[name] = choose(values) if values else None
  return Quality(**best)


def _best_leakage(found: Sequence[Quality], prior_ssims: Sequence[float]) -> float | None:
  values = [
    relative_data_leakage(quality.ssim, prior_ssim)
    for quality, prior_ssim in zip(found, prior_ssims, strict=True)
  ]
  values = [value for value in values if value is not None]
  return max(values) if values else None


def _others(
  attack: results.AttackResult, target: results.Target, distractors: Sequence[np.ndarray]
) -> np.ndarray:
  """The gallery without the target's own images: one that it has too is its own wherever it is."""
  images = [image for other in attack.targets if other is not target for image in other.images]
  shape = target.images.shape[1:]
  images += [image for image in distractors if image.shape == shape]
  own = {image.tobytes() for image in target.images}
  images = [image for image in images if image.tobytes() not in own]
  return np.stack(images) if images else np.zeros((0, *shape), np.float32)


def _rank(image: np.ndarray, own: np.ndarray, others: np.ndarray, distance: Distance) -> int | None:
  nearest = distance(image[None], own)[0].min()
  if not np.isfinite(nearest):
    return None
  if not len(others):
    return 1
  # As near as the original goes before it: a tie is no identification.
  return 1 + int((distance(image[None], others)[0] <= nearest).sum())
