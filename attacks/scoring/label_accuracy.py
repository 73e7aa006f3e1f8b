"""How many class labels the attack inferred rightly.

Counted twice: image by image, where the label must sit on the reconstruction that is matched to the
image; and client by client as multisets, which asks only which classes the client trained on and
how often, so that it does not depend on the pictures.
"""

import collections
import dataclasses
from collections.abc import Sequence

from attacks.scoring.results import AttackResult
from attacks.scoring.scores import ImageScore


@dataclasses.dataclass(frozen=True)
class LabelAccuracy:
  """`correct` of `of` labels."""

  correct: int
  of: int

  @property
  def share(self) -> float | None:
    """Accuracy in [0, 1]; None where no label was inferred."""
    return self.correct / self.of if self.of else None


def matched_labels(scores: Sequence[ImageScore]) -> LabelAccuracy:
  """Over the images that have a matched reconstruction with an inferred label."""
  known = [row.label_inferred_correct for row in scores if row.label_inferred_correct is not None]
  return LabelAccuracy(sum(known), len(known))


def multiset_labels(attack: AttackResult) -> LabelAccuracy:
  """Size of the intersection of inferred and true labels of each client, over its images.

  Clients whose images could not be rebuilt count too, if their labels were inferred; clients whose
  labels were told to the attack, or that it gave up before inferring any, do not.
  """
  correct, of = 0, 0
  for target in attack.targets:
    if target.record.get('labels_source') == 'inferred':
      inferred = collections.Counter(target.record['labels'])
      true = collections.Counter(int(label) for label in target.labels)
      correct += (inferred & true).total()
      of += len(target.labels)
  return LabelAccuracy(correct, of)
