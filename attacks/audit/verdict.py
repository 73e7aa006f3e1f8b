"""The verdict of an audit, which fails closed: whatever is missing makes it worse, never better."""

import dataclasses
from collections.abc import Mapping, Sequence

from attacks.report.findings import NEGLIGIBLE, cannot_be_told, is_identifying, judge
from attacks.scoring import gate
from attacks.scoring.identification import Identification
from attacks.scoring.scores import ImageScore
from attacks.scoring.statistics import Interval

# What reconstructions show where it is not the reason.
_OTHERWISE = {
  'not_beyond_guess': ('No reconstruction shows more of the images than a guess.',),
  'inconclusive': ('Whether reconstructions show more than a guess is not settled.',),
}
# Of known images.
_TOLD = (
  'A server that has the images already can tell who trained on which: updates pick {0.correct} of'
  ' {0.of} images out of {0.choices}.'
)
_UNTOLD = (
  'Updates pick {0.correct} of {0.of} images out of {0.choices} known ones, and too few clients'
  ' have equally many images to tell whether that is chance.'
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What follows for one round.

  Attributes:
    name: One of `findings.VERDICTS`.
    reasons: Why it is not better, in sentences.
    pictures: Likewise, whatever can be told of images that the server has already.
  """

  name: str
  reasons: tuple[str, ...]
  pictures: str


def judge_round(
  scores: Sequence[ImageScore],
  identification: Identification,
  control: Sequence[ImageScore],
  clean: Sequence[Sequence[ImageScore]],
  problems: Sequence[str],
  tolerated: Mapping[str, float] = NEGLIGIBLE,
  recognized: Identification | None = None,
) -> Verdict:
  """The verdict on what the strongest attack recovered, and on what can be told of known images.

  Known images that updates pick out more often than by chance (p < 0.05) are a part of a leak.
  Where too few clients have equally many images to tell whether it is chance, nothing is cleared.

  A leak that was found is one, whatever else went wrong. That there is none may be said only if
  the same attack recovers undefended single images (the positive control passes the gate), the
  attacks recover the images of the same round without the defence (which have as many steps and
  images), every attack could be made, and there is an attacker who knows the defence.

  Args:
    scores: Of the strongest attack; may be empty.
    identification: Likewise.
    control: Scores of the positive control; empty if it could not be made.
    clean: For each round, the scores of the strongest attack on it without a defence; of the round
      itself where it has none, so that this is never said of it.
    problems: What could not be done, in sentences.
    tolerated: Gains over a guess that are none; see `findings.NEGLIGIBLE`.
    recognized: Of images that updates pick out of known ones; None where that was not tried.
  """
  name, reasons = _judged(scores, identification, control, clean, problems, tolerated)
  if recognized is None or name == 'leaked':
    return Verdict(name, reasons, name)
  if is_identifying(recognized):
    told = (_TOLD.format(recognized), *_OTHERWISE.get(name, ()))
    return Verdict('partly_leaked', (*told, *reasons), name)
  if cannot_be_told(recognized) and name == 'not_beyond_guess':
    return Verdict('inconclusive', (_UNTOLD.format(recognized), *reasons), name)
  return Verdict(name, reasons, name)


def _judged(
  scores, identification, control, clean, problems, tolerated
) -> tuple[str, tuple[str, ...]]:
  """The verdict on reconstructions, and its reasons; see `judge_round`."""
  if not scores:
    return 'inconclusive', ('No attack could be made.', *problems)
  name, reason = judge(list(scores), identification, tolerated)
  reasons = (f'{reason[0].upper()}{reason[1:]}.',) if reason else ()
  if name in ('leaked', 'partly_leaked'):
    return name, reasons
  doubts = [*reasons, *problems]
  margin = gate.margin_interval(control)
  if not control:
    doubts.append('Without a positive control it is not shown that a leak would be seen.')
  elif not gate.exceeds_gate(margin):
    doubts.append(
      f'The positive control failed: of undefended single images the attack recovers'
      f' {_gain(margin)}, so that it would see no leak if there were one.'
    )
  if not clean:
    doubts.append(
      'The same images, steps and batches were not attacked without a defence, so that nothing'
      ' shows that the attacks would see a leak there.'
    )
  for own in clean:
    margin = gate.margin_interval(own)
    if not gate.exceeds_gate(margin):
      doubts.append(
        f'Without a defence, from the same images, steps and batches, the attacks recover'
        f' {_gain(margin)}: that they see nothing does not show that there is nothing.'
      )
  return 'inconclusive' if doubts else name, tuple(doubts)


def _gain(margin: Interval) -> str:
  if margin.mean is None:
    return 'nothing'
  sure = '' if margin.low is None else f' (at least {margin.low:.1f} dB)'
  return f'{margin.mean:.1f} dB more than a guess{sure}'
