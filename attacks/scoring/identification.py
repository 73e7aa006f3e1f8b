"""Whether an original can be told from the other originals by its reconstruction.

PSNR and SSIM punish noise, while an eye, or a denoiser, sees through it: a picture may be plain to
see and still be further from the original than a flat grey image. So each reconstruction is also
used to pick its original out of all attacked originals, by Pearson correlation, which noise without
structure does not change on average (compare image identifiability precision, Yin et al.,
"See through gradients: image batch recovery via GradInversion", CVPR 2021).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from attacks.scoring import results
from attacks.scoring.scores import ImageScore


@dataclasses.dataclass(frozen=True)
class Identification:
  """How many originals were picked out rightly.

  Attributes:
    correct: Reconstructions whose own original correlates most with them.
    of: Reconstructions.
    choices: Originals to pick from.
    control_correct: As `correct`, with the prior-only control in place of the attack.
    p_value: One-sided binomial test of `correct` against the larger of the control's rate and
      1 / `choices`; 1 where there is nothing to test.
  """

  correct: int
  of: int
  choices: int
  control_correct: int
  p_value: float


def identify(attack: results.AttackResult, scores: Sequence[ImageScore]) -> Identification:
  """Picks originals by the reconstructions of `attack`, matched as in `scores`."""
  truths = [image for target in attack.targets for image in target.images]
  attacked = _hits(attack, scores, results.ATTACK, truths)
  control = _hits(attack, scores, 'prior_only', truths)
  chance = max(1 / len(truths), sum(control) / len(control) if control else 0.0)
  p_value = 1.0
  if attacked:
    test = stats.binomtest(sum(attacked), len(attacked), chance, alternative='greater')
    p_value = float(test.pvalue)
  return Identification(sum(attacked), len(attacked), len(truths), sum(control), p_value)


def _hits(
  attack: results.AttackResult,
  scores: Sequence[ImageScore],
  set_name: str,
  truths: list[np.ndarray],
) -> list[bool]:
  """Whether each reconstruction's own original is the one it correlates with most."""
  reconstructions = {target.name: target.reconstructions for target in attack.targets}
  hits = []
  for own, row in enumerate(scores):
    if set_name not in row.matches:
      continue
    image = _standardised(reconstructions[row.target][set_name][row.matches[set_name]])
    # Originals of another size are no candidates.
    candidates = [index for index, truth in enumerate(truths) if truth.size == image.size]
    similarity = {index: float(image @ _standardised(truths[index])) for index in candidates}
    # An original that is there twice is found whichever copy is picked; a flat image finds none.
    hits.append(similarity[own] > 0 and similarity[own] >= max(similarity.values()) - 1e-9)
  return hits


def _standardised(image: np.ndarray) -> np.ndarray:
  """Flat, of mean 0 and length 1, so that a product is a Pearson correlation; 0 if constant."""
  flat = np.asarray(image, np.float64).reshape(-1)
  flat = flat - flat.mean()
  length = np.linalg.norm(flat)
  # A constant image keeps rounding noise of this order.
  return flat / length if length > 1e-9 * np.sqrt(flat.size) else np.zeros_like(flat)
