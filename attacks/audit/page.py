"""The page of an audit, for someone who has to decide and was not there."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attacks.audit.strongest import Scored, strongest_names
from attacks.audit.suite import ADAPTIVE, ADAPTIVE_REGION
from attacks.audit.summary import GUESS, STRONGEST, UNDEFENDED, round_words
from attacks.report import findings, pictures
from attacks.report.page import environment, share_words
from attacks.scoring import gate, results

ATTACK_WORDS = {
  ADAPTIVE: 'knows the defence',
  ADAPTIVE_REGION: 'knows the defence and the regions',
}


class Annex(NamedTuple):
  """Pictures of one round.

  Attributes:
    rounds: Its number, or numbers.
    attacks: Whose reconstructions are shown: of each image, that which came closest.
  """

  rounds: tuple[int, ...]
  attacks: Sequence[Scored]


def render(audit: Mapping[str, Any], annex: Sequence[Annex] = ()) -> str:
  """The page as one self-contained HTML text.

  Args:
    audit: The summary; see `attacks.audit.summary.summarise`.
    annex: Rounds whose reconstructions are shown; none by default, so that the page may be passed
      on.
  """
  return (
    environment()
    .get_template('audit.html.j2')
    .render(
      audit=audit,
      plots=[_plot(entry['per_image']) for entry in audit['rounds']],
      annex=[{'rounds': list(part.rounds), 'cases': _cases(part.attacks)} for part in annex],
      attack_words=ATTACK_WORDS,
      verdict_words=findings.VERDICT_WORDS,
      round_words=round_words,
      share=share_words,
      clear_gain=gate.GATE_MEAN_DB,
      clear_low=gate.GATE_LOW_DB,
      min_images=findings.MIN_IMAGES,
      min_clients=findings.MIN_CLIENTS,
    )
  )


def _plot(per_image: Mapping[str, Any]) -> dict[str, str] | None:
  words = {
    UNDEFENDED: 'without the defence',
    STRONGEST: 'strongest attack',
    GUESS: 'guess',
  }
  values = per_image['values']
  groups = {words[name]: _closeness(values[name]) for name in words if name in values}
  if not any(value is not None for own in groups.values() for value in own):
    return None
  label = 'PSNR over the region, dB (higher is closer to the original)'
  return pictures.light_and_dark(pictures.strip_uri, groups, label)


def _closeness(values: Mapping[str, Sequence[float | None]]) -> list[float | None]:
  """Region PSNR, and PSNR where there is no region."""
  pairs = zip(values['region_psnr'], values['psnr'], strict=True)
  return [whole if region is None else region for region, whole in pairs]


def _cases(attacks: Sequence[Scored]) -> list[dict[str, Any]]:
  by_name = {attack.attacked.name: attack for attack in attacks}
  cases = []
  names = strongest_names(attacks, 'psnr') if attacks else []
  for place, name in enumerate(names):
    if name is None:
      continue
    row = by_name[name].scores[place]
    target = next(own for own in by_name[name].result.targets if own.name == row.target)
    shown: list[tuple[str, np.ndarray]] = [('Original', target.images[row.image])]
    guess = results.OTHER_UPDATE if results.OTHER_UPDATE in row.matches else 'prior_only'
    for label, set_name in (('From the update', results.ATTACK), ('Guess', guess)):
      if set_name in row.matches:
        shown.append((label, target.reconstructions[set_name][row.matches[set_name]]))
    cases.append(
      {
        'client': row.target,
        'image': row.image,
        'attack': name,
        'pictures': [(label, pictures.image_uri(image)) for label, image in shown],
      }
    )
  return cases
