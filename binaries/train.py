"""Trains a Keras model with federated averaging and logs what the server saw.

Writes a run directory: config.json, state/, metrics.csv, tensorboard/, observations/, truth/ and,
at the end, model.keras with the trained global weights and test.json with the metrics of the test
split.
"""

import dataclasses
import logging
import math
import pathlib
import sys

import tensorflow_federated as tff
from absl import flags

from binaries import (
  baseline_flags,
  command,
  data_flags,
  published_flags,
  run_directory,
  shadow_flags,
)
from binaries.progress import Progress
from tff_shadow.data import FederatedData, most_repeats
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import (
  BASELINES,
  RoundReport,
  TrainingRun,
  TrainingSettings,
  evaluate,
)
from tff_shadow.learning.client_secrets import read_client_secrets, write_client_secrets
from tff_shadow.learning.run_state import has_state, newest_round
from tff_shadow.models import (
  MODELS,
  NORMS,
  build_model,
  load_keras_file,
  model_digest,
  model_to_config,
)
from tff_shadow.observations import BATCH_NORM_SHARING, ClientTraining, observation_path
from tff_shadow.shadow import build_region_map
from tff_shadow.shadow.noise_keys import draw_secret, experiment_secret

_RUN_DIR = flags.DEFINE_string('run_dir', None, 'Directory of this run; must be new or empty.')
_RESUME = flags.DEFINE_bool('resume', False, 'Continue the run in --run_dir.')
_MODEL = flags.DEFINE_string(
  'model', 'conv_small', f'One of {", ".join(sorted(MODELS))}, or a path to a .keras file.'
)
_NORM = flags.DEFINE_enum('norm', 'none', NORMS, 'Normalisation of the built-in models.')
_BATCH_NORM_SHARING = flags.DEFINE_enum(
  'batch_norm_sharing',
  'aggregate',
  BATCH_NORM_SHARING,
  'aggregate: BatchNorm statistics are sent and averaged. local: they never leave a client.'
  ' frozen: BatchNorm layers are not trained at all.',
)
_ROUNDS = flags.DEFINE_integer('rounds', 50, 'Rounds to train.', lower_bound=1)
_CLIENTS_PER_ROUND = flags.DEFINE_integer(
  'clients_per_round', None, 'Clients drawn in each round; all by default.', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Images per local step.', lower_bound=1)
_CLIENT_BATCH_SIZES = flags.DEFINE_string(
  'client_batch_sizes',
  None,
  'Images per local step of each client instead, such as 4/4/8, in the order of the clients (of a'
  ' manifest: that of their first rows).',
)
_LOCAL_EPOCHS = flags.DEFINE_integer(
  'local_epochs', 1, 'Passes over its images that a client makes in a round.', lower_bound=1
)
_MAX_LOCAL_STEPS = flags.DEFINE_integer(
  'max_local_steps', None, 'Most local steps of a client in a round.', lower_bound=1
)
_CLIENT_LEARNING_RATE = flags.DEFINE_float(
  'client_learning_rate', 0.05, "Learning rate of the clients' SGD.", lower_bound=0.0
)
_CLIENT_LEARNING_RATE_DROPS = flags.DEFINE_list(
  'client_learning_rate_drops',
  [],
  'Rounds after which it is multiplied by --client_learning_rate_drop_factor, such as 40,80.',
)
_CLIENT_LEARNING_RATE_DROP_FACTOR = flags.DEFINE_float(
  'client_learning_rate_drop_factor', 0.1, 'See --client_learning_rate_drops.'
)
_CLIENT_MOMENTUM = flags.DEFINE_float(
  'client_momentum', 0.0, "Momentum of the clients' SGD.", lower_bound=0.0, upper_bound=0.999
)
_SERVER_LEARNING_RATE = flags.DEFINE_float(
  'server_learning_rate', 1.0, "Learning rate of the server's SGD.", lower_bound=0.0
)
_SERVER_MOMENTUM = flags.DEFINE_float(
  'server_momentum', 0.0, "Momentum of the server's SGD.", lower_bound=0.0, upper_bound=0.999
)
_OBSERVED_ROUNDS = flags.DEFINE_list(
  'observed_rounds', ['1'], 'Rounds whose observation is written for attacks; empty for none.'
)
_SEED = flags.DEFINE_integer(
  'seed',
  0,
  'Decides the initial weights, the partition, client sampling and batch order.',
  lower_bound=0,
)
_SECURE_MEASUREMENTS = flags.DEFINE_bool(
  'secure_measurements',
  True,
  'The server sees losses, accuracies and counts of the clients only as secure sums over those of a'
  ' round. Of single clients they pick known images out, whatever noise is on the updates; without'
  ' them it is also told in every round whose update was not finite.',
)
_EVALUATE_EVERY_ROUNDS = flags.DEFINE_integer(
  'evaluate_every_rounds', 1, 'Rounds between two evaluations on validation.', lower_bound=1
)
_SAVE_EVERY_ROUNDS = flags.DEFINE_integer(
  'save_every_rounds', 5, 'Rounds between two saved states.', lower_bound=1
)
_MAX_CONCURRENT_CLIENTS = flags.DEFINE_integer(
  'max_concurrent_clients',
  None,
  'Clients that train at once; by default one per core.',
  lower_bound=1,
)

_DEFENSE = flags.DEFINE_enum(
  'defense',
  'none',
  ['none', 'shadow', 'published', *BASELINES],
  "none. shadow: noise on each client's update, shaped by its shadow model. published: noise on its"
  ' images, as Jiang, Ma and Yang 2025 (the flags --published_...). The others are baselines, with'
  ' flags --NAME_...; plain Gaussian noise of a fixed scale is shadow with --noise_shape=isotropic'
  ' --noise_strength_kind=scale --noise_freshness=fresh.',
)
_REPRODUCIBLE_NOISE = flags.DEFINE_bool(
  'reproducible_noise',
  False,
  'FOR EXPERIMENTS ONLY: noise keys follow from --seed, so a server that knows it can subtract the'
  ' noise. Otherwise they come from secrets that each client draws.',
)

_MAY_CHANGE = frozenset(
  {
    'resume',
    'run_dir',
    'rounds',
    'observed_rounds',
    'evaluate_every_rounds',
    'save_every_rounds',
    'max_concurrent_clients',
    'data_dir',
    'published_latents',
  }
)

_SECRETS = 'client_state/secrets.json'


def main() -> None:
  """Trains as the flags say."""
  if not _RUN_DIR.value:
    raise UserError('--run_dir is required: a new directory for this run')
  run_dir = pathlib.Path(_RUN_DIR.value)
  if not _RESUME.value:
    run_directory.check_unclaimed(run_dir)  # Before minutes of loading data.
  observed_rounds = _parse_observed_rounds()
  _check_defense_flags()
  logging.getLogger('tensorflow').setLevel(logging.ERROR)
  data = data_flags.load_data(seed=_SEED.value)
  batch_sizes = _parse_batch_sizes(list(data.clients))
  model = _build_model(data)
  noise = (
    shadow_flags.shadow_noise(_repeats(data, batch_sizes)) if _DEFENSE.value == 'shadow' else None
  )
  published = published_flags.published_settings() if _DEFENSE.value == 'published' else None
  defense = None
  if _DEFENSE.value in BASELINES:
    defense = baseline_flags.baseline_defense(_DEFENSE.value)
  if noise and noise.needs_shadow and noise.saliency.kind not in ('given', 'uniform'):
    build_region_map(noise.saliency, model)  # A layer that does not exist is told before all else.
  settings = TrainingSettings(
    rounds=_ROUNDS.value,
    client_training=ClientTraining(
      optimizer='sgd',
      learning_rate=_positive(_CLIENT_LEARNING_RATE),
      momentum=_CLIENT_MOMENTUM.value,
      batch_size=_BATCH_SIZE.value,
      local_epochs=_LOCAL_EPOCHS.value,
      max_local_steps=_MAX_LOCAL_STEPS.value,
    ),
    clients_per_round=_CLIENTS_PER_ROUND.value,
    server_learning_rate=_positive(_SERVER_LEARNING_RATE),
    server_momentum=_SERVER_MOMENTUM.value,
    batch_norm_sharing=_BATCH_NORM_SHARING.value,
    observed_rounds=observed_rounds,
    seed=_SEED.value,
    learning_rate_drops=_parse_drops(),
    learning_rate_drop_factor=_CLIENT_LEARNING_RATE_DROP_FACTOR.value,
    client_batch_sizes=batch_sizes,
    secure_measurements=_SECURE_MEASUREMENTS.value,
  )
  secrets = None
  if noise or (published and published.map_kind == 'white'):
    secrets = _client_secrets(run_dir, list(data.clients))
  if noise:
    defense = shadow_flags.shadow_defense(noise, secrets, data.validation)
  elif published:
    defense = published_flags.published_defense(published, data, seed=_SEED.value, secrets=secrets)
  settings = dataclasses.replace(settings, defense=defense)
  # Before the directory is claimed, for it tells what does not go together.
  training = TrainingRun(
    data,
    model,
    settings,
    run_dir,
    evaluate_every_rounds=_EVALUATE_EVERY_ROUNDS.value,
    save_every_rounds=_SAVE_EVERY_ROUNDS.value,
  )
  config = {
    'program': 'train',
    'flags': {
      **command.flag_values(sys.modules[__name__]),
      **command.flag_values(data_flags),
      **command.flag_values(shadow_flags),
      **command.flag_values(published_flags),
      **command.flag_values(baseline_flags),
    },
    'dataset': data.name,
    'data_sha256': data.digest(),
    'model_sha256': model_digest(model_to_config(model), model.get_weights()),
  }
  # The published schedules run over all rounds.
  may_change = _MAY_CHANGE - {'rounds'} if published else _MAY_CHANGE
  if _RESUME.value:
    _check_not_past(run_dir, observed_rounds)
  run_directory.claim(run_dir, config, resume=_RESUME.value, may_change=may_change)
  if secrets and not (run_dir / _SECRETS).exists():
    write_client_secrets(run_dir / _SECRETS, secrets)
  with (
    local_worker_context(
      log_path=run_dir / 'worker.log', max_concurrent_calls=_MAX_CONCURRENT_CLIENTS.value
    ),
    Progress('latents', sum(map(len, data.clients.values())), 'images') as latents,
    Progress('round', _ROUNDS.value, 'rounds') as progress,
  ):

    def report(done: RoundReport) -> None:
      progress.update(done.round_num, _figures(done.metrics))

    training.train(resume=_RESUME.value, report=report, report_latents=latents.update)
  model.save(run_dir / 'model.keras')
  test = evaluate(model, data.test.float_images(), data.test.labels)
  if not all(map(math.isfinite, test.values())):
    raise UserError(
      'the trained model gives no finite outputs on the test images: lower --client_learning_rate,'
      ' or the noise'
    )
  command.write_json(run_dir / 'test.json', test)
  print('test  ' + '  '.join(f'{name} {value:.4f}' for name, value in test.items()))
  if observed_rounds:
    print(
      f'observations of rounds {", ".join(map(str, observed_rounds))} in {run_dir}/observations'
    )


def _check_defense_flags() -> None:
  """Who has forgotten --defense would train without one."""
  defense = _DEFENSE.value
  if defense != 'shadow':
    command.check_unused(shadow_flags, '--defense=shadow')
  if defense != 'published':
    command.check_unused(published_flags, '--defense=published')
  for name in BASELINES:
    if defense != name:
      command.check_unused(baseline_flags, f'--defense={name}', prefix=f'{name}_')


def _client_secrets(run_dir: pathlib.Path, client_ids: list[str]) -> dict[str, bytes]:
  path = run_dir / _SECRETS
  if _REPRODUCIBLE_NOISE.value:
    return {name: experiment_secret(_SEED.value, name) for name in client_ids}
  # A run that was stopped at once may have none yet; in one that has a state they have been used.
  if _RESUME.value and (path.exists() or has_state(run_dir / 'state')):
    return read_client_secrets(path, client_ids)
  return {name: draw_secret() for name in client_ids}


def _build_model(data):
  arguments = {'image_shape': tuple(data.image_shape), 'num_classes': data.num_classes}
  if _MODEL.value in MODELS or '.' not in _MODEL.value:
    return build_model(_MODEL.value, norm=_NORM.value, seed=_SEED.value, **arguments)
  if _NORM.present:
    raise UserError(f'--norm: is for built-in models; {_MODEL.value} has its own layers')
  return load_keras_file(_MODEL.value, **arguments)


def _parse_observed_rounds() -> tuple[int, ...]:
  rounds = set()
  for text in _OBSERVED_ROUNDS.value:
    if not text.strip().isdigit() or not 1 <= int(text) <= _ROUNDS.value:
      raise UserError(
        f'--observed_rounds={text}: use whole numbers from 1 to --rounds={_ROUNDS.value}'
      )
    rounds.add(int(text))
  return tuple(sorted(rounds))


def _parse_drops() -> tuple[int, ...]:
  for text in _CLIENT_LEARNING_RATE_DROPS.value:
    if not text.strip().isdecimal():
      raise UserError(f'--client_learning_rate_drops={text}: use rounds from 1, such as 40,80')
  return tuple(int(text) for text in _CLIENT_LEARNING_RATE_DROPS.value)


def _repeats(data: FederatedData, batch_sizes: dict[str, int]) -> int:
  """How often a client's local training uses an image, at most."""
  return max(
    most_repeats(
      len(examples),
      batch_sizes.get(name, _BATCH_SIZE.value),
      _LOCAL_EPOCHS.value,
      _MAX_LOCAL_STEPS.value,
    )
    for name, examples in data.clients.items()
  )


def _check_not_past(run_dir: pathlib.Path, observed_rounds: tuple[int, ...]) -> None:
  """What is recorded of a run must be true of what was trained already."""
  done = newest_round(run_dir / 'state')
  if _ROUNDS.value < done:
    raise UserError(f'--rounds={_ROUNDS.value}: {done} rounds are done already')
  for number in observed_rounds:
    if number <= done and not observation_path(run_dir, number).exists():
      raise UserError(f'--observed_rounds: round {number} is done already, and was not observed')


def _parse_batch_sizes(client_ids: list[str]) -> dict[str, int]:
  text = _CLIENT_BATCH_SIZES.value
  if text is None:
    return {}
  sizes = text.split('/')
  if not all(size.isdecimal() and int(size) for size in sizes) or len(sizes) != len(client_ids):
    raise UserError(
      f'--client_batch_sizes={text}: use {len(client_ids)} whole numbers from 1 such as 4/8/1, one'
      f' for each of {", ".join(client_ids)}'
    )
  return dict(zip(client_ids, map(int, sizes), strict=True))


def _positive(flag: flags.FlagHolder) -> float:
  if not 0 < flag.value < float('inf'):
    raise UserError(f'--{flag.name}={flag.value}: must be a positive number')
  return flag.value


def _figures(metrics: dict[str, float]) -> str:
  shown = (('loss', 'train/loss'), ('val F1', 'validation/f1'), ('val AUC', 'validation/auc'))
  return '  '.join(f'{label} {metrics[name]:.4f}' for label, name in shown if name in metrics)


def run() -> None:
  """Console script."""
  # The stock context would start a worker that outlives us, and complains when Python ends.
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
