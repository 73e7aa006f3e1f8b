"""Defences side by side, from the summaries of their audits."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attacks.audit.budget import Budget
from attacks.audit.summary import GUESS, METRICS, STRONGEST, UNDEFENDED, round_ranges
from attacks.report.findings import VERDICTS
from attacks.scoring.results import CLASS_MEAN, read_json
from attacks.scoring.statistics import clustered_interval, paired_differences
from tff_shadow.aggregators.shadow_noise import DEFAULT_FLOOR
from tff_shadow.errors import UserError
from tff_shadow.published import PublishedSettings

COLUMNS = (
  'dataset',
  'defense',
  'strength',
  'rounds',
  'rounds_observed',
  'attack',
  'knows_noise',
  'psnr',
  'ssim',
  'region_psnr',
  'region_ssim',
  'control_region_psnr',
  'class_region_psnr',
  'ci95_low',
  'ci95_high',
  'class_ci95_low',
  'class_ci95_high',
  'region_psnr_change',
  'change_ci95_low',
  'change_ci95_high',
  'over_reference',
  'reference_ci95_low',
  'reference_ci95_high',
  'bound_region_psnr',
  'f1',
  'f1_undefended',
  'epsilon',
  'verdict',
  'recognized',
  'images',
  'seeds',
)
_KNOWING = 'adaptive'


class Audit(NamedTuple):
  """The summary of one audit.

  Attributes:
    path: Where it was read.
    summary: Its content.
    defense: Name of the defence; of shadow noise its shape.
    strength: Its settings that differ between runs; empty for none.
  """

  path: pathlib.Path
  summary: dict[str, Any]
  defense: str
  strength: str

  @property
  def label(self) -> str:
    """See `label_of`."""
    return label_of(self.defense, self.strength)

  @property
  def budget(self) -> Budget:
    """What it was attacked with."""
    given = self.summary['budget']
    names = [field.name for field in dataclasses.fields(Budget) if field.name != 'presets']
    return Budget(tuple(given['presets']), *(int(given[name]) for name in names))

  @property
  def start(self) -> str:
    """What runs that are compared share: data, start model, seed and local training."""
    return json.dumps([self.summary['digests'], self.summary['training']], sort_keys=True)


def label_of(defense: str, strength: str) -> str:
  """'correlated ratio 0.3', by which a defence is told from others."""
  return f'{defense} {strength}'.strip()


def read_audit(path: pathlib.Path) -> Audit:
  """Reads a summary.json that `tff-shadow-audit` wrote.

  Raises:
    UserError: If it is missing, damaged, of another format or version.
  """
  summary = read_json(path)
  if (summary.get('format'), summary.get('version')) != ('tff-shadow-audit', 1):
    raise UserError(f'{path}: not the summary of an audit of version 1')
  try:
    defense, strength = defense_names(summary['defense'])
    audit = Audit(path, summary, defense, strength)
    _ = audit.start, audit.budget, summary['dataset'], summary['epsilon']
    _ = summary['utility']['test']
    for entry in summary['rounds']:
      _check_round(entry)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UserError(f'{path}: damaged ({type(error).__name__}: {error})') from error
  return audit


def compare(
  audits: Sequence[Audit],
  reference: str | None = None,
  utility: Mapping[tuple[str, str], tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
  """A row for each data set, defence, audited rounds and attack, the strongest first.

  Seeds are pooled: the values of all their images, each with its own control. Means and intervals
  are over clients, each with the mean of its images, which share one update. Empty where there is
  nothing to tell; numbers otherwise.

  psnr, ssim, region_psnr, region_ssim: Means; of 'strongest' each image by the attack
    that came closest.
  class_region_psnr: Of the mean public image of each image's class.
  ci95_low, ci95_high: Of region_psnr minus control_region_psnr, paired by image.
  class_ci95_low, class_ci95_high: Of region_psnr minus class_region_psnr, likewise.
  region_psnr_change: Against the same rounds without the defence and under the strongest attack,
    with its interval, of 'strongest' alone.
  over_reference: How many dB less of the region the reference gives away, paired by image, with its
    interval; of 'strongest' alone, over the seeds on which both were audited, the reference to the
    same budget or a larger one.
  bound_region_psnr: Of attackers who know what images look like; mean over the seeds that have it.
  recognized: Share of images that updates pick out of known ones; of 'strongest' alone, where all
    audits tried it.
  f1, f1_undefended: Of `utility` if that is given; else on test after the runs.

  Args:
    audits: Of runs that may differ in everything.
    reference: Label of the defence that the others are compared with.
    utility: F1 with and without a defence, by data set and label, of longer trainings than those of
      runs that stop after the attacked rounds.

  Raises:
    UserError: If no audit has the label `reference`, or two are of the same run and rounds.
  """
  labels = {audit.label for audit in audits}
  if reference is not None and reference not in labels:
    raise UserError(f'--reference={reference}: use one of {", ".join(sorted(labels))}')
  rows = []
  for (dataset, rounds), group in _grouped(audits).items():
    against = [pair for pair in group if pair[0].label == reference]
    for label in dict.fromkeys(audit.label for audit, _ in group):
      own = [pair for pair in group if pair[0].label == label]
      _check_unique(own)
      f1 = _f1(own, audits) if utility is None else utility.get((dataset, label), ('', ''))
      rows += _rows(dataset, rounds, own, against if label != reference else [], f1)
  return rows


def defense_names(defense: Mapping[str, Any]) -> tuple[str, str]:
  """What a defence and its strength are called.

  Args:
    defense: Its public settings, as a summary holds them; of the published defence's only those
      make a strength that are not the paper's.
  """
  if defense['name'] == 'shadow':
    strength = defense['strength']
    parts = [f'{strength["kind"]} {strength["value"]:g}']
    if defense['propagation'] == 'images':
      parts.append('in images')
    floor = defense.get('floor', DEFAULT_FLOOR)
    if defense['shape'] != 'isotropic' and floor != DEFAULT_FLOOR:
      parts.append(f'floor {floor:.10g}')
    if not defense['frozen']:
      parts.append('fresh')
    if defense['saliency']['kind'] != 'given':
      parts.append(defense['saliency']['kind'])
    return defense['shape'], ', '.join(parts)
  if defense['name'] == 'published':
    theirs = dict(_flat(dataclasses.asdict(PublishedSettings())))
    settings = {key: value for key, value in _flat(defense) if value != theirs.get(key, value)}
  else:
    settings = {key: value for key, value in defense.items() if isinstance(value, int | float)}
  return defense['name'], ', '.join(f'{key} {_plain(value)}' for key, value in settings.items())


def _flat(settings: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in settings.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{key} ')
    else:
      yield prefix + key, list(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> str:
  numeric = isinstance(value, int | float) and not isinstance(value, bool)
  return f'{value:g}' if numeric else str(value)


def _check_round(entry: Mapping[str, Any]) -> None:
  """Raises one of several errors for what `compare` cannot read."""
  count = len(entry['per_image']['images'])
  _ = [int(number) for number in entry['rounds']], entry['bounds'], VERDICTS.index(entry['verdict'])
  for name, values in entry['per_image']['values'].items():
    for metric in METRICS:
      if len(values[metric]) != count:
        raise ValueError(f'{name} has {len(values[metric])} values of {metric} for {count} images')


def _grouped(
  audits: Sequence[Audit],
) -> dict[tuple[str, tuple[int, ...]], list[tuple[Audit, dict[str, Any]]]]:
  groups: dict = {}
  for audit in audits:
    for entry in audit.summary['rounds']:
      key = (audit.summary['dataset'], tuple(entry['rounds']))
      groups.setdefault(key, []).append((audit, entry))
  return groups


def _check_unique(pairs) -> None:
  seen: dict = {}
  for audit, _ in pairs:
    if audit.start in seen:
      raise UserError(
        f'{audit.path} and {seen[audit.start]} are audits of the same defence, training and seed'
      )
    seen[audit.start] = audit.path


def _rows(dataset, rounds, own, against, f1) -> Iterator[dict[str, Any]]:
  audit = own[0][0]
  worst = min((entry['verdict'] for _, entry in own), key=VERDICTS.index)
  bounds = [
    bound['region_psnr'] for _, entry in own for bound in entry['bounds'] if bound['holds_here']
  ]
  epsilons = [one.summary['epsilon'] for one, _ in own]
  shared = {
    'dataset': dataset,
    'defense': audit.defense,
    'strength': audit.strength,
    'rounds': '+'.join(round_ranges(rounds, '-')),
    'rounds_observed': len(rounds),
    'bound_region_psnr': float(np.mean(bounds)) if bounds else '',
    'f1': f1[0],
    'f1_undefended': f1[1],
    'epsilon': '' if None in epsilons else max(epsilons),
    'seeds': len(own),
  }
  names = dict.fromkeys(name for _, entry in own for name in _attacks(entry))
  for name in [STRONGEST, *names]:
    found = [entry for _, entry in own if name in entry['per_image']['values']]
    pooled = {metric: _pooled(found, name, metric) for metric in METRICS}
    control, owners = _pooled(found, GUESS, 'region_psnr'), _owners(found)
    class_mean = _pooled(found, CLASS_MEAN, 'region_psnr')
    row = dict.fromkeys(COLUMNS, '') | shared
    row |= {metric: _mean(values, owners) for metric, values in pooled.items()}
    row |= {
      'attack': name,
      'knows_noise': 'yes' if name.startswith(_KNOWING) else 'no',
      'control_region_psnr': _mean(control, owners),
      'class_region_psnr': _mean(class_mean, owners),
      'images': len(pooled['psnr']),
    }
    for prefix, guess in (('ci95', control), ('class_ci95', class_mean)):
      beyond = paired_differences(pooled['region_psnr'], guess)
      row |= _interval(beyond, owners, f'{prefix}_low', f'{prefix}_high')
    if name == STRONGEST:
      row['knows_noise'], row['verdict'] = '', worst
      row['recognized'] = _recognized(found)
      clean = _pooled(found, UNDEFENDED, 'region_psnr')
      change = paired_differences(pooled['region_psnr'], clean)
      row |= _interval(change, owners, 'change_ci95_low', 'change_ci95_high', 'region_psnr_change')
      less = _over_reference(own, against)
      row |= _interval(*less, 'reference_ci95_low', 'reference_ci95_high', 'over_reference')
    yield row


def _recognized(entries) -> float | str:
  known = [entry.get('recognized') for entry in entries]
  if not known or None in known:
    return ''
  return sum(own['correct'] for own in known) / sum(own['of'] for own in known)


def _attacks(entry: Mapping[str, Any]) -> list[str]:
  others = (STRONGEST, UNDEFENDED, GUESS, CLASS_MEAN)
  return [name for name in entry['per_image']['values'] if name not in others]


def _pooled(entries, name: str, metric: str) -> list[float | None]:
  """Of all images of all seeds; None where there is no value."""
  values: list[float | None] = []
  for entry in entries:
    missing = [None] * len(entry['per_image']['images'])
    values += entry['per_image']['values'].get(name, {}).get(metric, missing)
  return values


def _owners(entries) -> list[tuple[int, str]]:
  """Seed and client of all images of all seeds: one update, and one draw of its noise."""
  return [
    (seed, image.rpartition('/')[0])
    for seed, entry in enumerate(entries)
    for image in entry['per_image']['images']
  ]


def _mean(values: Sequence[float | None], owners: Sequence[Any]) -> float | str:
  return _interval(values, owners, 'low', 'high', 'mean')['mean']


def _interval(
  values: Sequence[float | None],
  owners: Sequence[Any],
  low: str,
  high: str,
  mean: str | None = None,
) -> dict[str, float | str]:
  interval = clustered_interval(values, owners)
  row = {low: interval.low, high: interval.high} | ({mean: interval.mean} if mean else {})
  return {name: '' if value is None else value for name, value in row.items()}


def _over_reference(own, against) -> tuple[list[float | None], list[tuple[int, str]]]:
  """The differences, and the owner of each."""
  differences: list[float | None] = []
  owners: list[tuple[int, str]] = []
  for seed, (audit, entry) in enumerate(own):
    for other, theirs in against:
      # One that was attacked less might look better for that alone.
      if other.start == audit.start and other.budget.includes(audit.budget):
        values = [
          dict(
            zip(one['per_image']['images'], _pooled([one], STRONGEST, 'region_psnr'), strict=True)
          )
          for one in (entry, theirs)
        ]
        common = [name for name in values[0] if name in values[1]]
        differences += paired_differences(*([side[name] for name in common] for side in values))
        owners += [(seed, name.rpartition('/')[0]) for name in common]
  return differences, owners


def _f1(own, audits: Sequence[Audit]) -> tuple[float | str, float | str]:
  """Means over the seeds that have both, or of the runs alone."""
  found, clean = [], []
  for audit, _ in own:
    utility = audit.summary['utility']
    other = utility['undefended'] or _undefended_test(audit, audits)
    if utility['test']:
      found.append(utility['test']['f1'])
      clean.append(other['f1'] if other else None)
  if None in clean:
    clean = []
  return _mean(found, range(len(found))), _mean(clean, range(len(clean)))


def _undefended_test(audit: Audit, audits: Sequence[Audit]) -> Mapping[str, float] | None:
  """Of an undefended run from the same start."""
  for other in audits:
    if other.defense == 'none' and other.start == audit.start:
      return other.summary['utility']['test']
  return None
