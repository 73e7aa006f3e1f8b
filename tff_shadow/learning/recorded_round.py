"""Rounds of any TFF program as a run directory, for attacks, reports and audits."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tff_shadow.data import Examples
from tff_shadow.data.recorded import RECORDED, recorded_digest, write_public
from tff_shadow.errors import UserError
from tff_shadow.models import model_digest
from tff_shadow.observations import Observation, Truth, save_json, write_round

_CONFIG = 'config.json'
_LEAST_PUBLIC = 3


def record_round(
  run_dir: pathlib.Path,
  observation: Observation,
  truth: Mapping[str, Truth],
  *,
  public: Examples,
  client_images: Mapping[str, int],
  rounds: int,
  clients_per_round: int | None = None,
  client_batch_sizes: Mapping[str, int] | None = None,
  secure_measurements: bool = False,
) -> None:
  """Writes a round of your own program so that `tff-shadow-audit --run_dir` audits it.

  The first call makes the run directory, later ones add rounds to it, or put one anew; what does
  not belong to the round must be the same in each. The truth goes into a file of its own, which no
  attack opens.

  Args:
    run_dir: New, or of earlier calls.
    observation: Of `observation_of`. The mean of `public` takes the place of its mean image.
    truth: Of the clients that are to be audited: their images as they went into the model.
    public: At least three images of the modality, with labels, that no client trains on: with them
      the attacker who knows the defence plays it and learns. With decoy noise those that the
      clients were given, by which a server would know it.
    client_images: How many images each client has that may take part in any round.
    rounds: Of the whole training; those that were not recorded are a doubt of every audit.
    clients_per_round: Drawn for each round; None for all.
    client_batch_sizes: Of clients for which it is not `ClientTraining.batch_size`.
    secure_measurements: Whether the server saw losses, accuracies and counts as secure sums alone;
      see `build_weighted_fed_avg`.

  Raises:
    ValueError: If an argument does not fit the round; nothing is written.
    UserError: If the directory is not of earlier calls with the same arguments.
  """
  batch_sizes = client_batch_sizes or {}
  _check_public(public, observation)
  _check_clients(observation, client_images, batch_sizes)
  _check_truth(truth, observation)
  if not 1 <= observation.round_num <= rounds:
    raise ValueError(f'rounds: {rounds}, but this is round {observation.round_num}')
  if clients_per_round is not None and not 1 <= clients_per_round <= len(client_images):
    raise ValueError(f'clients_per_round: {clients_per_round} of {len(client_images)} clients')
  training, weights = observation.client_training, observation.global_weights
  sizes = [batch_sizes.get(name, training.batch_size) for name in client_images]
  config = {
    'program': RECORDED,
    # As those of tff-shadow-train.
    'flags': {
      'rounds': rounds,
      'clients_per_round': clients_per_round,
      'batch_size': training.batch_size,
      'client_batch_sizes': '/'.join(map(str, sizes)) if batch_sizes else None,
      'local_epochs': training.local_epochs,
      'max_local_steps': training.max_local_steps,
      'client_learning_rate': training.learning_rate,
      'client_momentum': training.momentum,
      'batch_norm_sharing': observation.batch_norm_sharing,
      'secure_measurements': secure_measurements,
      'defense': observation.defense['name'],
    },
    'dataset': observation.dataset,
    'data_sha256': recorded_digest(public, client_images),
    'model_sha256': model_digest(
      observation.model_config, (*weights.trainable, *weights.non_trainable)
    ),
    'client_images': dict(client_images),
  }
  _claim(pathlib.Path(run_dir), config, public)
  mean_image = public.float_images().mean(axis=0)
  observation = dataclasses.replace(observation, public_mean_image=mean_image)
  write_round(pathlib.Path(run_dir), observation, dict(truth))


def _claim(run_dir: pathlib.Path, config: dict[str, Any], public: Examples) -> None:
  path = run_dir / _CONFIG
  if not path.exists():
    if run_dir.exists() and any(run_dir.iterdir()):
      raise UserError(f'{run_dir}: exists, and is no run of recorded rounds; name another')
    write_public(run_dir, public)
    save_json(path, config)
    return
  try:
    before = json.loads(path.read_text())
    old, new = ({**own, **own['flags']} for own in (before, config))
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: damaged ({error})') from error
  # Of the first round that was recorded.
  for name in new.keys() - {'flags', 'model_sha256', 'client_learning_rate'}:
    if old.get(name) != new[name]:
      raise UserError(
        f'{run_dir}: its rounds were recorded with {name} {old.get(name)!r}, now it is'
        f' {new[name]!r}; name another'
      )


def _check_public(public: Examples, observation: Observation) -> None:
  if len(public) < _LEAST_PUBLIC:
    raise ValueError(f'public: {len(public)} images, at least {_LEAST_PUBLIC} are needed')
  if public.images.shape[1:] != observation.image_shape:
    raise ValueError(
      f'public: images of shape {public.images.shape[1:]}, those of the round have'
      f' {observation.image_shape}'
    )
  _check_labels('public', public.labels, observation)


def _check_clients(
  observation: Observation, client_images: Mapping[str, int], batch_sizes: Mapping[str, int]
) -> None:
  for client in observation.clients:
    if client_images.get(client.client_id, 0) < client.num_images:
      raise ValueError(
        f'client_images: {client_images.get(client.client_id)} of {client.client_id}, which trained'
        f' on {client.num_images}'
      )
    training = observation.client_training
    size = batch_sizes.get(client.client_id, training.batch_size)
    if size != client.images_per_step(training):
      raise ValueError(
        f'client_batch_sizes: {size} of {client.client_id}, which took'
        f' {client.images_per_step(training)} a step'
      )
  for name in batch_sizes:
    if name not in client_images:
      raise ValueError(f'client_batch_sizes: {name} is not in client_images')


def _check_truth(truth: Mapping[str, Truth], observation: Observation) -> None:
  if not truth:
    raise ValueError('truth: of no client')
  counts = {client.client_id: client.num_images for client in observation.clients}
  for name, own in truth.items():
    if name not in counts:
      raise ValueError(f'truth: {name} took no part in round {observation.round_num}')
    shape = (counts[name], *observation.image_shape)
    for field, values, expected in (
      ('images', own.images, shape),
      ('regions', own.regions, (*shape[:3], 1)),
    ):
      if values.dtype != np.float32 or values.shape != expected:
        raise ValueError(
          f'truth: {field} of {name} are {values.dtype} {list(values.shape)}, not float32'
          f' {list(expected)}'
        )
      if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f'truth: {field} of {name} are not in [0, 1]')
    if own.labels.shape != shape[:1]:
      raise ValueError(
        f'truth: labels of {name} are {list(own.labels.shape)}, not {list(shape[:1])}'
      )
    _check_labels(f'truth: of {name}', own.labels, observation)


def _check_labels(what: str, labels: np.ndarray, observation: Observation) -> None:
  num_classes = len(observation.class_names)
  if labels.dtype != np.int32 or not ((labels >= 0) & (labels < num_classes)).all():
    raise ValueError(
      f'{what}: labels must be int32 from 0 to {num_classes - 1}, found {labels.dtype} such as'
      f' {sorted(set(labels.tolist()))[-3:]}'
    )
