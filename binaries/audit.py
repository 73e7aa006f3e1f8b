"""What could the server have seen of our patients? Attacks a run and writes a verdict.

tff-shadow-audit --run_dir=runs/mine

Attacks what the server saw in the observed rounds with all attacks of the budget, one that knows
the defence among them; the same rounds without the defence; and, to show that the attacks work at
all, undefended single images at the same weights. Writes RUN/audits/NAME/report.html, which shows
no image unless --annex is given, and summary.json. A stopped audit goes on with --resume.
"""

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from absl import flags

from attacks.adaptive.players import AttackersShadow
from attacks.audit.budget import BUDGETS, Budget
from attacks.audit.cache import AuditCache, undefended_key
from attacks.audit.page import Annex, render
from attacks.audit.replay import is_single_image_round, single_images, without_defense
from attacks.audit.strongest import Scored, score_attacked
from attacks.audit.suite import Attacked, Suite
from attacks.audit.summary import (
  RoundEvidence,
  round_words,
  summarise,
  summarise_round,
  with_problems,
)
from attacks.report import findings, page
from attacks.scoring.identification import Identification
from attacks.threads import share_cores
from attacks.threat_model import random_training
from binaries import command, run_directory
from binaries.audited_bounds import bounds_of
from binaries.audited_run import AuditedRun, Seen
from binaries.progress import watch
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.models import load_generator
from tff_shadow.observations import Observation, Truth, round_directory_name
from tff_shadow.privacy import guarantee_of
from tff_shadow.shadow.augmentation import AUGMENTATIONS

_RUN_DIR = flags.DEFINE_string(
  'run_dir', None, 'Run directory of tff-shadow-train, or of rounds that record_round wrote.'
)
_ROUNDS = flags.DEFINE_list('rounds', None, 'Observed rounds to audit; all by default.')
_SEPARATE_ROUNDS = flags.DEFINE_list(
  'separate_rounds',
  None,
  'Those of --rounds that are attacked one by one, besides all of them jointly; all by default,'
  ' empty for none.',
)
_NAME = flags.DEFINE_string('name', 'audit', 'The output goes to RUN/audits/NAME.')
_BUDGET = flags.DEFINE_enum('budget', 'default', list(BUDGETS), 'How much is attacked.')
_ITERATIONS = flags.DEFINE_integer(
  'iterations',
  None,
  'Optimiser steps of each attack; by default as the budget says.',
  lower_bound=1,
)
_CALIBRATION_CLIENTS = flags.DEFINE_integer(
  'calibration_clients',
  None,
  'Clients of public images on which the attacker who knows the defence tries it, 0 for no such'
  ' attacker; by default as the budget says.',
  lower_bound=0,
)
_DENOISER_STEPS = flags.DEFINE_integer(
  'denoiser_steps',
  None,
  "Of the training of that attacker's denoiser; by default as the budget says.",
  lower_bound=0,
)
_INVERSION_CLIENTS = flags.DEFINE_integer(
  'inversion_clients',
  None,
  'Clients that it simulates to learn the way back from updates; by default as the budget says.',
  lower_bound=0,
)
_MAX_CLIENTS = flags.DEFINE_integer(
  'max_clients',
  16,
  'At most so many clients of a round, those with the fewest images first.',
  lower_bound=1,
)
_UNDEFENDED_RUN_DIR = flags.DEFINE_string(
  'undefended_run_dir',
  None,
  'A run of the same data, model and seed without defence: what the model is worth there.',
)
_AUGMENT = flags.DEFINE_list(
  'augment',
  ['shifts', 'brightness'],
  'What leaves an image of this kind one, for what the attacker learns from public images: '
  f'{", ".join(AUGMENTATIONS)}.',
)
_TOLERATED_DB = flags.DEFINE_float(
  'tolerated_db', findings.NEGLIGIBLE['psnr'], 'A gain of PSNR over the guess that is none.'
)
_TOLERATED_SSIM = flags.DEFINE_float(
  'tolerated_ssim', findings.NEGLIGIBLE['ssim'], 'A gain of SSIM over the guess that is none.'
)
_BOUND_CLIENTS = flags.DEFINE_integer(
  'bound_clients',
  1,
  'Clients over which bounds are averaged, where they can be computed: about a minute each for'
  ' colour images of 32 px; 0 for no bounds.',
  lower_bound=0,
)
_GENERATOR = flags.DEFINE_string(
  'generator',
  None,
  'A .keras file, latent -> image in [0, 1]: the shadow with which the attacker plays the published'
  " defence; the clients' own is the worst case. Without one that defence cannot be cleared.",
)
_DELTA = flags.DEFINE_float('delta', 1e-5, 'Delta of the formal guarantee, where there is one.')
_ANNEX = flags.DEFINE_bool('annex', False, 'Show reconstructions, and the images, in the page.')
_LANES = flags.DEFINE_integer(
  'lanes', 16, 'Targets and restarts attacked side by side.', lower_bound=1
)
_SEED = flags.DEFINE_integer('seed', 0, 'Decides the attacks.')
_CACHE_DIR = flags.DEFINE_string(
  'cache_dir',
  None,
  'Directory that audits of runs from the same start share: attacks on the round without the'
  ' defence and the denoiser are kept there, and made once.',
)
_RESUME = flags.DEFINE_bool('resume', False, 'Go on with an interrupted audit.')

_NO_ADAPTIVE = 'No attacker who knows the defence was tried (--budget).'
_MAY_CHANGE = frozenset({'resume', 'run_dir', 'annex', 'undefended_run_dir', 'lanes', 'cache_dir'})


def main() -> None:
  """Audits the run that the flags name."""
  if not _RUN_DIR.value:
    raise UserError('--run_dir is required: the run directory of a training')
  run_dir = pathlib.Path(_RUN_DIR.value)
  output = _output(run_dir)
  tolerated = _tolerated()
  audited = AuditedRun(run_dir, _ROUNDS.value, _MAX_CLIENTS.value)
  separate = audited.separate(_SEPARATE_ROUNDS.value)
  utility = audited.utility(_UNDEFENDED_RUN_DIR.value)
  data = audited.data()
  digests = {name: audited.config[name] for name in ('data_sha256', 'model_sha256')}
  budget = _budget()
  shadow = None
  if _GENERATOR.value:
    shadow = AttackersShadow.fitted(
      load_generator(_GENERATOR.value, data.image_shape),
      data.public.float_images(),
      audited.config['flags']['rounds'],
    )
  run_directory.claim(
    output,
    {
      'program': 'audit',
      'flags': command.flag_values(sys.modules[__name__]),
      **digests,
      **audited.digests(),
    },
    resume=_RESUME.value,
    may_change=_MAY_CHANGE,
  )
  logging.getLogger('tensorflow').setLevel(logging.ERROR)  # Several solvers are traced.
  share_cores(_LANES.value)
  cache_directory = pathlib.Path(_CACHE_DIR.value) if _CACHE_DIR.value else None
  suite = Suite(
    budget,
    output,
    shadow=shadow,
    cache_directory=cache_directory,
    public=data.public,
    augmentations=_AUGMENT.value,
    seed=_SEED.value,
    lanes=_LANES.value,
    watch=watch,
  )
  settings = {
    **dataclasses.asdict(budget),
    'seed': _SEED.value,
    'augment': _AUGMENT.value,
    'data_sha256': digests['data_sha256'],
  }
  audit = _Audit(suite, budget, output, settings, AuditCache(cache_directory), data.public)
  evidence = [audit.one_round(own) for own in separate]
  if len(audited.seen) > 1 and audited.recurring:
    control = evidence[0].control if evidence else audit.control(audited.seen[0], [])
    clean = [attacks for own in evidence for attacks in own.clean]
    evidence.append(audit.jointly(audited.seen, audited.recurring, control, clean))
  evidence = with_problems(evidence, audited.apart(separate))
  rounds = [summarise_round(own, tolerated) for own in evidence]
  guarantee = guarantee_of(audited.defense, audited.participation(data), _DELTA.value)
  summary = summarise(
    rounds,
    title=f'Privacy audit of {data.name}',
    defended=audited.defense['name'] != 'none',
    adaptive=bool(budget.calibration_clients),
    scope=audited.scope(),
    dataset=audited.seen[0].observation.dataset,
    digests=digests,
    defense=dict(audited.defense),
    training=audited.training,
    seed=_SEED.value,
    budget={
      'name': _BUDGET.value if budget == BUDGETS[_BUDGET.value] else f'{_BUDGET.value}, changed',
      **dataclasses.asdict(budget),
      'presets': list(budget.presets),
    },
    tolerated=tolerated,
    guarantee=str(guarantee),
    epsilon=guarantee.epsilon,
    utility=utility,
    command=command.command_line(),
    versions=command.versions(),
  )
  annex = [Annex(own.rounds, own.attacks) for own in evidence] if _ANNEX.value else []
  page.write_pages(output, render(summary, annex), summary)
  print(summary['headline'])
  for entry in rounds:
    print(f'{round_words(entry["rounds"])}: {findings.VERDICT_WORDS[entry["verdict"]]}')
    for reason in entry['reasons']:
      print(f'  {reason}')
  print(f'wrote {output / page.PAGE_NAME} and {output / page.SUMMARY_NAME}')


class _Audit:
  """Attacks rounds and gathers the evidence."""

  def __init__(
    self,
    suite: Suite,
    budget: Budget,
    output: pathlib.Path,
    settings: Mapping[str, Any],
    cache: AuditCache,
    public: Examples,
  ):
    self._suite = suite
    self._budget = budget
    self._output = output
    self._settings = settings
    self._cache = cache
    self._public = public
    images = public.float_images()
    self._distractors = list(images)
    self._class_means = {
      int(label): images[public.labels == label].mean(axis=0) for label in np.unique(public.labels)
    }

  def one_round(self, seen: Seen) -> RoundEvidence:
    observation, truth, clients = seen
    place = round_directory_name(observation.round_num)
    observed = f'{place}/observed'
    made, failed, problems = self._observed(observed, [observation], truth, clients)
    recognized = self._recognized(observed, [observation], truth, clients, problems)
    defended = observation.defense['name'] != 'none'
    undefended = self._undefended(seen, f'{place}/undefended') if defended else []
    return RoundEvidence(
      (observation.round_num,),
      made,
      failed,
      undefended,
      self.control(seen, undefended if defended else made),
      problems,
      bounds_of(
        observation,
        truth,
        clients[: _BOUND_CLIENTS.value],
        self._public,
        self._suite.watch,
      ),
      [undefended if defended else made],
      recognized,
    )

  def _observed(
    self,
    place: str,
    observations: Sequence[Observation],
    truth: Mapping[str, Truth],
    clients: Sequence[str],
  ) -> tuple[list[Scored], list[Attacked], list[str]]:
    """All attacks on what the server saw: those made, those not made, and what else is missing."""
    attacked = self._suite.unaware(place, observations, clients)
    problems = []
    if unlike := random_training(observations[0]):
      problems.append(f'{unlike[0].upper()}{unlike[1:]}.')
    if observations[0].defense['name'] != 'none':
      adaptive = self._suite.adaptive(place, observations, truth, clients)
      attacked += adaptive
      if not adaptive:
        problems.append(_NO_ADAPTIVE)
      elif less := self._budget.less_than(BUDGETS['default']):
        problems.append(
          f'The attacker who knows the defence was given less than by default: {", ".join(less)}.'
        )
    return (*self._scored(attacked, truth), problems)

  def _recognized(
    self,
    place: str,
    observations: Sequence[Observation],
    truth: Mapping[str, Truth],
    clients: Sequence[str],
    problems: list[str],
  ) -> Identification | None:
    """See `Suite.recognized`; why it could not be tried is added to `problems`."""
    try:
      return self._suite.recognized(place, observations, truth, clients)
    except (UserError, tf.errors.OpError) as error:
      problems.append(f'Whether known images can be recognised could not be tried: {error}.')
      return None

  def _undefended(self, seen: Seen, place: str) -> list[Scored]:
    observation, truth, clients = seen
    clean = without_defense(observation, truth, clients)
    key = undefended_key(clean, truth, clients, self._settings)
    self._cache.fetch(key, self._output / place)
    attacked = self._suite.unaware(place, [clean], clients)
    attacked += self._suite.adaptive(place, [clean], truth, clients)
    made, failed = self._scored(attacked, truth)
    if not failed:
      self._cache.store(key, self._output / place)
    return made

  def jointly(
    self,
    seen: list[Seen],
    clients: Sequence[str],
    control: Scored,
    clean: Sequence[Sequence[Scored]],
  ) -> RoundEvidence:
    """The rounds together, for clients that trained on the same images in each.

    Args:
      seen: All rounds.
      clients: Ids.
      control: The positive control.
      clean: Of those of the rounds that were attacked by themselves; see `RoundEvidence`.
    """
    observations = [own.observation for own in seen]
    truth = seen[0].truth
    made, failed, problems = self._observed('jointly', observations, truth, clients)
    recognized = self._recognized('jointly', observations, truth, clients, problems)
    numbers = tuple(own.round_num for own in observations)
    return RoundEvidence(
      numbers, made, failed, (), control, problems, clean=clean, recognized=recognized
    )

  def control(self, seen: Seen, clean: list[Scored]) -> Scored:
    """The positive control, which is a part of `clean`, the undefended round, if that is one."""
    observation, truth, clients = seen
    if is_single_image_round(observation, clients) and clean:
      return clean[0]
    single, shown = single_images(observation, truth, clients)
    place = f'{round_directory_name(observation.round_num)}/control'
    (attacked, *_) = self._suite.unaware(place, [single], clients)
    return score_attacked(attacked, shown, self._distractors)

  def _scored(
    self, attacked: list[Attacked], truth: Mapping[str, Truth]
  ) -> tuple[list[Scored], list[Attacked]]:
    made = [
      score_attacked(own, truth, self._distractors, self._class_means)
      for own in attacked
      if not own.problem
    ]
    return made, [own for own in attacked if own.problem]


def _output(run_dir: pathlib.Path) -> pathlib.Path:
  if not run_dir.is_dir():
    raise UserError(f'--run_dir={run_dir}: no such directory')
  command.check_directory_name('name', _NAME.value)
  output = run_dir / 'audits' / _NAME.value
  if output.exists() and not _RESUME.value:
    raise UserError(f'--name={_NAME.value}: {output} exists; use --resume or another name')
  return output


def _tolerated() -> dict[str, float]:
  tolerated = {}
  for flag, metrics in (
    (_TOLERATED_DB, ('psnr', 'region_psnr')),
    (_TOLERATED_SSIM, ('ssim', 'region_ssim')),
  ):
    if not 0 <= flag.value < float('inf'):
      raise UserError(f'--{flag.name}={flag.value}: must be a number from 0')
    tolerated |= dict.fromkeys(metrics, flag.value)
  if not 0 < _DELTA.value < 1:
    raise UserError(f'--delta={_DELTA.value}: must be between 0 and 1')
  command.check_choices('augment', _AUGMENT.value, AUGMENTATIONS)
  return tolerated


def _budget() -> Budget:
  given = {
    flag.name: flag.value
    for flag in (_ITERATIONS, _CALIBRATION_CLIENTS, _DENOISER_STEPS, _INVERSION_CLIENTS)
    if flag.value is not None
  }
  return dataclasses.replace(BUDGETS[_BUDGET.value], **given)


def run() -> None:
  """The entry point of tff-shadow-audit."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
