"""Does the attack beat what could be guessed without any update? The gate and its margins.

An attack that does not beat its controls has recovered nothing, and nothing measured after an
attack that does not work means anything; so a regime counts only once its gate has passed.

A client's images share one update and one draw of its noise, so they say less than as many clients
would: intervals are over clients, each with the mean of its images.
"""

import math
from collections.abc import Iterator, Sequence

from attacks.scoring import results
from attacks.scoring.scores import ImageScore, values
from attacks.scoring.statistics import Interval, clustered_interval, mean_interval

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
      than any single guess could be. An image without the common control has its own best.

  Returns:
    One value for every image; an image that the attack failed on counts as attack = control, so 0.
    Left out are only images on which the metric itself is undefined (an empty region).
  """
  return [margin for _, margin in _margins(scores, metric, per_image)]


def margin_interval(
  scores: Sequence[ImageScore], metric: str = 'psnr', per_image: bool = False
) -> Interval:
  """Of clients, each the mean of its images' `margins`; the arguments are those."""
  pairs = list(_margins(scores, metric, per_image))
  return clustered_interval([margin for _, margin in pairs], [client for client, _ in pairs])


def _margins(
  scores: Sequence[ImageScore], metric: str, per_image: bool
) -> Iterator[tuple[str, float]]:
  """Client and margin of each image."""
  common = better_control(scores, metric)
  for row in scores:
    if metric.startswith('region_') and row.region_is_empty:
      continue
    yield row.target, gain(row, metric, None if per_image else common)


def gain(row: ImageScore, metric: str, common: str | None) -> float:
  """Attack minus control of one image; 0 where the attack failed, or there is no control.

  Args:
    row: The image.
    metric: See `margins`; or 'closeness'.
    common: The control; an image that lacks it, or None, has its own best.
  """
  known = {name: row.value(name, metric) for name in results.GUESSES}
  known = {name: value for name, value in known.items() if value is not None}
  attack = row.value(results.ATTACK, metric)
  if attack is None or not known:
    return 0.0
  return attack - (known[common] if common in known else max(known.values()))


def gate_line(dataset: str, scores: Sequence[ImageScore]) -> str:
  """GATE <dataset> attack=<dB> control=<dB> margin=<dB> ci95=<low>,<high> n=<images>.

  `attack` and `control` are mean PSNRs over images, with attack := control on failed images;
  `margin` is the mean paired difference over clients, each with the mean of its images. A number
  that does not exist is printed as nan.
  """
  margin = margin_interval(scores)
  control = mean_interval(values(scores, better_control(scores), 'psnr'))
  attack = mean_interval(_attack_or_control(scores))
  numbers = [_text(value) for value in (attack.mean, control.mean, margin.mean)]
  return (
    f'GATE {dataset} attack={numbers[0]} control={numbers[1]} margin={numbers[2]} '
    f'ci95={_text(margin.low)},{_text(margin.high)} n={len(scores)}'
  )


def gate_passed(scores: Sequence[ImageScore]) -> bool:
  """Mean margin >= 6 dB, lower end of its interval > 4 dB, and at least 16 images."""
  margin = margin_interval(scores)
  return len(scores) >= GATE_IMAGES and exceeds_gate(margin)


def exceeds_gate(margin: Interval) -> bool:
  """The gate's thresholds in dB alone, whatever the number of images (of at least 2 clients)."""
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
