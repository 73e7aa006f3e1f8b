"""Trains and attacks the published experiment in parts, each kept where it was finished.

The published attacks search one batch of images for a client, as if it had taken one step on them,
and are told the labels, which here are those of its first batch. Our own attack infers the labels,
and simulates all steps of clients that took few.

`OUTPUT/DEFENCE` is a run directory like those of tff-shadow-train and tff-shadow-attack.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from attacks.engine import AttackProgress, attack_observation, planned_steps
from attacks.results import described, read_results, write_results
from attacks.scoring.metrics import Perceptual
from attacks.scoring.results import read_json
from attacks.threat_model import threat_model
from binaries import command
from binaries.progress import Progress
from binaries.published_protocol import (
  ATTACKS,
  DEFENSES,
  OWN_ATTACK,
  Plan,
  attack_config,
  load_data,
  training_settings,
)
from binaries.reproduction_table import COLUMNS, is_scored, score_attack, write_csv
from tff_shadow.data import FederatedData
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import RoundReport, TrainingRun, evaluate
from tff_shadow.learning.run_state import has_state
from tff_shadow.models import build_model
from tff_shadow.observations import (
  ClientObservation,
  ClientTraining,
  Observation,
  WeightArrays,
  observation_path,
  read_observation,
  read_truth,
  round_directory_name,
  truth_path,
)


def run(
  plan: Plan,
  defenses: Sequence[str],
  output_dir: pathlib.Path,
  perceptual: Perceptual | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Everything that is not done yet; returns the tables of attacks and of utility.

  They are written to `results.csv` and `utility.csv` after every part, with all parts that this
  call and earlier ones have finished.
  """
  data = load_data(plan)
  rows: list[dict[str, Any]] = []
  utility: list[dict[str, Any]] = []
  for defense in defenses:
    run_dir = output_dir / defense
    train(plan, data, defense, run_dir)
    utility = _utility(plan, output_dir)
    write_csv(output_dir / 'utility.csv', utility, list(utility[0]))
    for round_num in plan.observed_rounds:
      for name in plan.attacks:
        score_attack(plan, data, attack(plan, name, round_num, run_dir), perceptual)
        rows = _finished_rows(plan, data, output_dir, perceptual)
        write_csv(output_dir / 'results.csv', rows, COLUMNS)
  return rows, utility


def _utility(plan: Plan, output_dir: pathlib.Path) -> list[dict[str, Any]]:
  """A row of every defence that has been trained."""
  return [
    {'dataset': plan.dataset, 'defense': defense, **read_json(output_dir / defense / 'test.json')}
    for defense in DEFENSES
    if (output_dir / defense / 'test.json').exists()
  ]


def _finished_rows(
  plan: Plan, data: FederatedData, output_dir: pathlib.Path, perceptual: Perceptual | None
) -> list[dict[str, Any]]:
  """Of all attacks that have been scored, by this call or an earlier one; all with one LPIPS."""
  rows = []
  for defense in DEFENSES:
    for round_num in plan.observed_rounds:
      for name in ATTACKS:
        directory = _attack_directory(output_dir / defense, name, round_num)
        if is_scored(directory):
          rows += score_attack(plan, data, directory, perceptual)
  return rows


def train(plan: Plan, data: FederatedData, defense: str, run_dir: pathlib.Path) -> None:
  """Trains into `run_dir`, from where an earlier call was interrupted."""
  if (run_dir / 'test.json').exists():
    return
  run_dir.mkdir(parents=True, exist_ok=True)
  model = build_model(
    plan.model,
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
    norm='batch',
    seed=plan.seed,
  )
  training = TrainingRun(data, model, training_settings(plan, data, defense), run_dir)
  resume = has_state(run_dir / 'state')
  with (
    local_worker_context(log_path=run_dir / 'worker.log'),
    Progress('latents', sum(map(len, data.clients.values())), 'images') as latents,
    Progress(f'{defense}: round', plan.rounds, 'rounds') as progress,
  ):

    def report(done: RoundReport) -> None:
      progress.update(done.round_num, f'loss {done.metrics["train/loss"]:.4f}')

    training.train(resume=resume, report=report, report_latents=latents.update)
  model.save(run_dir / 'model.keras')
  command.write_json(
    run_dir / 'test.json', evaluate(model, data.test.float_images(), data.test.labels)
  )


def attack(plan: Plan, name: str, round_num: int, run_dir: pathlib.Path) -> pathlib.Path:
  """Attacks a round, from where an earlier call was interrupted; returns where it is."""
  directory = _attack_directory(run_dir, name, round_num)
  observation = read_observation(observation_path(run_dir, round_num))
  seen = _seen_by(plan, name, observation)
  finished = read_results(directory)
  if len(finished) == len(seen.clients):
    return directory
  config = attack_config(plan, name, tuple(observation.image_shape))
  labels = None
  if name != OWN_ATTACK:
    truth = read_truth(truth_path(run_dir, round_num))
    labels = {
      client.client_id: truth[client.client_id].labels[: client.num_images].tolist()
      for client in seen.clients
    }
  directory.mkdir(parents=True, exist_ok=True)
  _write_attack_config(directory, name, observation, seen, config, labels)
  total, done = (
    planned_steps(seen, config, names)
    for names in ([client.client_id for client in seen.clients], [own.target for own in finished])
  )
  with Progress(f'{name}, round {round_num}', total, 'it', done=done) as progress:

    def show(at: AttackProgress) -> None:
      progress.update(at.done, f'{at.targets[0]}, {at}')

    found = attack_observation(
      seen,
      config,
      labels=labels,
      finished=finished,
      on_result=lambda done: write_results(directory, done),
      progress=show,
      checkpoint_path=directory / 'checkpoint.safetensors',
    )
  write_results(directory, found)
  for result in found:
    if result.status == 'failed':
      logging.warning('%s, round %d: %s: %s', name, round_num, result.target, result.reason)
  return directory


def _attack_directory(run_dir: pathlib.Path, name: str, round_num: int) -> pathlib.Path:
  return run_dir / 'attacks' / f'{name}_{round_directory_name(round_num)}'


def as_one_step(client: ClientObservation, training: ClientTraining) -> ClientObservation:
  """A client as the published attacks take it: one local step on one batch.

  Its gradient is the mean over its steps; its BatchNorm statistics are recovered as if the change
  of the running ones were that of one step.
  """
  if client.num_steps <= 1:
    return client
  update = WeightArrays(
    tuple(array / np.float32(client.num_steps) for array in client.update.trainable),
    client.update.non_trainable,
  )
  batch = min(client.images_per_step(training), client.num_images)
  return dataclasses.replace(client, num_images=batch, num_steps=1, batch_size=batch, update=update)


def _seen_by(plan: Plan, name: str, observation: Observation) -> Observation:
  """What the attack makes of an observation."""
  training = observation.client_training
  most = plan.exact_steps if name == OWN_ATTACK else 1
  clients = tuple(
    client if client.num_steps <= most else as_one_step(client, training)
    for client in observation.clients
  )
  return dataclasses.replace(observation, clients=clients)


def _write_attack_config(directory, name, observation, seen, config, labels) -> None:
  simplified = [
    own.client_id
    for own, other in zip(observation.clients, seen.clients, strict=True)
    if own is not other
  ]
  sentences = threat_model(observation, config, labels_known=labels is not None)
  if simplified:
    sentences.append(
      f'It takes {", ".join(simplified)} as if one step on one batch had sent the mean of their'
      ' steps.'
    )
  document = {
    'attack': {'preset': name},
    'all_settings': config.as_dict(),
    'observation': f'observations/{round_directory_name(observation.round_num)}',
    'round': observation.round_num,
    'threat_model': sentences,
    'versions': command.versions(),
    **described(observation),
  }
  command.write_json(directory / 'config.json', document)
