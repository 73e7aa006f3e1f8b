"""The scores of an attack: one row for every true image, also where the attack failed."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from attacks.scoring import results
from attacks.scoring.assignment import assign, mse_matrix
from attacks.scoring.metrics import (
  METRIC_NAMES,
  Perceptual,
  Quality,
  measure,
  relative_data_leakage,
)
from tff_shadow.errors import UserError

SETS = (results.ATTACK, *results.GUESSES)


@dataclasses.dataclass(frozen=True)
class ImageScore:
  """How one true image was reconstructed.

  Attributes:
    target: The client id.
    image: Index of the true image in the client's truth.
    status: 'ok'; 'failed' where the attack gave up or its reconstruction is not finite; 'unmatched'
      where the attack made fewer reconstructions than there are images. Only 'ok' has a quality
      of 'attack'. Neither of the others is ever a success of the defence.
    reason: Why it is not 'ok', else ''.
    label: The true class.
    label_inferred_correct: Whether the attack inferred this image's label correctly; None where it
      was told the label or nothing is matched.
    matches: From set name to the index of the matched reconstruction in that set.
    quality: From set name, one of `SETS`, to the metrics; a set without a
      usable image is absent.
  """

  target: str
  image: int
  status: str
  reason: str
  label: int
  label_inferred_correct: bool | None
  matches: dict[str, int]
  quality: dict[str, Quality]

  def value(self, set_name: str | None, metric: str) -> float | None:
    """One metric of a set, a field of `Quality` or 'closeness'; None where there is none."""
    quality = self.quality.get(set_name)
    return None if quality is None else getattr(quality, metric)

  @property
  def region_is_empty(self) -> bool:
    """Whether the region is zero everywhere, so that no region metric exists."""
    return any(quality.region_mse is None for quality in self.quality.values())

  @property
  def rdlv(self) -> float | None:
    """Relative data leakage value of the attack, with the mean image as the prior.

    None where either is missing or the mean image is too unlike the truth to divide by.
    """
    attack, prior = (self.quality.get(name) for name in (results.ATTACK, results.PRIOR))
    if attack is None or prior is None:
      return None
    return relative_data_leakage(attack.ssim, prior.ssim)


def values(scores: Sequence[ImageScore], set_name: str | None, metric: str) -> list[float]:
  """One metric of a set on all images that have it."""
  found = (row.value(set_name, metric) for row in scores)
  return [value for value in found if value is not None]


def score_attack(
  run_dir: str | pathlib.Path, attack_name: str, perceptual: Perceptual | None = None
) -> list[ImageScore]:
  """Scores RUN/attacks/NAME against RUN/truth.

  Raises:
    UserError: For a file that is missing, damaged, of another version or at odds with another, or
      if the images do not suit `perceptual`.
  """
  return score(results.load_attack(run_dir, attack_name), perceptual)


def score(attack: results.AttackResult, perceptual: Perceptual | None = None) -> list[ImageScore]:
  """One score for every true image of every target, in the order of the truth.

  Each set of reconstructions (the attack's and each control's) gets its own one-to-one assignment
  by MSE, used for all metrics. Where a control has fewer images than there are truths, the truths
  left over get its nearest image: a guess may be made for any image. LPIPS is measured only with
  `perceptual`.

  Raises:
    UserError: If the images do not suit `perceptual`.
  """
  return [row for target in attack.targets for row in _score_target(target, perceptual)]


def write_scores(path: str | pathlib.Path, scores: list[ImageScore]) -> None:
  """Writes `scores` as CSV, atomically; a metric that does not exist is an empty cell.

  Columns: target, image, status, label, label_inferred_correct, reconstruction, then SET_METRIC,
  with rdlv for the attack alone.

  Raises:
    UserError: If the file cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  try:
    with temporary.open('w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, csv_columns())
      writer.writeheader()
      writer.writerows(_csv_row(row) for row in scores)
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror})') from None


def csv_columns() -> list[str]:
  """The header of scores.csv."""
  metric_columns = [f'{set_name}_{metric}' for set_name in SETS for metric in METRIC_NAMES]
  fixed = ['target', 'image', 'status', 'label', 'label_inferred_correct', 'reconstruction']
  return [*fixed, *metric_columns, f'{results.ATTACK}_rdlv']


def _score_target(target: results.Target, perceptual: Perceptual | None) -> list[ImageScore]:
  matches: list[dict[str, int]] = [{} for _ in target.images]
  for set_name, images in target.reconstructions.items():
    for truth, index in match(images, target.images, reuse=set_name != results.ATTACK).items():
      matches[truth][set_name] = index
  rows = []
  for truth, matched in enumerate(matches):
    status, reason = _status(target, matched)
    quality = {
      set_name: measure(
        target.reconstructions[set_name][index],
        target.images[truth],
        target.regions[truth],
        perceptual,
      )
      for set_name, index in matched.items()
    }
    label = int(target.labels[truth])
    rows.append(
      ImageScore(
        target=target.name,
        image=truth,
        status=status,
        reason=reason,
        label=label,
        label_inferred_correct=_label_correct(target, matched, label),
        matches=matched,
        quality=quality,
      )
    )
  return rows


def match(images: np.ndarray, truths: np.ndarray, reuse: bool) -> dict[int, int]:
  """From truth to reconstruction, over the finite reconstructions only.

  Args:
    images: Reconstructions [N, H, W, C].
    truths: [M, H, W, C].
    reuse: Whether truths that are left over get the nearest image.
  """
  usable = np.flatnonzero(np.isfinite(images).all(axis=(1, 2, 3)))
  if not len(usable):
    return {}
  matched = assign(images[usable], truths)
  if reuse and len(matched) < len(truths):
    nearest = mse_matrix(images[usable], truths).argmin(axis=0)
    matched = {truth: matched.get(truth, int(nearest[truth])) for truth in range(len(truths))}
  return {truth: int(usable[index]) for truth, index in matched.items()}


def _status(target: results.Target, matched: dict[str, int]) -> tuple[str, str]:
  if results.ATTACK in matched:
    return 'ok', ''
  if target.record['status'] == 'failed':
    return 'failed', str(target.record.get('reason') or 'no reason given')
  attempts = target.reconstructions[results.ATTACK]
  if not np.isfinite(attempts).all():
    return 'failed', 'the reconstruction holds values that are not finite'
  return 'unmatched', (
    f'the attack made {len(attempts)} reconstructions of {len(target.images)} images'
  )


def _label_correct(target: results.Target, matched: dict[str, int], label: int) -> bool | None:
  index = matched.get(results.ATTACK)
  labels = target.record['labels']
  if target.record.get('labels_source') != 'inferred' or index is None or index >= len(labels):
    return None
  return labels[index] == label


def _csv_row(row: ImageScore) -> dict[str, object]:
  values: dict[str, object] = {
    'target': row.target,
    'image': row.image,
    'status': row.status,
    'label': row.label,
    'label_inferred_correct': row.label_inferred_correct,
    'reconstruction': row.matches.get(results.ATTACK),
  }
  for set_name, quality in row.quality.items():
    for metric in METRIC_NAMES:
      values[f'{set_name}_{metric}'] = _cell(getattr(quality, metric))
  values[f'{results.ATTACK}_rdlv'] = _cell(row.rdlv)
  return values


def _cell(value: float | None) -> str | None:
  return None if value is None else f'{value:.6g}'
