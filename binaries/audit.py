"""What could the server have seen of our patients? Attacks a run and writes a verdict.

tff-shadow-audit --run_dir=runs/mine

Attacks what the server saw in the observed rounds with all attacks of the budget, one that knows
the defence among them; the same rounds without the defence; and, to show that the attacks work at
all, undefended single images at the same weights. Writes RUN/audits/NAME/report.html, which shows
no image unless --annex is given, and summary.json. A stopped audit goes on with --resume.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.audit.budget import BUDGETS, Budget
from attacks.audit.page import Annex, render
from attacks.audit.replay import is_single_image_round, single_images, without_defense
from attacks.audit.strongest import Scored, score_attacked
from attacks.audit.suite import Attacked, Suite
from attacks.audit.summary import RoundEvidence, round_words, summarise, summarise_round
from attacks.report import findings, page
from attacks.scoring.results import read_json
from attacks.threads import share_cores
from binaries import command, run_directory
from binaries.linearised_release import LinearisedRelease
from binaries.progress import Progress
from binaries.recorded_data import load_recorded
from tff_shadow.data import FederatedData
from tff_shadow.errors import UserError
from tff_shadow.models import batch_norm_layers, model_from_config
from tff_shadow.observations import (
  Observation,
  Truth,
  read_observation,
  read_truth,
  round_directory_name,
)
from tff_shadow.privacy import Participation, guarantee_of, region_psnr
from tff_shadow.shadow.augmentation import AUGMENTATIONS

_RUN_DIR = flags.DEFINE_string('run_dir', None, 'Run directory of tff-shadow-train.')
_ROUNDS = flags.DEFINE_list('rounds', None, 'Observed rounds to audit; all by default.')
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
  "What leaves an image of this kind one, for the attacker's denoiser: "
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
_DELTA = flags.DEFINE_float('delta', 1e-5, 'Delta of the formal guarantee, where there is one.')
_ANNEX = flags.DEFINE_bool('annex', False, 'Show reconstructions, and the images, in the page.')
_LANES = flags.DEFINE_integer(
  'lanes', 16, 'Targets and restarts attacked side by side.', lower_bound=1
)
_SEED = flags.DEFINE_integer('seed', 0, 'Decides the attacks.')
_RESUME = flags.DEFINE_bool('resume', False, 'Go on with an interrupted audit.')

# About 2 GB of derivatives.
_MAX_JACOBIAN_ENTRIES = 5e8

_NO_ADAPTIVE = 'No attacker who knows the defence was tried (--budget).'
# What decides how useful a model becomes, besides the defence.
_TRAINING_FLAGS = (
  'seed',
  'rounds',
  'clients_per_round',
  'batch_size',
  'client_batch_sizes',
  'local_epochs',
  'max_local_steps',
  'client_learning_rate',
  'client_learning_rate_drops',
  'client_learning_rate_drop_factor',
  'client_momentum',
  'server_learning_rate',
  'server_momentum',
  'batch_norm_sharing',
)
_MAY_CHANGE = frozenset({'resume', 'run_dir', 'annex', 'undefended_run_dir', 'lanes'})


def main() -> None:
  """Audits the run that the flags name."""
  if not _RUN_DIR.value:
    raise UserError('--run_dir is required: the run directory of a training')
  run_dir = pathlib.Path(_RUN_DIR.value)
  output = _output(run_dir)
  tolerated = _tolerated()
  config = run_directory.read_config(run_dir)
  if config.get('program') != 'train':
    raise UserError(f'--run_dir={run_dir}: is not a run of tff-shadow-train')
  seen = [_Seen.read(run_dir, number) for number in _rounds(run_dir)]
  utility = _utility(run_dir, config)
  data = _data(config)
  budget = _budget()
  run_directory.claim(
    output,
    {
      'program': 'audit',
      'flags': command.flag_values(sys.modules[__name__]),
      'data_sha256': config['data_sha256'],
      'model_sha256': config['model_sha256'],
    },
    resume=_RESUME.value,
    may_change=_MAY_CHANGE,
  )
  logging.getLogger('tensorflow').setLevel(logging.ERROR)  # Several solvers are traced.
  share_cores(_LANES.value)
  suite = Suite(
    budget,
    output,
    public=data.validation,
    augmentations=_AUGMENT.value,
    seed=_SEED.value,
    lanes=_LANES.value,
    watch=_watch,
  )
  audit = _Audit(suite, budget, data.validation.float_images())
  evidence = [audit.one_round(own) for own in seen]
  if len(seen) > 1:
    evidence += audit.jointly(seen, evidence[0].control)
  rounds = [summarise_round(own, tolerated) for own in evidence]
  defense = seen[0].observation.defense
  guarantee = guarantee_of(defense, _participation(config, data, seen), _DELTA.value)
  summary = summarise(
    rounds,
    title=f'Privacy audit of {data.name}',
    defended=defense['name'] != 'none',
    adaptive=bool(budget.calibration_clients),
    scope=_scope(config, seen, defense),
    dataset=seen[0].observation.dataset,
    digests={name: config[name] for name in ('data_sha256', 'model_sha256')},
    defense=dict(defense),
    training=_training(config),
    seed=_SEED.value,
    budget={'name': _BUDGET.value, **dataclasses.asdict(budget), 'presets': list(budget.presets)},
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


class _Seen(NamedTuple):
  """One observed round, the clients to attack, and the truth about them."""

  observation: Observation
  truth: dict[str, Truth]
  clients: tuple[str, ...]

  @classmethod
  def read(cls, run_dir: pathlib.Path, number: int) -> '_Seen':
    name = round_directory_name(number)
    observation = read_observation(run_dir / 'observations' / name)
    truth = read_truth(run_dir / 'truth' / f'{name}.safetensors')
    # The smallest clients are the worst off.
    known = sorted(
      (client for client in observation.clients if client.client_id in truth),
      key=lambda client: (client.num_images, client.client_id),
    )
    if not known:
      raise UserError(f'{run_dir}: the truth of round {number} has no client of its observation')
    return cls(observation, truth, tuple(own.client_id for own in known[: _MAX_CLIENTS.value]))


class _Audit:
  """Attacks rounds and gathers the evidence."""

  def __init__(self, suite: Suite, budget: Budget, public_images: np.ndarray):
    self._suite = suite
    self._budget = budget
    self._public_images = public_images
    self._distractors = list(public_images)

  def one_round(self, seen: _Seen) -> RoundEvidence:
    observation, truth, clients = seen
    place = round_directory_name(observation.round_num)
    defended = observation.defense['name'] != 'none'
    attacked = self._suite.unaware(f'{place}/observed', [observation], clients)
    problems = []
    if defended:
      adaptive = self._suite.adaptive(f'{place}/observed', [observation], truth, clients)
      attacked += adaptive
      if not adaptive:
        problems.append(_NO_ADAPTIVE)
    made, failed = self._scored(attacked, truth)
    undefended: list[Scored] = []
    if defended:
      clean = without_defense(observation, truth, clients)
      attacked = self._suite.unaware(f'{place}/undefended', [clean], clients)
      attacked += self._suite.adaptive(f'{place}/undefended', [clean], truth, clients)
      undefended, _ = self._scored(attacked, truth)
    return RoundEvidence(
      (observation.round_num,),
      made,
      failed,
      undefended,
      self._control(place, seen, undefended if defended else made),
      problems,
      self._bounds(seen),
    )

  def jointly(self, seen: list[_Seen], control: Scored) -> list[RoundEvidence]:
    """The rounds together, for the clients that trained on the same images in each."""
    first = seen[0]
    clients = [name for name in first.clients if _same_images(name, seen)]
    if not clients:
      return []
    observations = [own.observation for own in seen]
    attacked = self._suite.unaware('jointly', observations, clients)
    problems = []
    if first.observation.defense['name'] != 'none':
      adaptive = self._suite.adaptive('jointly', observations, first.truth, clients)
      attacked += adaptive
      if not adaptive:
        problems.append(_NO_ADAPTIVE)
    made, failed = self._scored(attacked, first.truth)
    numbers = tuple(own.round_num for own in observations)
    return [RoundEvidence(numbers, made, failed, (), control, problems)]

  def _control(self, place: str, seen: _Seen, clean: list[Scored]) -> Scored:
    """The positive control, which is a part of `clean`, the undefended round, if that is one."""
    observation, truth, clients = seen
    if is_single_image_round(observation, clients) and clean:
      return clean[0]
    single, shown = single_images(observation, truth, clients)
    (attacked, *_) = self._suite.unaware(f'{place}/control', [single], clients)
    if attacked.problem:
      raise UserError(f'the positive control could not be attacked: {attacked.problem}')
    return score_attacked(attacked, shown, self._distractors)

  def _bounds(self, seen: _Seen) -> list[dict[str, Any]]:
    """Of rounds of single images under shadow noise whose region is given, on small models."""
    observation, truth, clients = seen
    names = clients[: _BOUND_CLIENTS.value]
    strength = _linearised_strength(observation.defense)
    if not names or strength is None or not is_single_image_round(observation, clients):
      return []
    model = model_from_config(observation.model_config)
    entries = math.prod(observation.image_shape) * model.count_params()
    if batch_norm_layers(model) or entries > _MAX_JACOBIAN_ENTRIES:
      return []
    for variable, array in zip(
      model.trainable_variables, observation.global_weights.trainable, strict=True
    ):
      variable.assign(array)
    with self._suite.watch('bounds', 1) as update:
      release = LinearisedRelease(model, [truth[name] for name in names], self._public_images)
      errors = release.errors(observation.defense['shape'], strength)
      update(1, '')
    unbiased, prior = (region_psnr(error) for error in errors)
    bounds = [
      {
        'name': 'With a prior',
        'region_psnr': prior,
        'holds_here': True,
        'rests_on': 'van Trees, an ESTIMATE: attackers who know what images look like, by a'
        ' Gaussian prior fitted to public images.',
      },
      {
        'name': 'Without bias',
        'region_psnr': unbiased,
        'holds_here': False,
        'rests_on': 'Cramer-Rao: attackers who know nothing of what images look like. The attacks'
        ' above do, so that they may exceed it.',
      },
    ]
    # A region that the update does not identify has no finite bound without a prior.
    return [bound for bound in bounds if np.isfinite(bound['region_psnr'])]

  def _scored(
    self, attacked: list[Attacked], truth: Mapping[str, Truth]
  ) -> tuple[list[Scored], list[Attacked]]:
    made = [score_attacked(own, truth, self._distractors) for own in attacked if not own.problem]
    return made, [own for own in attacked if own.problem]


def _linearised_strength(defense: Mapping[str, Any]) -> str | None:
  """As `LinearisedRelease` takes it; None if it knows no such defence."""
  if defense['name'] != 'shadow' or defense['saliency']['kind'] != 'given':
    return None
  kind, value = defense['strength']['kind'], defense['strength']['value']
  if defense['propagation'] == 'images' and kind == 'scale':
    return f'images:{value}'
  return str(value) if defense['propagation'] == 'per_step' and kind == 'ratio' else None


def _same_images(name: str, seen: list[_Seen]) -> bool:
  truths = [own.truth.get(name) for own in seen]
  return all(
    truth is not None and np.array_equal(truth.images, truths[0].images) for truth in truths
  )


@contextlib.contextmanager
def _watch(what: str, total: int) -> Iterator[Any]:
  with Progress(what, total, 'it') as progress:
    yield progress.update


def _output(run_dir: pathlib.Path) -> pathlib.Path:
  if not run_dir.is_dir():
    raise UserError(f'--run_dir={run_dir}: no such directory')
  if _NAME.value in ('', '.', '..') or '/' in _NAME.value:
    raise UserError(f'--name={_NAME.value}: must be the name of one directory')
  output = run_dir / 'audits' / _NAME.value
  if output.exists() and not _RESUME.value:
    raise UserError(f'--name={_NAME.value}: {output} exists; use --resume or another name')
  return output


def _rounds(run_dir: pathlib.Path) -> list[int]:
  known = sorted(
    int(path.name.rpartition('_')[2]) for path in (run_dir / 'observations').glob('round_*')
  )
  if not known:
    raise UserError(f'--run_dir={run_dir}: no observed round; train with --observed_rounds')
  if _ROUNDS.value is None:
    return known
  wanted = set()
  for text in _ROUNDS.value:
    if not text.strip().isdecimal() or int(text) not in known:
      raise UserError(f'--rounds={text}: observed are {", ".join(map(str, known))}')
    wanted.add(int(text))
  return sorted(wanted)


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
    for flag in (_ITERATIONS, _CALIBRATION_CLIENTS, _DENOISER_STEPS)
    if flag.value is not None
  }
  return dataclasses.replace(BUDGETS[_BUDGET.value], **given)


def _data(config: Mapping[str, Any]) -> FederatedData:
  data = load_recorded(config['flags'], seed=config['flags']['seed'])
  if data.digest() != config['data_sha256']:
    raise UserError(
      f'--run_dir={_RUN_DIR.value}: the data are not those of the run any more (other SHA-256)'
    )
  return data


def _utility(run_dir: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """What test.json says of the run and of the undefended one."""
  own, other = _test(run_dir), None
  if _UNDEFENDED_RUN_DIR.value:
    other_dir = pathlib.Path(_UNDEFENDED_RUN_DIR.value)
    other_config = run_directory.read_config(other_dir)
    for name in ('data_sha256', 'model_sha256'):
      if other_config[name] != config[name]:
        raise UserError(f'--undefended_run_dir={other_dir}: has another {name} than the run')
    for name, value in _training(config).items():
      if other_config['flags'].get(name) != value:
        raise UserError(
          f'--undefended_run_dir={other_dir}: was trained with --{name}='
          f'{other_config["flags"].get(name)}, the run with {value}'
        )
    if other_config['flags']['defense'] != 'none':
      raise UserError(f'--undefended_run_dir={other_dir}: was trained with a defence')
    other = _test(other_dir)
    if other is None:
      raise UserError(f'--undefended_run_dir={other_dir}: has no test.json; it has not ended')
  return {'test': own, 'undefended': other}


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
  """What runs that are compared by their usefulness have in common."""
  return {name: config['flags'].get(name) for name in _TRAINING_FLAGS}


def _test(run_dir: pathlib.Path) -> dict[str, Any] | None:
  path = run_dir / 'test.json'
  return read_json(path) if path.exists() else None


def _participation(
  config: Mapping[str, Any], data: FederatedData, seen: list[_Seen]
) -> Participation:
  values, observation = config['flags'], seen[0].observation
  smallest = min(observation.clients, key=lambda client: client.num_images)
  return Participation(
    rounds=values['rounds'],
    clients_per_round=values['clients_per_round'] or len(data.clients),
    num_clients=len(data.clients),
    images=max(1, min(map(len, data.clients.values()))),
    batch_size=smallest.images_per_step(observation.client_training),
    steps=max(1, smallest.num_steps),
  )


def _scope(
  config: Mapping[str, Any], seen: list[_Seen], defense: Mapping[str, Any]
) -> dict[str, Any]:
  observation = seen[0].observation
  training = observation.client_training
  attacked = [observation.client(name) for name in seen[0].clients]
  numbers = ', '.join(str(own.observation.round_num) for own in seen)
  return {
    'Data set': f'{observation.dataset}, SHA-256 {config["data_sha256"][:16]}…',
    'Model': f'{observation.model_name}, SHA-256 of the start {config["model_sha256"][:16]}…',
    'Rounds audited': f'{numbers} of {config["flags"]["rounds"]}',
    'Clients attacked': (
      f'{len(seen[0].clients)} of {len(observation.clients)}, the smallest first'
    ),
    'Images and steps of a client in a round': (
      f'{_span([own.num_images for own in attacked])} images,'
      f' {_span([own.num_steps for own in attacked])} steps'
    ),
    'Local training': (
      f'{training.optimizer}, learning rate {training.learning_rate:g}, batches of'
      f' {training.batch_size}, {training.local_epochs} epochs'
    ),
    'BatchNorm statistics': observation.batch_norm_sharing,
    'Defence': _defense_words(defense),
    'Seed of the training': str(config['flags']['seed']),
  }


def _defense_words(defense: Mapping[str, Any]) -> str:
  """Name and settings; of nested ones, what kind and how much."""
  words = []
  for key, value in defense.items():
    if isinstance(value, Mapping):
      value = ' '.join(str(value[part]) for part in ('kind', 'value') if part in value)
    if key != 'name':
      words.append(f'{key} {value}')
  return f'{defense["name"]}: {", ".join(words)}' if words else defense['name']


def _span(values: list[int]) -> str:
  least, most = min(values), max(values)
  return str(least) if least == most else f'{least} to {most}'


def run() -> None:
  """The entry point of tff-shadow-audit."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
