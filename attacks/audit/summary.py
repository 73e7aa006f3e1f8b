"""The content of an audit's summary.json; every number of its page comes from here."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attacks.audit.strongest import (
  Scored,
  strongest,
  strongest_identification,
  strongest_names,
)
from attacks.audit.suite import Attacked
from attacks.audit.verdict import judge_round
from attacks.report.findings import (
  NEGLIGIBLE,
  VERDICTS,
  identification_json,
  interval_json,
  leaked_images,
)
from attacks.scoring import gate, results
from attacks.scoring.identification import Identification
from attacks.scoring.label_accuracy import multiset_labels
from attacks.scoring.metrics import psnr_from_mse
from attacks.scoring.scores import ImageScore, values
from attacks.scoring.statistics import clustered_interval, paired_differences

STRONGEST, UNDEFENDED, GUESS = 'strongest', 'undefended', 'guess'
METRICS = ('psnr', 'region_psnr', 'ssim', 'region_ssim')


class RoundEvidence(NamedTuple):
  """All that was tried on one round, or on several jointly.

  Attributes:
    rounds: Their numbers.
    attacks: Those made on what the server saw.
    failed: Those that could not be made.
    undefended: Those made on the same round without the defence; empty if it has none.
    control: The attack on undefended single images; without scores if it could not be made.
    problems: What else could not be done, in sentences.
    bounds: PSNR in dB over the region that no attack of a kind passes on average: 'name',
      'region_psnr', 'rests_on' in words, 'holds_here', whether for the attacks of an audit, and
      'clients', over which it is averaged.
    clean: For each of these rounds that was audited by itself, the attacks on it as it is without
      a defence: `undefended`, or its own where it has none. Unless they see the images nothing is
      cleared.
    recognized: Images that updates pick out of known ones; None where that was not tried.
  """

  rounds: tuple[int, ...]
  attacks: Sequence[Scored]
  failed: Sequence[Attacked]
  undefended: Sequence[Scored]
  control: Scored
  problems: Sequence[str] = ()
  bounds: Sequence[Mapping[str, Any]] = ()
  clean: Sequence[Sequence[Scored]] = ()
  recognized: Identification | None = None


def with_problems(
  evidence: Sequence[RoundEvidence], problems: Sequence[str]
) -> list[RoundEvidence]:
  """With what could not be attacked jointly, in sentences.

  It is added to the joint attacks, and to all rounds where there are none, so that no single one is
  taken for all that the rounds show together.
  """
  joint = any(len(own.rounds) > 1 for own in evidence)
  return [
    own._replace(problems=[*own.problems, *problems]) if len(own.rounds) > 1 or not joint else own
    for own in evidence
  ]


def summarise_round(
  evidence: RoundEvidence, tolerated: Mapping[str, float] = NEGLIGIBLE
) -> dict[str, Any]:
  """One entry of 'rounds'.

  Intervals are those of `findings.interval_json`, over clients, each with the mean of its images;
  dB where PSNRs are compared.

  rounds: Numbers of the rounds that this rests on.
  verdict, reasons, pictures: Of `verdict.judge_round`.
  images, clients: How many.
  strongest: metric -> interval, each image by the attack that came closest.
  guess: metric -> interval of the better control, by the mean of that metric.
  margin: metric -> interval of strongest minus guess, paired by image.
  class_mean: metric -> interval of the mean public image of each image's class, which takes no more
    of the update than its label; of no images where that is not known.
  beyond_class: metric -> interval of strongest minus class_mean, paired by image.
  worst: The image with the greatest margin of region PSNR: client, image, label, and its values.
  leaked_images: As `findings.leaked_images`.
  undefended: As 'strongest', of the round without the defence; null if it has none.
  change: metric -> interval of strongest minus undefended, paired by image; null likewise.
  attacks: One for each: name, metrics, margin, identified, labels, strongest_on, failed, knows,
    seconds.
  not_made: name and problem of those that could not be made.
  identified: Of the attack that tells most, its p-value corrected for their number.
  recognized: Of images that a server which has them already picks out of known ones by the updates;
    null where that was not tried.
  control: metrics, margin, passed, images of the positive control; of no images if it could not be
    made.
  groups: Rows of `_groups`.
  per_client: Rows of `_clients`.
  per_image: 'images', CLIENT/NUMBER of each, and 'values': from `STRONGEST`, `UNDEFENDED`, `GUESS`
    (one control for all metrics), 'class_mean' and the name of each attack to metric -> one value
    an image, null where there is none.
  bounds: See `RoundEvidence`; and 'measured', of the attack that came closest to the same clients,
    the region PSNR of its mean squared error over their images.
  """
  problems = [*evidence.problems]
  problems += [
    f'The attack {own.name} could not be made: {own.problem}.' for own in evidence.failed
  ]
  problems += [problem for own in evidence.attacks for problem in _shortfalls(own)]
  if evidence.control.attacked.problem:
    problems.append(f'The positive control could not be made: {evidence.control.attacked.problem}.')
  scores = strongest(evidence.attacks) if evidence.attacks else []
  identification = strongest_identification(evidence.attacks) if scores else None
  verdict = judge_round(
    scores,
    identification,
    evidence.control.scores,
    _clean_scores(evidence, {row.target for row in scores}),
    problems,
    tolerated,
    evidence.recognized,
  )
  clean = strongest(evidence.undefended) if evidence.undefended else []
  return {
    'rounds': list(evidence.rounds),
    'verdict': verdict.name,
    'reasons': list(verdict.reasons),
    'pictures': verdict.pictures,
    'images': len(scores),
    'clients': len({row.target for row in scores}),
    'strongest': _means(scores, results.ATTACK),
    'guess': {metric: _guess(scores, metric) for metric in METRICS},
    'margin': _margins(scores),
    'class_mean': _means(scores, results.CLASS_MEAN),
    'beyond_class': _differences(scores, results.ATTACK, scores, results.CLASS_MEAN),
    'worst': _worst(scores),
    'leaked_images': leaked_images(scores),
    'undefended': _means(clean, results.ATTACK) if clean else None,
    'change': _differences(scores, results.ATTACK, clean, results.ATTACK) if clean else None,
    'attacks': _attacks(evidence.attacks),
    'not_made': [{'name': own.name, 'problem': own.problem} for own in evidence.failed],
    'identified': identification_json(identification),
    'recognized': identification_json(evidence.recognized),
    'control': _control(evidence.control),
    'groups': _groups(scores),
    'per_client': _clients(scores),
    'per_image': _per_image(scores, clean, evidence.attacks),
    'bounds': [
      {**bound, 'measured': _measured(evidence.attacks, bound['clients'])}
      for bound in evidence.bounds
    ],
  }


def _shortfalls(attack: Scored) -> list[str]:
  """Why an attack that was made is less than one, in sentences."""
  name, rows = attack.attacked.name, attack.scores
  unusable = sum(row.status != 'ok' for row in rows)
  early = [own for own in attack.attacked.results if own.status == 'ok' and own.reason]
  found = []
  if unusable:
    found.append(f'The attack {name} gave no usable result on {unusable} of {len(rows)} images.')
  if early:
    found.append(
      f'The attack {name} ended early on {len(early)} of {len(attack.attacked.results)} clients:'
      f' {early[0].reason}.'
    )
  return found


def _clean_scores(evidence: RoundEvidence, clients: set[str]) -> list[list[ImageScore]]:
  """Of `clients`, in each round as it is without a defence, by the attacks that came closest."""
  return [
    [row for row in (strongest(attacks) if attacks else ()) if row.target in clients]
    for attacks in evidence.clean
  ]


def _attacks(attacks: Sequence[Scored]) -> list[dict[str, Any]]:
  names = strongest_names(attacks) if attacks else []
  rows = []
  for attack in attacks:
    labels = multiset_labels(attack.result)
    rows.append(
      {
        'name': attack.attacked.name,
        'metrics': _means(attack.scores, results.ATTACK),
        'margin': _margins(attack.scores),
        'identified': identification_json(attack.identification),
        'labels': dataclasses.asdict(labels) if labels.of else None,
        'strongest_on': names.count(attack.attacked.name),
        'failed': sum(row.status != 'ok' for row in attack.scores),
        'knows': list(attack.attacked.knows),
        'seconds': sum(own.seconds for own in attack.attacked.results),
      }
    )
  return rows


def _control(control: Scored) -> dict[str, Any]:
  margin = gate.margin_interval(control.scores)
  return {
    'metrics': _means(control.scores, results.ATTACK),
    'margin': interval_json(margin),
    'passed': gate.exceeds_gate(margin),
    'images': len(control.scores),
  }


def _margins(scores: Sequence[ImageScore]) -> dict[str, Any]:
  return {metric: interval_json(gate.margin_interval(scores, metric)) for metric in METRICS}


def _means(scores: Sequence[ImageScore], set_name: str) -> dict[str, Any]:
  return {metric: _mean(scores, set_name, metric) for metric in METRICS}


def _guess(scores: Sequence[ImageScore], metric: str) -> dict[str, Any]:
  return _mean(scores, gate.better_control(scores, metric), metric)


def _mean(scores: Sequence[ImageScore], set_name: str | None, metric: str) -> dict[str, Any]:
  return _over_clients(scores, [row.value(set_name, metric) for row in scores])


def _over_clients(scores: Sequence[ImageScore], found: Sequence[float | None]) -> dict[str, Any]:
  """The interval of a value of each image, of those that have one."""
  return interval_json(clustered_interval(found, [row.target for row in scores]))


def _differences(
  scores: Sequence[ImageScore], set_name: str, others: Sequence[ImageScore], other_name: str
) -> dict[str, Any]:
  """Metric -> interval of the first set minus the second, paired by image."""
  return {
    metric: _over_clients(
      scores,
      paired_differences(
        [row.value(set_name, metric) for row in scores],
        [row.value(other_name, metric) for row in others],
      ),
    )
    for metric in METRICS
  }


def _gains(scores: Sequence[ImageScore]) -> list[float]:
  """Of each image, over the region; 0 where the attack failed. See `gate.margins`."""
  common = gate.better_control(scores, 'region_psnr') or gate.better_control(scores)
  return [gate.gain(row, 'closeness', common) for row in scores]


def _measured(attacks: Sequence[Scored], clients: Sequence[str]) -> float | None:
  """Of one attack at a time: what is chosen by the truth, image by image, no bound holds for."""
  found = []
  for attack in attacks:
    rows = [row for row in attack.scores if row.target in clients]
    errors = values(rows, results.ATTACK, 'region_mse')
    if errors and len(errors) == len(rows):
      found.append(psnr_from_mse(float(np.mean(errors))))
  return max(found, default=None)


def _worst(scores: Sequence[ImageScore]) -> dict[str, Any] | None:
  if not scores:
    return None
  gains = _gains(scores)
  index = int(np.argmax(gains))
  row = scores[index]
  return {
    'client': row.target,
    'image': row.image,
    'label': row.label,
    'margin': gains[index],
    **{metric: row.value(results.ATTACK, metric) for metric in METRICS},
  }


def _groups(scores: Sequence[ImageScore]) -> list[dict[str, Any]]:
  """Kinds of images: those of each class, of the smaller and of the larger clients.

  Clients are compared only where their numbers of images differ.
  """
  counts = {name: sum(row.target == name for row in scores) for name in {r.target for r in scores}}
  classes = sorted({row.label for row in scores})
  kinds: list[tuple[str, Callable[[ImageScore], bool]]] = [
    (f'class {label}', lambda row, label=label: row.label == label) for label in classes
  ]
  if len(set(counts.values())) > 1:
    middle = float(np.median(list(counts.values())))
    kinds += [
      (f'clients of at most {middle:g} images', lambda row: counts[row.target] <= middle),
      (f'clients of more than {middle:g} images', lambda row: counts[row.target] > middle),
    ]
  gains = _gains(scores)
  rows = []
  for name, belongs in kinds:
    chosen = [pair for pair in zip(scores, gains, strict=True) if belongs(pair[0])]
    if chosen:
      own = [gain for _, gain in chosen]
      clients = [row.target for row, _ in chosen]
      rows.append(
        {
          'name': name,
          'images': len(own),
          'margin': interval_json(clustered_interval(own, clients)),
          'worst': max(own),
          'leaked_images': leaked_images([row for row, _ in chosen]),
        }
      )
  return rows


def _clients(scores: Sequence[ImageScore]) -> list[dict[str, Any]]:
  """Of each client, the mean and the greatest gain over its images, the worst client first."""
  gains: dict[str, list[float]] = {}
  for row, gain in zip(scores, _gains(scores), strict=True):
    gains.setdefault(row.target, []).append(gain)
  rows = [
    {'client': name, 'images': len(own), 'margin': float(np.mean(own)), 'worst': max(own)}
    for name, own in gains.items()
  ]
  return sorted(rows, key=lambda row: -row['worst'])


def _per_image(
  scores: Sequence[ImageScore], clean: Sequence[ImageScore], attacks: Sequence[Scored]
) -> dict[str, Any]:
  sets = {STRONGEST: (scores, results.ATTACK), **_guesses(scores)}
  if any(results.CLASS_MEAN in row.quality for row in scores):
    sets[results.CLASS_MEAN] = (scores, results.CLASS_MEAN)
  if clean:
    sets[UNDEFENDED] = (clean, results.ATTACK)
  sets |= {attack.attacked.name: (attack.scores, results.ATTACK) for attack in attacks}
  return {
    'images': [f'{row.target}/{row.image}' for row in scores],
    'values': {
      name: {metric: [row.value(set_name, metric) for row in rows] for metric in METRICS}
      for name, (rows, set_name) in sets.items()
    },
  }


def _guesses(scores: Sequence[ImageScore]) -> dict[str, tuple[Sequence[ImageScore], str]]:
  control = gate.better_control(scores, 'region_psnr') or gate.better_control(scores)
  return {GUESS: (scores, control)} if control else {}


def summarise(
  rounds: Sequence[Mapping[str, Any]],
  *,
  title: str,
  defended: bool,
  adaptive: bool,
  **document: Any,
) -> dict[str, Any]:
  """The whole content of summary.json.

  Args:
    rounds: Of `summarise_round`, at least one.
    title: Of the page.
    defended: Whether anything is done against attacks.
    adaptive: Whether an attacker who knows the defence was among them.
    **document: What the page shows besides: scope, seed, budget, tolerated, guarantee, utility,
      command, versions; and what `comparison` needs: dataset, digests, training, defense, epsilon.
  """
  worst = min(rounds, key=lambda entry: VERDICTS.index(entry['verdict']))
  return {
    'format': 'tff-shadow-audit',
    'version': 1,
    'title': title,
    'verdict': worst['verdict'],
    'headline': _headline(rounds, worst),
    'reasons': list(worst['reasons']),
    'defended': defended,
    **document,
    'rounds': [dict(entry) for entry in rounds],
    'recommendations': _recommendations(worst, defended, adaptive),
    'limits': list(_LIMITS),
  }


_LIMITS = (
  'The verdict holds for these attacks, this budget, model, data and rounds. A stronger attack may'
  ' recover more: without a formal guarantee no audit proves that images are safe.',
  'PSNR and SSIM measure likeness of pixels, not whether a person or a disease can be recognised.',
  'Which attack came closest was decided by the originals, image by image, which no attacker can'
  ' do; so what one attacker would have at best is overestimated.',
  'Images that the server has already are sought among those named there, by a test that no other'
  ' beats for one image in one step, and that another may beat for several.',
  'Of several images of a client the originals decide which reconstruction stands for which.'
  ' Whether originals are picked out is tested against the reconstructions of other clients with as'
  ' many images; gains in dB are against guesses that are matched likewise, and an image that was'
  ' rebuilt clearly is counted as it is.',
  'Intervals are over clients, each with the mean of its images, and cover no other seed.',
  'The server is assumed to follow the protocol: it does not change the model to draw out more.',
)


def _headline(rounds: Sequence[Mapping[str, Any]], worst: Mapping[str, Any]) -> str:
  where = round_words(worst['rounds'])
  where = where[0].lower() + where[1:]
  if worst['verdict'] == 'leaked':
    leaked = f'{worst["leaked_images"]} of {worst["images"]} training images'
    return f'From {where} the server could have rebuilt {leaked} clearly.'
  if worst['verdict'] == 'partly_leaked' != worst['pictures']:
    return f'From {where} a server that has an image already could have told who trained on it.'
  if worst['verdict'] == 'partly_leaked':
    return f'From {where} the server could have seen something of training images.'
  if worst['verdict'] == 'inconclusive':
    return f'Whether the server could have seen training images is not settled: {where}.'
  count = 'the audited round' if len(rounds) == 1 else f'all {len(rounds)} audited rounds'
  return f'From {count} no attack saw anything of the images beyond what could be guessed.'


def round_words(rounds: Sequence[int]) -> str:
  """'Round 3', or 'Rounds 1 to 4, 7 together'."""
  if len(rounds) == 1:
    return f'Round {rounds[0]}'
  return f'Rounds {", ".join(round_ranges(rounds, " to "))} together'


def round_ranges(rounds: Sequence[int], to: str) -> list[str]:
  """The numbers in rising order, three or more in a row as 'first TO last'."""
  texts: list[str] = []
  # What numbers that follow each other have in common: their distance to their places.
  for _, pairs in itertools.groupby(enumerate(sorted(rounds)), lambda pair: pair[1] - pair[0]):
    run = [number for _, number in pairs]
    texts += [f'{run[0]}{to}{run[-1]}'] if len(run) > 2 else map(str, run)
  return texts


def _recommendations(worst: Mapping[str, Any], defended: bool, adaptive: bool) -> list[str]:
  leaking = worst['verdict'] in ('leaked', 'partly_leaked')
  sentences = []
  if leaking:
    sentences.append(
      'Treat the images of this run as disclosed to whoever saw the updates of single clients.'
    )
  if leaking and not defended:
    sentences.append(
      'Train with a defence (--defense), or with secure aggregation over many clients so that the'
      ' server sees no single update, and audit again.'
    )
  if leaking and defended:
    sentences.append(
      'Raise the strength of the noise, or take larger batches and more local steps, and audit'
      ' again; compare the usefulness of the model before and after.'
    )
  if worst['verdict'] == 'inconclusive':
    sentences.append('Remove the reasons named above, with more clients or a larger budget.')
  if defended and not adaptive:
    sentences.append(
      'Audit with --budget=default or thorough: an attacker who knows the defence recovers more.'
    )
  if worst['verdict'] == 'not_beyond_guess':
    sentences.append(
      'Repeat the audit when the model, the data, the local training or the defence changes.'
    )
  sentences.append('Labels are private too, and noise against pictures does not hide them.')
  return sentences
