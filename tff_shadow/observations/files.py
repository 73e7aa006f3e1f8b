"""Observation files: `observation.json` beside `tensors.safetensors`, nothing pickled."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tff_shadow.errors import UserError
from tff_shadow.observations.schema import (
  BATCH_NORM_SHARING,
  ClientObservation,
  ClientTraining,
  Observation,
  WeightArrays,
)

_FORMAT = 'tff-shadow-observation'
_VERSION = 1
_JSON = 'observation.json'
_TENSORS = 'tensors.safetensors'


def write_observation(directory: pathlib.Path, observation: Observation) -> None:
  """Writes `observation` into `directory`; the JSON comes last, so a half-written one is unseen."""
  directory.mkdir(parents=True, exist_ok=True)
  tensors: dict[str, np.ndarray] = {'public/mean_image': observation.public_mean_image}
  _put_weights(tensors, 'global', observation.global_weights)
  _put_weights(tensors, 'aggregate', observation.aggregate)
  for index, client in enumerate(observation.clients):
    _put_weights(tensors, f'client/{index}', client.update)
  save_tensors(directory / _TENSORS, tensors)
  document = {
    'format': _FORMAT,
    'version': _VERSION,
    'tensors_sha256': _sha256(directory / _TENSORS),
    'round': observation.round_num,
    'dataset': observation.dataset,
    'image_shape': list(observation.image_shape),
    'class_names': list(observation.class_names),
    'model_name': observation.model_name,
    'model_config': observation.model_config,
    'batch_norm_sharing': observation.batch_norm_sharing,
    'client_training': dataclasses.asdict(observation.client_training),
    'defense': observation.defense,
    'update_sign': 'trained minus initial',
    'clients': [
      {
        'client_id': client.client_id,
        'num_images': client.num_images,
        'num_steps': client.num_steps,
        'weight': client.weight,
        'dropped': client.dropped,
        **({} if client.batch_size is None else {'batch_size': client.batch_size}),
      }
      for client in observation.clients
    ],
  }
  save_json(directory / _JSON, document)


def read_observation(directory: pathlib.Path) -> Observation:
  """Reads what `write_observation` wrote.

  Raises:
    UserError: If a file is missing, damaged, or of another format or version.
  """
  path = directory / _JSON
  try:
    document = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(f'{directory}: no observation here ({_JSON} is missing)') from error
  except (ValueError, OSError) as error:
    raise UserError(f'{path}: not readable as JSON ({error})') from error
  if not isinstance(document, dict) or document.get('format') != _FORMAT:
    raise UserError(f'{path}: not an observation (its "format" is not {_FORMAT!r})')
  if document.get('version') != _VERSION:
    raise UserError(
      f'{path}: observation version {document.get("version")!r}, this program reads {_VERSION};'
      ' write it again with the same version of tff-shadow'
    )
  tensors = load_tensors(directory / _TENSORS)
  if _sha256(directory / _TENSORS) != document.get('tensors_sha256'):
    raise UserError(f'{directory / _TENSORS}: does not belong to {_JSON} (its digest differs)')
  try:
    return _from_document(document, tensors)
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path}: damaged ({type(error).__name__}: {error})') from error


def _from_document(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> Observation:
  if document['batch_norm_sharing'] not in BATCH_NORM_SHARING:
    raise ValueError(f'batch_norm_sharing {document["batch_norm_sharing"]!r}')
  observation = Observation(
    round_num=int(document['round']),
    dataset=document['dataset'],
    image_shape=tuple(document['image_shape']),
    class_names=tuple(document['class_names']),
    model_name=document['model_name'],
    model_config=document['model_config'],
    batch_norm_sharing=document['batch_norm_sharing'],
    client_training=ClientTraining(**document['client_training']),
    defense=document['defense'],
    global_weights=_take_weights(tensors, 'global'),
    clients=tuple(
      ClientObservation(update=_take_weights(tensors, f'client/{index}'), **client)
      for index, client in enumerate(document['clients'])
    ),
    aggregate=_take_weights(tensors, 'aggregate'),
    public_mean_image=tensors['public/mean_image'],
  )
  expected = [array.shape for array in observation.global_weights.trainable]
  for client in observation.clients:
    if [array.shape for array in client.update.trainable] != expected:
      raise ValueError(f'the update of {client.client_id} does not have the shape of the model')
  if observation.public_mean_image.shape != observation.image_shape:
    raise ValueError('public/mean_image does not have the shape of the images')
  return observation


def save_json(path: pathlib.Path, document: dict[str, Any]) -> None:
  """Writes a JSON file so that a reader sees either the old file or the whole new one."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + '\n')
  os.replace(temporary, path)


def save_tensors(
  path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
  """Writes a safetensors file so that a reader sees either the old file or the whole new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  # safetensors writes the buffer as it lies in memory, so a strided view would be scrambled.
  contiguous = {name: np.asarray(value, order='C') for name, value in tensors.items()}
  save_file(contiguous, temporary, metadata=metadata)
  os.replace(temporary, path)


def load_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a safetensors file; UserError if it is missing or damaged."""
  if not path.is_file():
    raise UserError(f'{path}: no such file')
  try:
    return load_file(path)
  except (SafetensorError, OSError, ValueError) as error:
    raise UserError(f'{path}: not readable as safetensors ({error})') from error


def _put_weights(tensors: dict[str, np.ndarray], prefix: str, weights: WeightArrays) -> None:
  for kind in ('trainable', 'non_trainable'):
    for index, array in enumerate(getattr(weights, kind)):
      tensors[f'{prefix}/{kind}/{index:04d}'] = np.asarray(array)


def _take_weights(tensors: dict[str, np.ndarray], prefix: str) -> WeightArrays:
  def take(kind: str) -> tuple[np.ndarray, ...]:
    start = f'{prefix}/{kind}/'
    return tuple(tensors[name] for name in sorted(tensors) if name.startswith(start))

  weights = WeightArrays(take('trainable'), take('non_trainable'))
  if not weights.trainable:
    raise KeyError(f'{prefix}/trainable')
  return weights


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
