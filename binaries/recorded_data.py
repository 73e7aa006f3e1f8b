"""Loads the data that flags name: those of this program, or those that a config.json recorded."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from tff_shadow.data import Examples, FederatedData, Partition, load, load_manifests
from tff_shadow.data.recorded import RECORDED, read_public, recorded_digest
from tff_shadow.errors import UserError

MANIFESTS = ('train_manifest', 'validation_manifest', 'test_manifest', 'image_root')


def load_recorded(values: Mapping[str, Any], *, seed: int) -> FederatedData:
  """Loads what the flags of `binaries.data_flags` name.

  Args:
    values: From the name of each flag to its value.
    seed: Decides the partition and, where a set has no such split, what is held out.

  Raises:
    UserError: Names the flag, file or row at fault.
  """
  if values['dataset'] == 'manifests':
    for name in MANIFESTS:
      if not values[name]:
        raise UserError(f'--{name} is required with --dataset=manifests')
    for name in ('max_examples', 'data_dir'):
      if values[name] is not None:
        raise UserError(f'--{name}: has no use with --dataset=manifests')
    return load_manifests(
      *(values[name] for name in MANIFESTS),
      image_size=values['image_size'],
      partition=Partition.parse(values['partition']),
      seed=seed,
      color=values['color'],
    )
  for name in MANIFESTS:
    if values[name]:
      raise UserError(f'--{name} needs --dataset=manifests')
  return load(
    values['dataset'],
    image_size=values['image_size'],
    partition=Partition.parse(values['partition']),
    seed=seed,
    data_dir=values['data_dir'],
    color=values['color'],
    max_examples=values['max_examples'],
  )


@dataclasses.dataclass(frozen=True)
class RunData:
  """What attacks and audits take of the data of a run.

  Attributes:
    name: Of the data set.
    image_shape: (H, W, C).
    public: Images that no client trained on: the validation split.
    client_images: By client, how many it has.
  """

  name: str
  image_shape: tuple[int, int, int]
  public: Examples
  client_images: dict[str, int]


def load_data_of(run_dir: pathlib.Path, config: Mapping[str, Any]) -> RunData:
  """Loads the data of a run again.

  Args:
    run_dir: The run.
    config: Its config.json.

  Raises:
    UserError: If they have changed, or cannot be loaded.
  """
  if config.get('program') == RECORDED:
    public, client_images = read_public(run_dir), config.get('client_images', {})
    digest = recorded_digest(public, client_images)
    found = RunData(config['dataset'], public.images.shape[1:], public, client_images)
  else:
    data = load_recorded(config['flags'], seed=config['flags']['seed'])
    digest = data.digest()
    client_images = {name: len(own) for name, own in data.clients.items()}
    found = RunData(data.name, tuple(data.image_shape), data.validation, client_images)
  if digest != config['data_sha256']:
    raise UserError(
      f'--run_dir={run_dir}: the data are not those of the run any more (other SHA-256)'
    )
  return found
