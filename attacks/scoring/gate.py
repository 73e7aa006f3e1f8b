"""Does the attack beat what could be guessed without any update? The gate and its margins.

An attack that does not beat its controls has recovered nothing, and nothing measured after an
attack that does not work means anything; so a regime counts only once its gate has passed.
"""

import math
from collections.abc import Sequence

from attacks.scoring import results
from attacks.scoring.scores import ImageScore, values
from attacks.scoring.statistics import Interval, mean_interval

GATE_MEAN_DB = 6.0
GATE_LOW_DB = 4.0
GATE_IMAGES = 16


def better_control(scores: Sequence[ImageScore], metric: str = 'psnr') -> str | None:
  """The control with the higher mean `metric` over all images; None where there is no control."""
  means = {}
  for control in results.GUESSES:
    found = values(scores, control, metric)
    if found:
      means[control] = sum(found) / len(found)
  return max(means, key=means.get) if means else None


def margins(
  scores: Sequence[ImageScore], metric: str = 'psnr', per_image: bool = False
) -> list[float]:
  """Attack minus control for every image, paired; dB for PSNRs.

  Args:
    scores: The images.
    metric: A field of `Quality` that is better when higher.
    per_image: False compares every image with the same control, the better one by its mean;
      True compares each image with whichever control is better on that image, which is stricter
      than any single guess could be.

  Returns:
    One value for every image; an image that the attack failed on counts as attack = control, so 0.
    Left out are only images on which the metric itself is undefined (an empty region).
  """
  common = better_control(scores, metric)
  differences = []
  for row in scores:
    if metric.startswith('region_') and row.region_is_empty:
      continue
    names = results.GUESSES if per_image else (common,)
    controls = [row.value(name, metric) for name in names]
    controls = [value for value in controls if value is not None]
    attack = row.value(results.ATTACK, metric)
    differences.append(attack - max(controls) if attack is not None and controls else 0.0)
  return differences


def gate_line(dataset: str, scores: Sequence[ImageScore]) -> str:
  """GATE <dataset> attack=<dB> control=<dB> margin=<dB> ci95=<low>,<high> n=<images>.

  `attack` and `control` are mean PSNRs, with attack := control on failed images; `margin` is the
  mean paired difference. A number that does not exist is printed as nan.
  """
  margin = mean_interval(margins(scores))
  control = mean_interval(values(scores, better_control(scores), 'psnr'))
  attack = mean_interval(_attack_or_control(scores))
  numbers = [_text(value) for value in (attack.mean, control.mean, margin.mean)]
  return (
    f'GATE {dataset} attack={numbers[0]} control={numbers[1]} margin={numbers[2]} '
    f'ci95={_text(margin.low)},{_text(margin.high)} n={margin.n}'
  )


def gate_passed(scores: Sequence[ImageScore]) -> bool:
  """Mean margin >= 6 dB, lower end of its interval > 4 dB, and at least 16 images."""
  margin = mean_interval(margins(scores))
  return margin.n >= GATE_IMAGES and exceeds_gate(margin)


def exceeds_gate(margin: Interval) -> bool:
  """The gate's thresholds in dB alone, whatever the number of images (at least 2)."""
  if margin.mean is None or margin.low is None:
    return False
  return margin.mean >= GATE_MEAN_DB and margin.low > GATE_LOW_DB


def _attack_or_control(scores: Sequence[ImageScore]) -> list[float]:
  control = better_control(scores)
  found = [
    row.value(results.ATTACK if results.ATTACK in row.quality else control, 'psnr')
    for row in scores
  ]
  return [value for value in found if value is not None]


def _text(value: float | None) -> str:
  return f'{math.nan if value is None else value:.2f}'
