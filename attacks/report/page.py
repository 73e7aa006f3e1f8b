"""Builds report.html and summary.json from runs."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from attacks.report import findings, pictures
from attacks.report.reading import Run, ScoredAttack
from attacks.scoring import gate, results
from attacks.scoring.metrics import MIN_PRIOR_SSIM, PSNR_CAP_DB, Quality
from attacks.scoring.scores import ImageScore
from tff_shadow.errors import UserError

PAGE_NAME = 'report.html'
SUMMARY_NAME = 'summary.json'


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of pictures: the texts under them are in the template."""

  rank: str
  score: ImageScore
  original: str
  reconstruction: str | None
  controls: dict[str, str | None]
  error: str | None
  region: str
  height: int
  width: int


def check_free(output_dir: pathlib.Path, overwrite: bool) -> None:
  """Raises `UserError` if a report is in `output_dir` and may not be replaced."""
  for name in (PAGE_NAME, SUMMARY_NAME):
    if (output_dir / name).exists() and not overwrite:
      raise UserError(f'{output_dir / name} exists; pass --overwrite to replace it')


def write_report(
  runs: list[Run], output_dir: pathlib.Path, title: str, max_images: int
) -> dict[str, Any]:
  """Writes report.html and summary.json into `output_dir`, each atomically; returns the summary.

  Raises:
    UserError: If they cannot be written.
  """
  summary = findings.summarise(runs, title)
  write_pages(output_dir, render(runs, summary, max_images), summary)
  return summary


def write_pages(output_dir: pathlib.Path, html: str, summary: dict[str, Any]) -> None:
  """Writes a page and its summary into `output_dir`; see `write_whole`."""
  text = json.dumps(summary, indent=2, allow_nan=False) + '\n'
  write_whole(output_dir, {SUMMARY_NAME: text, PAGE_NAME: html})


def write_whole(output_dir: pathlib.Path, files: Mapping[str, str]) -> None:
  """Writes `files`, from name to text, into `output_dir`, each atomically.

  Raises:
    UserError: If they cannot be written.
  """
  try:
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      temporary = output_dir / f'{name}.tmp'
      temporary.write_text(content, encoding='utf-8')
      os.replace(temporary, output_dir / name)
  except OSError as error:
    raise UserError(f'--output_dir={output_dir}: cannot be written ({error.strerror})') from None


def environment() -> jinja2.Environment:
  """Finds the templates, and knows the filters that they use."""
  found = jinja2.Environment(
    loader=jinja2.PackageLoader('attacks.report'),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  found.filters.update(
    mean=_mean, interval=_interval, pretty=_pretty, quality=quality_words, region=region_words
  )
  return found


def render(runs: list[Run], summary: dict[str, Any], max_images: int) -> str:
  """The page as one self-contained HTML text with at most `max_images` cases for each attack."""
  entries = iter(summary['attacks'])
  sections = [
    {
      'name': run.name,
      'config': run.config,
      'training': _training(run),
      'attacks': [
        {
          'summary': next(entries),
          'config': attack.result.config,
          'cases': make_cases(attack, max_images),
          'has_region': any(not (target.regions > 0.5).all() for target in attack.result.targets),
        }
        for attack in run.attacks
      ],
    }
    for run in runs
  ]
  return (
    environment()
    .get_template('report.html.j2')
    .render(
      summary=summary,
      sections=sections,
      verdict_words=findings.VERDICT_WORDS,
      defense_words=findings.defense_words,
      control_words=findings.CONTROL_WORDS,
      share=share_words,
      error_scale=pictures.error_scale_uri(),
      error_range=pictures.ERROR_RANGE,
      error_colormap=pictures.ERROR_COLORMAP,
      psnr_cap=PSNR_CAP_DB,
      min_prior_ssim=MIN_PRIOR_SSIM,
      clear_gain=gate.GATE_MEAN_DB,
      clear_low=gate.GATE_LOW_DB,
      negligible=findings.NEGLIGIBLE,
      min_images=findings.MIN_IMAGES,
      min_clients=findings.MIN_CLIENTS,
    )
  )


def choose_ranks(total: int, count: int) -> list[int]:
  """Ranks from 0, the best, to `total` - 1 in even steps, the median always among them.

  With fewer than three the page cannot show best, median and worst: two are the best and the
  worst, one is the median.
  """
  median = (total - 1) // 2
  if min(total, count) <= 0:
    return []
  if count == 1:
    return [median]
  ranks = [int(rank) for rank in np.linspace(0, total - 1, min(total, count)).round()]
  if len(ranks) > 2 and median not in ranks:
    nearest = min(range(1, len(ranks) - 1), key=lambda index: abs(ranks[index] - median))
    ranks[nearest] = median
  return ranks


def make_cases(attack: ScoredAttack, count: int) -> list[Case]:
  """At most `count` cases by rank of the attack's PSNR; the last ones have no reconstruction.

  Images without a reconstruction are never crowded out: if there are any and not all images are
  shown, at least one is.
  """
  rebuilt = [row for row in attack.scores if results.ATTACK in row.quality]
  rebuilt.sort(key=lambda row: -row.quality[results.ATTACK].psnr)
  missing = [row for row in attack.scores if results.ATTACK not in row.quality]
  shown_missing = min(len(missing), max(count - len(rebuilt), 1))
  ranks = choose_ranks(len(rebuilt), count - shown_missing)
  chosen = [(_rank_words(rank, len(rebuilt)), rebuilt[rank]) for rank in ranks]
  chosen += [('No result', row) for row in missing[:shown_missing]]
  targets = {target.name: target for target in attack.result.targets}
  return [_case(words, row, targets[row.target]) for words, row in chosen]


def _rank_words(rank: int, total: int) -> str:
  if total == 1:
    return 'The only reconstruction'
  if rank == 0:
    return f'Best of {total}'
  if rank == total - 1:
    return f'Worst of {total}'
  return f'Median of {total}' if rank == (total - 1) // 2 else f'Rank {rank + 1} of {total}'


def _case(rank: str, score: ImageScore, target: results.Target) -> Case:
  truth, region = target.images[score.image], target.regions[score.image]
  shown = {
    set_name: target.reconstructions[set_name][index] for set_name, index in score.matches.items()
  }
  uris = {set_name: pictures.image_uri(image) for set_name, image in shown.items()}
  attack = shown.get(results.ATTACK)
  return Case(
    rank=rank,
    score=score,
    original=pictures.image_uri(truth),
    reconstruction=uris.get(results.ATTACK),
    controls={control: uris.get(control) for control in results.GUESSES},
    error=None if attack is None else pictures.error_uri(attack, truth),
    region=pictures.region_path(region),
    height=truth.shape[0],
    width=truth.shape[1],
  )


def _training(run: Run) -> dict[str, Any] | None:
  if run.training is None:
    return None
  return pictures.light_and_dark(pictures.training_uri, run.training)


def _mean(interval: dict[str, Any], digits: int) -> str:
  return 'none' if interval['mean'] is None else _number(interval['mean'], digits)


def _interval(interval: dict[str, Any], digits: int) -> str:
  if interval['ci95_low'] is None:
    return ''
  return f'{_number(interval["ci95_low"], digits)} to {_number(interval["ci95_high"], digits)}'


def _number(value: float, digits: int) -> str:
  # Adding 0.0 turns a rounded -0.0 into 0.0; the minus sign is as wide as a digit.
  return f'{round(value, digits) + 0.0:.{digits}f}'.replace('-', '\N{MINUS SIGN}')


def _pretty(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False)


def quality_words(quality: Quality | None) -> str:
  """'PSNR 26.3 dB, SSIM 0.91, LPIPS 0.12', or a dash where there is nothing to measure."""
  if quality is None:
    return '–'
  lpips = '' if quality.lpips is None else f', LPIPS {quality.lpips:.2f}'
  return f'PSNR {quality.psnr:.1f} dB, SSIM {quality.ssim:.2f}{lpips}'


def region_words(quality: Quality | None) -> str:
  """'region 25.1 dB, 0.88, 0.15', or nothing where there is no region to measure."""
  if quality is None or quality.region_psnr is None:
    return ''
  lpips = '' if quality.region_lpips is None else f', {quality.region_lpips:.2f}'
  return f'region {quality.region_psnr:.1f} dB, {quality.region_ssim:.2f}{lpips}'


def share_words(correct: int, of: int) -> str:
  """'14 of 16 (88 %)', or a dash where there is nothing to count."""
  return f'{correct} of {of} ({correct / of:.0%})'.replace('%', ' %') if of else '–'
