"""What the strongest attack recovered of each image.

Which attack is the strongest is decided by the truth, image by image and metric by metric, which no
attacker can do: an audit errs towards the leak. Controls are those of one attack, so that they do
not profit likewise.
"""

import dataclasses
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attacks.audit.suite import Attacked
from attacks.results import TargetResult
from attacks.scoring import results
from attacks.scoring.identification import Identification, identify
from attacks.scoring.metrics import Quality
from attacks.scoring.scores import ImageScore, score
from tff_shadow.observations import Truth

_SMALLER_IS_CLOSER = ('mse', 'region_mse', 'lpips', 'region_lpips')


class Scored(NamedTuple):
  """One attack, scored.

  Attributes:
    attacked: The attack.
    result: As the report reads it.
    scores: One for every image.
    identification: Of the originals by their reconstructions.
  """

  attacked: Attacked
  result: results.AttackResult
  scores: list[ImageScore]
  identification: Identification


def score_attacked(
  attacked: Attacked,
  truth: Mapping[str, Truth],
  distractors: Sequence[np.ndarray],
  class_means: Mapping[int, np.ndarray] = types.MappingProxyType({}),
) -> Scored:
  """Scores an attack.

  Args:
    attacked: Without results, as one that could not be made, it has no scores.
    truth: Of its clients.
    distractors: Images [H, W, C] that originals are picked out of, beside all attacked ones.
    class_means: From a class to the mean [H, W, C] of public images of it, as far as there are any.
  """
  targets = tuple(_target(own, truth[own.target], class_means) for own in attacked.results)
  result = results.AttackResult(pathlib.Path(), attacked.name, {}, targets)
  rows = score(result)
  return Scored(attacked, result, rows, identify(result, rows, distractors))


def strongest(attacks: Sequence[Scored]) -> list[ImageScore]:
  """Each image as the attacks together came to know it.

  Args:
    attacks: On the same clients, at least one. Controls are those of the first, and 'other_update'
      of the last that has it, the one that is told most.

  Returns:
    One score for every image, each metric of 'attack' the best of all attacks; without one where
    all attacks failed.
  """
  merged = []
  for rows in zip(*(attack.scores for attack in attacks), strict=True):
    found = [row.quality[results.ATTACK] for row in rows if results.ATTACK in row.quality]
    quality = {name: rows[0].quality[name] for name in results.CONTROLS if name in rows[0].quality}
    for row in rows:
      for name in (results.OTHER_UPDATE, results.CLASS_MEAN):
        if name in row.quality:
          quality[name] = row.quality[name]
    if found:
      quality[results.ATTACK] = _best_of(found)
    usable = next((row for row in rows if row.status == 'ok'), rows[0])
    guesses = [row.label_inferred_correct for row in rows]
    known = [guess for guess in guesses if guess is not None]
    merged.append(
      dataclasses.replace(
        usable, quality=quality, matches={}, label_inferred_correct=any(known) if known else None
      )
    )
  return merged


def strongest_identification(attacks: Sequence[Scored]) -> Identification:
  """That of the attack which tells most; p-values times the number of attacks (Bonferroni)."""
  known = [attack.identification for attack in attacks]

  def corrected(p_value: float) -> float:
    return min(1.0, p_value * len(attacks))

  best = min(known, key=lambda own: own.p_value)
  return dataclasses.replace(
    best,
    p_value=corrected(best.p_value),
    chance_p_value=corrected(min(own.chance_p_value for own in known)),
    least_p_value=corrected(max(own.least_p_value for own in known)),
  )


def strongest_names(attacks: Sequence[Scored], metric: str = 'region_psnr') -> list[str | None]:
  """For each image the attack that came closest by `metric`; None where none did."""
  names: list[str | None] = []
  for rows in zip(*(attack.scores for attack in attacks), strict=True):
    values = [
      (getattr(row.quality[results.ATTACK], metric), attack.attacked.name)
      for row, attack in zip(rows, attacks, strict=True)
      if results.ATTACK in row.quality
    ]
    known = [pair for pair in values if pair[0] is not None]
    names.append(max(known)[1] if known else None)
  return names


def _best_of(found: Sequence[Quality]) -> Quality:
  values = {}
  for field in dataclasses.fields(Quality):
    known = [v for v in (getattr(quality, field.name) for quality in found) if v is not None]
    best = min if field.name in _SMALLER_IS_CLOSER else max
    values[field.name] = best(known) if known else None
  return Quality(**values)


def _target(
  own: TargetResult, truth: Truth, class_means: Mapping[int, np.ndarray]
) -> results.Target:
  made = {name: images for name, images in own.reconstructions.items() if images is not None}
  if all(int(label) in class_means for label in truth.labels):
    made[results.CLASS_MEAN] = np.stack([class_means[int(label)] for label in truth.labels])
  if own.status != 'ok':
    made.pop(results.ATTACK, None)
  return results.Target(
    own.target, own.as_dict(), made, truth.images, np.asarray(truth.labels), truth.regions
  )
