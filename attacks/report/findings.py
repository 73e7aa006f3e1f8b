"""What the scores mean: a verdict on each attack, in words, and summary.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attacks.report.reading import Run, ScoredAttack, Training
from attacks.scoring import gate, results
from attacks.scoring.identification import Identification
from attacks.scoring.label_accuracy import LabelAccuracy, matched_labels, multiset_labels
from attacks.scoring.metrics import METRIC_NAMES
from attacks.scoring.scores import SETS, ImageScore
from attacks.scoring.statistics import CONFIDENCE, Interval, clustered_interval

# A gain below this is no gain: the interval must lie wholly on one side of it for a clear verdict.
NEGLIGIBLE = {'psnr': 1.0, 'region_psnr': 1.0, 'ssim': 0.05, 'region_ssim': 0.05}
# Absence of a leak needs as many images as its presence in the gate.
MIN_IMAGES = gate.GATE_IMAGES
# Over which the intervals are: a client's images share one update and one draw of its noise.
MIN_CLIENTS = 8

# From worst to best for the data subjects.
VERDICTS = ('leaked', 'partly_leaked', 'inconclusive', 'not_beyond_guess')
VERDICT_WORDS = {
  'leaked': 'Images leaked',
  'partly_leaked': 'Partly leaked',
  'inconclusive': 'Inconclusive',
  'not_beyond_guess': 'Not beyond a guess',
}
METRIC_WORDS = {
  'psnr': 'PSNR',
  'region_psnr': 'region PSNR',
  'ssim': 'SSIM',
  'region_ssim': 'region SSIM',
}
CONTROL_WORDS = {
  'prior_only': 'prior only',
  'mean_image': 'mean image',
  'other_update': 'another update',
}


_NOT_CLEARED = (
  'this attack showed nothing beyond what could be guessed without the update. Whether it sees a'
  ' leak where there is one, and what one that knows the defence sees, tff-shadow-audit tells'
)


@dataclasses.dataclass(frozen=True)
class Finding:
  """The verdict on one attack and the sentences that state it.

  It is one of `VERDICTS`, but not the last: one attack clears nothing; an audit may.
  """

  verdict: str
  sentence: str
  numbers: str


def summarise(runs: list[Run], title: str) -> dict[str, Any]:
  """The content of summary.json; every number that the page shows comes from here.

  Returns:
    {'format', 'version', 'title', 'verdict' (the worst of all), 'headline', 'attacks': [...]} with
    one entry as of `_summarise_attack` for every run and attack.
  """
  attacks = [_summarise_attack(run, attack) for run in runs for attack in run.attacks]
  return {
    'format': 'tff-shadow-report',
    'version': 1,
    'title': title,
    'verdict': min((entry['verdict'] for entry in attacks), key=VERDICTS.index),
    'headline': headline(attacks),
    'attacks': attacks,
  }


def headline(attacks: list[dict[str, Any]]) -> str:
  """One sentence over all attacks: the worst verdict and where it was found."""
  worst = min((entry['verdict'] for entry in attacks), key=VERDICTS.index)
  found = [entry for entry in attacks if entry['verdict'] == worst]
  names = ', '.join(dict.fromkeys(entry['dataset'] for entry in found))
  where = f'in {len(found)} of {len(attacks)} attacks ({names})' if len(attacks) > 1 else names
  return {
    'leaked': f'Training images could be rebuilt from what a client sent, {where}.',
    'partly_leaked': f'What a client sent gave away something of its training images, {where}.',
    'inconclusive': f'Whether training images leaked is not settled, {where}.',
  }[worst]


def leaked_images(scores: list[ImageScore]) -> int:
  """Images rebuilt at least 6 dB closer than by either control, over the image or its region."""
  count = 0
  for row in scores:
    gains = [
      value
      for metric in ('psnr', 'region_psnr')
      for value in gate.margins([row], metric, per_image=True)
    ]
    count += any(gain >= gate.GATE_MEAN_DB for gain in gains)
  return count


def judge(
  scores: list[ImageScore],
  identification: Identification,
  negligible: Mapping[str, float] = NEGLIGIBLE,
) -> tuple[str, str]:
  """The verdict on an attack, and the reason in words for the two verdicts in the middle.

  leaked: the mean margin passes the gate's thresholds in dB, over the image or over the region.
  partly_leaked: the interval of a margin (PSNR or SSIM, image or region) lies above
    `negligible`, or at least one image was rebuilt 6 dB closer than by either control, or
    originals are picked out by their reconstructions more often than by chance (p < 0.05).
  not_beyond_guess: all intervals lie at or below `negligible`, at least `MIN_IMAGES` images of at
    least `MIN_CLIENTS` clients, each scored and each with both controls, and enough clients have
    equally many images where originals seem to be picked out. A failed attack shows nothing.
  inconclusive: anything else.

  Intervals are over clients, each with the mean of its images.
  """
  intervals = {metric: gate.margin_interval(scores, metric) for metric in negligible}
  if any(gate.exceeds_gate(intervals[metric]) for metric in ('psnr', 'region_psnr')):
    return 'leaked', ''
  signs = _signs_of_leaking(scores, identification, intervals, negligible)
  if signs:
    return 'partly_leaked', '; '.join(signs)
  reason = _reason_for_doubt(scores, identification, intervals, negligible)
  return ('inconclusive', reason) if reason else ('not_beyond_guess', '')


def _signs_of_leaking(
  scores: list[ImageScore],
  identification: Identification,
  intervals: dict[str, Interval],
  negligible: Mapping[str, float],
) -> list[str]:
  signs = []
  above = [
    METRIC_WORDS[metric]
    for metric, interval in intervals.items()
    if interval.low is not None and interval.low > negligible[metric]
  ]
  if above:
    signs.append(f'the attack came closer than a guess by {", ".join(above)}')
  count = leaked_images(scores)
  if count:
    signs.append(f'{count} of {len(scores)} images were rebuilt 6 dB or more closer than any guess')
  if is_identifying(identification):
    signs.append(
      f'{identification.correct} of {identification.of} reconstructions show which of the '
      f'{identification.choices} originals they come from'
    )
  return signs


def _reason_for_doubt(
  scores: list[ImageScore],
  identification: Identification,
  intervals: dict[str, Interval],
  negligible: Mapping[str, float],
) -> str:
  unscored = sum(row.status != 'ok' for row in scores)
  if unscored:
    return f'the attack gave no usable result on {unscored} of {len(scores)} images'
  if any(control not in row.quality for row in scores for control in results.CONTROLS):
    return 'a control is missing, so there is nothing to compare with'
  if len(scores) < MIN_IMAGES:
    return f'too few images: {len(scores)}, where at least {MIN_IMAGES} are needed'
  clients = len({row.target for row in scores})
  if clients < MIN_CLIENTS:
    return f'too few clients: {clients}, where at least {MIN_CLIENTS} are needed'
  for metric, interval in intervals.items():
    # Without any region there is nothing to know of it.
    if interval.high is None and (interval.n or not metric.startswith('region_')):
      return f'too few clients with a value of {METRIC_WORDS[metric]}: {interval.n}'
  if any(
    interval.high is not None and interval.high > negligible[metric]
    for metric, interval in intervals.items()
  ):
    return 'the 95 % interval allows both a gain over the guess and none'
  if cannot_be_told(identification):
    return (
      f'{identification.correct} of {identification.of} originals are picked out, and too few'
      ' clients have equally many images to tell whether that is chance'
    )
  return ''


def find(
  scores: list[ImageScore],
  identification: Identification,
  config: dict[str, Any],
  *,
  ended_early: int = 0,
) -> Finding:
  """The verdict on an attack in plain words.

  Args:
    scores: Of its images.
    identification: Of them.
    config: The attack's.
    ended_early: Clients on which it diverged after it had found something.
  """
  verdict, reason = judge(scores, identification)
  if verdict == 'not_beyond_guess':
    verdict = 'inconclusive'
    reason = _NOT_CLEARED
    if ended_early:
      clients = len({row.target for row in scores})
      reason = f'the attack ended early on {ended_early} of {clients} clients'
  count, total = leaked_images(scores), len(scores)
  subject = f'{config["dataset"]}, {defense_words(config["defense"])}'
  sentences = {
    'leaked': (
      f'{subject}: the attack rebuilt images clearly better than any guess made without the '
      f'update, {count} of {total} by 6 dB or more. They must be taken as disclosed.'
    ),
    'partly_leaked': (f'{subject}: the update disclosed part of what the images show: {reason}.'),
    'inconclusive': f'{subject}: inconclusive ({reason}). This is no sign of protection.',
  }
  return Finding(verdict, sentences[verdict], _numbers(scores))


def is_identifying(identification: Identification) -> bool:
  """Whether originals are picked out by their reconstructions more often than by chance."""
  return identification.p_value < 1 - CONFIDENCE


def cannot_be_told(identification: Identification) -> bool:
  """Whether more are picked out than by chance, with too few clients that could change places."""
  least = 1 - CONFIDENCE
  return identification.chance_p_value < least <= identification.least_p_value


def defense_words(defense: str) -> str:
  """'no defence' or 'defence NAME'."""
  return 'no defence' if defense.lower() in ('', 'none') else f'defence {defense}'


def _numbers(scores: list[ImageScore]) -> str:
  margin = gate.margin_interval(scores)
  control = gate.better_control(scores)
  attack_mean = _mean_of(scores, results.ATTACK, 'psnr').mean
  if control is None or attack_mean is None:
    return 'There is no reconstruction or no control to compare.'
  text = (
    f'Mean PSNR {attack_mean:.1f} dB for the attack, '
    f'{_mean_of(scores, control, "psnr").mean:.1f} dB for the better guess '
    f'({CONTROL_WORDS[control]}). Difference per image {margin.mean:.1f} dB'
  )
  if margin.low is None:
    return f'{text}; one client gives no confidence interval.'
  images = f'{len(scores)} images'
  if margin.n < len(scores):
    images += f' of {margin.n} clients'
  return f'{text} (95 % interval {margin.low:.1f} to {margin.high:.1f} dB, {images}).'


def _summarise_attack(run: Run, attack: ScoredAttack) -> dict[str, Any]:
  """One entry of summary.json.

  An interval is {'mean', 'ci95_low', 'ci95_high', 'n'}, over clients, each with the mean of its
  images; the ends are null for fewer than 2 of them.

  run, attack: Names of the directories.
  dataset, model, defense, round, observation, batch_norm_sharing, threat_model: As the attack says.
  image_shape: [H, W, C]. targets, images: How many clients, and true images of theirs.
  failed, unmatched: Images without a result; see `ImageScore.status`.
  empty_regions: Images without region metrics.
  leaked_images: As `leaked_images`.
  labels_inferred: {'correct', 'of'}; null where the attack was told the labels.
  label_accuracy: {'matched', 'multiset'} -> {'correct', 'of', 'share'}, of
    `attacks.scoring.label_accuracy`; null where no label was inferred.
  metrics: `SETS` -> metric (a field of `Quality`) -> interval over the clients that have it; the
    attack also has 'rdlv'.
  lpips: {'net', 'weights_sha256'}; null where LPIPS was not measured.
  identified: The fields of `Identification`, by correlation.
  identified_by_lpips: Likewise by LPIPS; null where it was not measured. No verdict rests on it.
  gallery: Of `Measures`.
  better_control: The control with the higher mean PSNR.
  margin: {'psnr', 'region_psnr', 'ssim', 'region_ssim'} -> interval of attack minus better control
    (by the mean of that metric), where an image without a result counts as 0.
  margin_per_image_control: The PSNR margin against whichever control is better on each image.
  gate: {'line', 'passed'}, of `attacks.scoring.gate`.
  verdict, finding, numbers: One of `VERDICTS`, and two sentences.
  seconds: Time the attack took, all targets together.
  training: {'rounds', 'last': {column: {'round', 'value'}}}; null without metrics.csv.
  """
  config, scores = attack.result.config, attack.scores
  early = sum(
    own.record['status'] == 'ok' and bool(own.record.get('reason')) for own in attack.result.targets
  )
  finding = find(scores, attack.identification, config, ended_early=early)
  inferred, lpips = matched_labels(scores), run.measures.lpips
  return {
    'run': run.name,
    'attack': attack.result.name,
    **{key: config[key] for key in ('dataset', 'model', 'defense', 'round', 'observation')},
    'batch_norm_sharing': config.get('batch_norm_sharing'),
    'image_shape': list(attack.result.targets[0].images.shape[1:]),
    'targets': len(attack.result.targets),
    'images': len(scores),
    'failed': sum(row.status == 'failed' for row in scores),
    'unmatched': sum(row.status == 'unmatched' for row in scores),
    'empty_regions': sum(row.region_is_empty for row in scores),
    'leaked_images': leaked_images(scores),
    'labels_inferred': dataclasses.asdict(inferred) if inferred.of else None,
    'label_accuracy': _label_accuracy(inferred, multiset_labels(attack.result)),
    'metrics': {set_name: _means(scores, set_name) for set_name in SETS},
    'lpips': None if lpips is None else {'net': lpips.net, 'weights_sha256': lpips.digest},
    'identified': identification_json(attack.identification),
    'identified_by_lpips': identification_json(attack.identification_by_lpips),
    'gallery': run.measures.gallery,
    'better_control': gate.better_control(scores),
    'margin': {name: interval_json(gate.margin_interval(scores, name)) for name in NEGLIGIBLE},
    'margin_per_image_control': interval_json(gate.margin_interval(scores, per_image=True)),
    'gate': {
      'line': gate.gate_line(config['dataset'], scores),
      'passed': gate.gate_passed(scores),
    },
    'verdict': finding.verdict,
    'finding': finding.sentence,
    'numbers': finding.numbers,
    'threat_model': config['threat_model'],
    'seconds': sum(target.record.get('seconds') or 0 for target in attack.result.targets),
    'training': None if run.training is None else _last_values(run.training),
  }


def _means(scores: list[ImageScore], set_name: str) -> dict[str, Any]:
  means = {name: interval_json(_mean_of(scores, set_name, name)) for name in METRIC_NAMES}
  if set_name == results.ATTACK:
    means['rdlv'] = interval_json(
      clustered_interval([row.rdlv for row in scores], [row.target for row in scores])
    )
  return means


def identification_json(identification: Identification | None) -> dict[str, Any] | None:
  """The fields of `Identification`; None for none."""
  if identification is None:
    return None
  fields = dataclasses.asdict(identification)
  # JSON has no tuples, and the summary is what is read back from its file.
  return {**fields, 'precisions': list(fields['precisions'])}


def _label_accuracy(matched: LabelAccuracy, multiset: LabelAccuracy) -> dict[str, Any] | None:
  if not matched.of and not multiset.of:
    return None
  return {
    name: {**dataclasses.asdict(accuracy), 'share': accuracy.share}
    for name, accuracy in (('matched', matched), ('multiset', multiset))
  }


def _mean_of(scores: list[ImageScore], set_name: str, metric: str) -> Interval:
  return clustered_interval(
    [row.value(set_name, metric) for row in scores], [row.target for row in scores]
  )


def interval_json(interval: Interval) -> dict[str, float | int | None]:
  """An interval as summary.json has it: mean, ci95_low, ci95_high, n."""
  return {
    'mean': interval.mean,
    'ci95_low': interval.low,
    'ci95_high': interval.high,
    'n': interval.n,
  }


def _last_values(training: Training) -> dict[str, Any]:
  """The last round, and the last value of each column with the round it is from."""
  last = {}
  for name, values in training.curves.items():
    position = max(index for index, value in enumerate(values) if value is not None)
    last[name] = {'round': training.rounds[position], 'value': values[position]}
  return {'rounds': training.rounds[-1], 'last': last}
