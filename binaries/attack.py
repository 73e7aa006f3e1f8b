"""Reconstructs the images of clients from a logged round.

Reads an observation (what the server saw) and writes reconstructions beside two controls. The truth
is not opened, unless --labels=truth, which reads the labels in it and nothing else.
"""

import contextlib
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from attacks.analytic_attack import recover_observation
from attacks.engine import AttackProgress, attack_observation, planned_steps
from attacks.local_steps import check_images_recur
from attacks.priors import GaussianImages
from attacks.results import TargetResult, described, read_results, write_results
from attacks.threads import share_cores
from attacks.threat_model import threat_model, warnings
from binaries import attack_flags, command, knowledge_flags, run_directory
from binaries.progress import Progress
from tff_shadow.errors import UserError
from tff_shadow.observations import (
  AGGREGATE,
  Observation,
  observation_path,
  read_observation,
  read_truth,
  truth_path,
)

_RUN_DIR = flags.DEFINE_string(
  'run_dir', None, 'Run directory of tff-shadow-train, or of rounds that record_round wrote.'
)
_ROUND = flags.DEFINE_integer('round', 1, 'Round of --run_dir to attack.', lower_bound=1)
_OBSERVATION = flags.DEFINE_string(
  'observation', None, 'Directory of an observation, RUN/observations/ROUND; instead of --run_dir.'
)
_NAME = flags.DEFINE_string('name', 'inversion', 'The output goes to RUN/attacks/NAME.')
_ROUNDS = flags.DEFINE_list(
  'rounds', None, 'Several rounds of --run_dir, attacked jointly; instead of --round.'
)
_TARGETS = flags.DEFINE_list(
  'targets',
  None,
  'Client ids to attack, or aggregate for the mean of all clients; all clients by default.',
)
_ANALYTIC = flags.DEFINE_bool(
  'analytic',
  False,
  'Instead of searching, reads the images off the first layer, which must be dense.',
)
_MAX_TARGETS = flags.DEFINE_integer('max_targets', None, 'At most so many targets.', lower_bound=1)
_LABELS = flags.DEFINE_string(
  'labels',
  'infer',
  "infer: from the update. truth: read the labels (only) from the run's truth file, a stronger"
  ' threat model. Or a list of class numbers, the same for every target.',
)
_RESUME = flags.DEFINE_bool('resume', False, 'Go on with an interrupted attack.')
_CHECKPOINT_EVERY_SECS = flags.DEFINE_float(
  'checkpoint_every_secs', 60.0, 'How often an unfinished target is saved.', lower_bound=0
)
_OP_THREADS = flags.DEFINE_integer(
  'op_threads',
  None,
  'Threads that share one operation; by default the cores over the lanes that run side by side.',
  lower_bound=1,
)

_CHECKPOINT = 'checkpoint.safetensors'
# These say how a run is done, not what comes out of it.
_NOT_SETTINGS = (
  'resume',
  'checkpoint_every_secs',
  'run_dir',
  'observation',
  'round',
  'name',
  'op_threads',
)


def main() -> None:
  """Attacks the round or rounds that the flags name."""
  logging.getLogger('tensorflow').setLevel(logging.ERROR)  # Several solvers are traced.
  run_dir, observation_dirs = _directories()
  prior_weight = 0.0 if _ANALYTIC.value else attack_flags.public_prior()
  knowledge = knowledge_flags.knowledge(fits_prior=bool(prior_weight))
  observations = [read_observation(directory) for directory in observation_dirs]
  observation = observations[0]
  prior = None
  # Who knows the defence fits one of his own, and chooses its weight.
  if prior_weight and not knowledge:
    prior = _public_prior(run_dir, prior_weight)
  config = attack_flags.attack_config(tuple(observation.image_shape), prior)
  targets = _targets(observation)
  if len(observations) > 1:
    check_images_recur(observations, targets)
  share_cores(min(config.lanes, config.restarts * len(targets)), _OP_THREADS.value)
  labels = _labels(run_dir, observation, targets)
  sentences = threat_model(
    observation,
    config,
    labels_known=labels is not None,
    num_rounds=len(observations),
    only_aggregate=targets == [AGGREGATE],
  )
  flag_values = command.flag_values(sys.modules[__name__]) | command.flag_values(attack_flags)
  if knowledge or prior:
    flag_values |= command.flag_values(knowledge_flags)
  document = {
    'attack': {key: value for key, value in flag_values.items() if key not in _NOT_SETTINGS},
    'all_settings': config.as_dict(),
    'observation': str(observation_dirs[0].relative_to(run_dir)),
    'round': observation.round_num,
    'rounds': [seen.round_num for seen in observations],
    'threat_model': sentences,
    'versions': command.versions(),
    **described(observation),
  }
  output = run_dir / 'attacks' / _NAME.value
  if knowledge:
    if _ANALYTIC.value or labels is not None:
      raise UserError('--knows: goes neither with --analytic nor with told --labels')
    _attack_knowingly(run_dir, output, observations, targets, config, knowledge, document)
    return
  # Seconds, and it may refuse the model: before anything is made.
  read_off = recover_observation(observation, targets, labels=labels) if _ANALYTIC.value else []
  finished = _prepare(output, document)
  if _ANALYTIC.value:
    _finish(output, read_off)
    return
  print(attack_flags.description())
  for sentence in sentences:
    print(sentence)
  clients = [observation.client(target) for target in targets if target != AGGREGATE]
  for warning in warnings(observation, clients, config, len(observations)):
    print(f'warning: {warning}', file=sys.stderr)
  first = observations[0]
  done = planned_steps(first, config, [result.target for result in finished])
  with (
    _leaving_nothing_of_a_refused_attack(output),
    Progress('attack', planned_steps(first, config, targets), 'it', done=done) as progress,
  ):

    def show(at: AttackProgress) -> None:
      more = f' and {len(at.targets) - 1} more' if len(at.targets) > 1 else ''
      progress.update(at.done, f'{at.targets[0]}{more}, {at}')

    results = attack_observation(
      observations,
      config,
      targets,
      labels=labels,
      finished=finished,
      on_result=lambda done: write_results(output, done),
      progress=show,
      checkpoint_path=output / _CHECKPOINT,
      checkpoint_every_secs=_CHECKPOINT_EVERY_SECS.value,
    )
  _finish(output, results)


def _public_prior(run_dir: pathlib.Path, value_weight: float) -> GaussianImages:
  """Fitted to the public images of the run."""
  # They take seconds to import, and other attacks do without.
  from attacks.public_prior import fitted_prior
  from binaries.recorded_data import load_data_of

  data = load_data_of(run_dir, run_directory.read_config(run_dir))
  images = data.public.float_images()
  seed = attack_flags.seed()
  prior = fitted_prior(images, knowledge_flags.augmentations(), seed, value_weight=value_weight)
  if prior is None:
    raise UserError(
      f'--public_prior: the {len(images)} public images of {run_dir} are too few to fit a prior'
      ' to, or all the same; use --public_prior=0'
    )
  return prior


def _attack_knowingly(run_dir, output, observations, targets, config, knowledge, document) -> None:
  """Nothing of it is kept before its end."""
  # TFF takes seconds to import, and other attacks do without.
  from binaries.knowing_attack import adaptive_attack

  attack = adaptive_attack(
    run_dir, observations, targets, config, knowledge, attack_flags.generator_path()
  )
  if len(_prepare(output, document)) == len(targets):
    return
  with _leaving_nothing_of_a_refused_attack(output):
    found = attack()
  sentences = found.knows(observations[0])
  for sentence in sentences:
    print(sentence)
  command.write_json(output / 'config.json', document | {'threat_model': sentences})
  _finish(output, found.results)


def _finish(output: pathlib.Path, results: list[TargetResult]) -> None:
  """Writes the results and says what came of them."""
  write_results(output, results)
  for result in results:
    if result.status == 'failed':
      print(f'warning: {result.target}: no reconstruction, {result.reason}', file=sys.stderr)
  attacked = sum(result.status == 'ok' for result in results)
  print(f'{attacked} of {len(results)} targets attacked; written to {output}')


def _directories() -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The run directory and the observations in it."""
  if _ANALYTIC.value and _ROUNDS.value is not None:
    raise UserError('--analytic: takes one round, not --rounds')
  if (_RUN_DIR.value is None) == (_OBSERVATION.value is None):
    raise UserError('give either --run_dir (with --round) or --observation')
  command.check_directory_name('name', _NAME.value)
  if _RUN_DIR.value is not None:
    run_dir = pathlib.Path(_RUN_DIR.value)
    if not run_dir.is_dir():
      raise UserError(f'--run_dir={run_dir}: no such directory')
    return run_dir, [observation_path(run_dir, number) for number in _round_numbers()]
  if _ROUNDS.value is not None:
    raise UserError('--rounds: needs --run_dir')
  # Resolved, so that `--observation=.` has parents.
  observation = pathlib.Path(_OBSERVATION.value).resolve()
  if observation.parent.name != 'observations':
    raise UserError(
      f'--observation={_OBSERVATION.value}: must be a directory in RUN/observations, for the'
      ' output goes to RUN/attacks'
    )
  return observation.parent.parent, [observation]


def _round_numbers() -> list[int]:
  if _ROUNDS.value is None:
    return [_ROUND.value]
  try:
    rounds = [int(value) for value in _ROUNDS.value]
  except ValueError as error:
    raise UserError(f'--rounds={",".join(_ROUNDS.value)}: must be a list such as 1,2,3') from error
  if not rounds or min(rounds) < 1 or len(set(rounds)) < len(rounds):
    raise UserError(f'--rounds={",".join(_ROUNDS.value)}: rounds are counted from 1, each once')
  return rounds


def _targets(observation: Observation) -> list[str]:
  known = [client.client_id for client in observation.clients]
  targets = list(dict.fromkeys(_TARGETS.value or known))
  for target in targets:
    if target not in (*known, AGGREGATE):
      raise UserError(f'--targets: no client {target!r} in this round; it has {", ".join(known)}')
  return targets[: _MAX_TARGETS.value]


def _labels(
  run_dir: pathlib.Path, observation: Observation, targets: list[str]
) -> dict[str, list[int]] | None:
  """Labels the attacker is told, per target; None if it infers them."""
  if _LABELS.value == 'infer':
    return None
  if _LABELS.value == 'truth':
    path = truth_path(run_dir, observation.round_num)
    truth = read_truth(path)
    needed = [target for target in targets if target != AGGREGATE]
    needed += [client.client_id for client in observation.clients if AGGREGATE in targets]
    missing = [target for target in needed if target not in truth]
    if missing:
      raise UserError(f'{path}: has no client {missing[0]!r}')
    labels = {target: truth[target].labels.tolist() for target in needed}
    sent = [client.client_id for client in observation.clients if not client.dropped]
    together = [label for client_id in sent for label in labels.get(client_id, [])]
    return {target: labels.get(target, together) for target in targets}
  try:
    values = [int(value) for value in _LABELS.value.split(',')]
  except ValueError as error:
    raise UserError(
      f'--labels={_LABELS.value}: use infer, truth or a list of class numbers such as 0,1'
    ) from error
  for target in targets:
    if target != AGGREGATE and observation.client(target).num_images != len(values):
      raise UserError(
        f'--labels={_LABELS.value}: {len(values)} labels, but {target} has'
        f' {observation.client(target).num_images} images'
      )
  if not all(0 <= value < len(observation.class_names) for value in values):
    raise UserError(
      f'--labels={_LABELS.value}: class numbers go from 0 to {len(observation.class_names) - 1}'
    )
  return dict.fromkeys(targets, values)


def _prepare(output: pathlib.Path, document: dict[str, Any]) -> list[Any]:
  """Makes the output directory, or on --resume returns what is finished in it."""
  path = output / 'config.json'
  if not output.exists():
    if _RESUME.value:
      raise UserError(f'--resume: there is no attack {_NAME.value!r} to go on with in {output}')
    output.mkdir(parents=True)
    command.write_json(path, document)
    return []
  if not _RESUME.value:
    raise UserError(f'--name={_NAME.value}: {output} exists; use --resume or another name')
  try:
    saved = json.loads(path.read_text())
    earlier = {**saved['attack'], 'round': saved['round']}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: damaged or missing; use another --name') from error
  now = {**document['attack'], 'round': document['round']}
  for name in now:
    if earlier.get(name) != now[name]:
      raise UserError(
        f'--resume: --{name} was {earlier.get(name)!r} and is {now[name]!r} now; use the same'
        ' settings or another --name'
      )
  return read_results(output)


@contextlib.contextmanager
def _leaving_nothing_of_a_refused_attack(output: pathlib.Path) -> Iterator[None]:
  """On an error, frees the name of an attack of which nothing has been kept."""
  try:
    yield
  except Exception:
    if [path.name for path in output.iterdir()] == ['config.json']:
      (output / 'config.json').unlink()
      output.rmdir()
    raise


def run() -> None:
  """Entry point of `tff-shadow-attack`."""
  command.run(main)


if __name__ == '__main__':
  run()
