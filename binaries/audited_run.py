"""What an audit reads of a run of tff-shadow-train, or of rounds of another program."""

import collections
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attacks.adaptive.attacker import named
from attacks.local_steps import local_steps
from attacks.scoring.results import read_json
from attacks.sources import attacks_digest
from binaries import run_directory
from binaries.recorded_data import RunData, load_data_of
from tff_shadow.data.recorded import RECORDED
from tff_shadow.errors import UserError
from tff_shadow.learning import ShadowNoise
from tff_shadow.observations import (
  Observation,
  Truth,
  observation_path,
  observed_rounds,
  read_round,
  truth_path,
)
from tff_shadow.privacy import Participation, example_uses
from tff_shadow.published.client_state import image_digests

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


class Seen(NamedTuple):
  """One observed round, the clients to attack, and the truth about them."""

  observation: Observation
  truth: dict[str, Truth]
  clients: tuple[str, ...]


class AuditedRun:
  """One run.

  Attributes:
    config: Its config.json.
    defense: `Observation.defense`.
    seen: The rounds to audit.
    recurring: Ids of the clients, of those of the first of them, that can be attacked in all
      jointly: they trained on the same images in each, all at once in every step.
  """

  def __init__(self, run_dir: pathlib.Path, rounds: Sequence[str] | None, max_clients: int):
    """Reads observations and truth.

    Args:
      run_dir: Of the run.
      rounds: Numbers of observed rounds; all by default.
      max_clients: At most so many of a round, those with the fewest images first.

    Raises:
      UserError: If it is no run with these rounds observed, or damaged.
    """
    self._run_dir = run_dir
    self.config = run_directory.read_config(run_dir)
    if self.config.get('program') not in ('train', RECORDED):
      raise UserError(
        f'--run_dir={run_dir}: is neither a run of tff-shadow-train nor one of recorded rounds'
      )
    self.seen = [self._read(number, max_clients) for number in self._numbers(rounds)]
    self.defense = self.seen[0].observation.defense
    attacked = dict.fromkeys(name for own in self.seen for name in own.clients)
    # A round's truth is in the order of its own first use: images are known by their digests.
    self._used = {
      name: [
        image_digests(own.truth[name].images) if _has(own, name) else None for own in self.seen
      ]
      for name in attacked
    }
    self.recurring = [name for name in self.seen[0].clients if not self._why_apart(name)]

  @property
  def training(self) -> dict[str, Any]:
    """What runs that are compared by their usefulness have in common."""
    return {name: self.config['flags'].get(name) for name in _TRAINING_FLAGS}

  def data(self) -> RunData:
    """Loads the data set again; UserError if it has changed."""
    return load_data_of(self._run_dir, self.config)

  def digests(self) -> dict[str, Any]:
    """What an audit that goes on must find as it was: the rounds, what was seen, what attacks."""
    sha = hashlib.sha256()
    for own in self.seen:
      number = own.observation.round_num
      paths = sorted(observation_path(self._run_dir, number).iterdir())
      for path in (*paths, truth_path(self._run_dir, number)):
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return {
      'audited_rounds': [own.observation.round_num for own in self.seen],
      'observations_sha256': sha.hexdigest(),
      'attacks_sha256': attacks_digest(),
    }

  def utility(self, undefended_dir: str | None) -> dict[str, Any]:
    """What test.json says of the run, and of an undefended one from the same start.

    Raises:
      UserError: If that is another training, or has not ended.
    """
    own, other = _test(self._run_dir), None
    if undefended_dir:
      other = self._undefended_test(pathlib.Path(undefended_dir))
    return {'test': own, 'undefended': other}

  def participation(self, data: RunData) -> Participation:
    """How often an image is used at most."""
    values, training = self.config['flags'], self.seen[0].observation.client_training
    # Any client may be drawn, not only those of the rounds that were kept.
    batch_sizes = [training.batch_size] * len(data.client_images)
    if values.get('client_batch_sizes'):
      batch_sizes = [int(size) for size in values['client_batch_sizes'].split('/')]
    return Participation(
      rounds=values['rounds'],
      clients_per_round=values['clients_per_round'] or len(data.client_images),
      num_clients=len(data.client_images),
      uses=max(
        example_uses(images, size, training.local_epochs, training.max_local_steps)
        for images, size in zip(data.client_images.values(), batch_sizes, strict=True)
      ),
    )

  def scope(self) -> dict[str, str]:
    """What was audited, in words."""
    observation, clients = self.seen[0].observation, self.seen[0].clients
    training = observation.client_training
    attacked = [observation.client(name) for name in clients]
    numbers = ', '.join(str(own.observation.round_num) for own in self.seen)
    return {
      'Data set': f'{observation.dataset}, SHA-256 {self.config["data_sha256"][:16]}…',
      'Model': (
        f'{observation.model_name}, SHA-256 of the start {self.config["model_sha256"][:16]}…'
      ),
      'Rounds audited': f'{numbers} of {self.config["flags"]["rounds"]}',
      'Clients attacked': f'{len(clients)} of {len(observation.clients)}, the smallest first',
      'Images and steps of a client in a round': (
        f'{_span([own.num_images for own in attacked])} images,'
        f' {_span([own.num_steps for own in attacked])} steps'
      ),
      'Local training': (
        f'{training.optimizer}, learning rate {training.learning_rate:g}, batches of'
        f' {training.batch_size}, {training.local_epochs} epochs'
      ),
      'BatchNorm statistics': observation.batch_norm_sharing,
      'Losses, accuracies and counts of clients': (
        'of single clients' if self._measures_single_clients() else 'secure sums over a round'
      ),
      'Defence': defense_words(self.defense),
      'Seed of the training': str(self.config['flags'].get('seed', 'not recorded')),
    }

  def separate(self, rounds: Sequence[str] | None) -> list[Seen]:
    """Those of `seen` that --separate_rounds names; all by default, and nothing where it is empty.

    Raises:
      UserError: If it names another round, or leaves nothing to audit.
    """
    known = {own.observation.round_num: own for own in self.seen}
    if rounds is not None and len(known) > 1 and not any(map(str.strip, rounds)):
      if not self.recurring:
        raise UserError(
          '--separate_rounds: name some, as no client trained on the same images in all rounds, all'
          ' at once in each step, so that they cannot be attacked jointly'
        )
      return []
    return [known[number] for number in _chosen('separate_rounds', rounds, sorted(known))]

  def apart(self, separate: Sequence[Seen]) -> list[str]:
    """Of what the server saw and no attack did, in sentences.

    That is what several rounds show together of images, where they are not attacked jointly, and
    what a round shows of clients that are attacked neither in it nor jointly.

    Args:
      separate: The rounds that are attacked one by one.
    """
    reasons: dict[str, list[str]] = {}
    for name, used in self._used.items():
      seen = collections.Counter(image for images in used for image in set(images or ()))
      why = self._why_apart(name)
      if why and max(seen.values(), default=0) > 1:
        reasons.setdefault(why, []).append(name)
    found = [
      f'Several rounds show the same images of {named(names)}, and these rounds were not attacked'
      f' together: {why}.'
      for why, names in reasons.items()
    ]
    if self._measures_single_clients():
      found.append(
        'The server also saw the training loss and accuracy of single clients, on their images'
        ' without noise, and no attack used them (--secure_measurements of the training, with'
        ' several clients a round).'
      )
    missing = self.config['flags']['rounds'] - len(self.seen)
    if missing > 0:
      found.append(
        f'{missing} of the {self.config["flags"]["rounds"]} rounds of the training were not audited'
        ' (--observed_rounds of the training, --rounds): the server sees all of them, and may see'
        ' more in them together.'
      )
    attacked = {own.observation.round_num for own in separate}
    for own in self.seen:
      left = [name for name in own.clients if name not in self.recurring]
      if left and own.observation.round_num not in attacked:
        found.append(f'Round {own.observation.round_num} was not attacked for {named(left)}.')
    return found

  def _measures_single_clients(self) -> bool:
    """Whether what is measured of a client is seen without that of others."""
    # Runs from before there was the flag have none.
    secure = self.config['flags'].get('secure_measurements', False)
    return not secure or any(len(own.observation.clients) < 2 for own in self.seen)

  def _numbers(self, rounds: Sequence[str] | None) -> list[int]:
    known = observed_rounds(self._run_dir)
    if not known:
      raise UserError(f'--run_dir={self._run_dir}: no observed round; train with --observed_rounds')
    return _chosen('rounds', rounds, known)

  def _why_apart(self, name: str) -> str:
    """Why a client cannot be attacked in all rounds jointly; empty if it can."""
    for own, images in zip(self.seen, self._used[name], strict=True):
      if images is None:
        return f'no part in round {own.observation.round_num}'
    if any(sorted(images) != sorted(self._used[name][0]) for images in self._used[name]):
      return 'other images in some of the rounds'
    if not all(_takes_all_at_once(own.observation, name) for own in self.seen):
      return 'steps on parts of the images, in an order that is another in each round'
    if name not in self.seen[0].clients:
      return f'not among those attacked in round {self.seen[0].observation.round_num}'
    return ''

  def _read(self, number: int, max_clients: int) -> Seen:
    observation, truth = read_round(self._run_dir, number)
    # The smallest clients are the worst off.
    known = sorted(
      (client for client in observation.clients if client.client_id in truth),
      key=lambda client: (client.num_images, client.client_id),
    )
    if not known:
      raise UserError(
        f'{self._run_dir}: the truth of round {number} has no client of its observation'
      )
    return Seen(observation, truth, tuple(own.client_id for own in known[:max_clients]))

  def _undefended_test(self, other_dir: pathlib.Path) -> dict[str, Any]:
    config = run_directory.read_config(other_dir)
    flag = f'--undefended_run_dir={other_dir}'
    for name in ('data_sha256', 'model_sha256'):
      if config[name] != self.config[name]:
        raise UserError(f'{flag}: has another {name} than the run')
    for name, value in self.training.items():
      other = config['flags'].get(name)
      if other != value:
        raise UserError(f'{flag}: was trained with --{name}={other}, the run with {value}')
    if config['flags']['defense'] != 'none':
      raise UserError(f'{flag}: was trained with a defence')
    test = _test(other_dir)
    if test is None:
      raise UserError(f'{flag}: has no test.json; it has not ended')
    return test


def _has(seen: Seen, name: str) -> bool:
  known = {client.client_id for client in seen.observation.clients}
  return name in known and name in seen.truth


def _takes_all_at_once(observation: Observation, name: str) -> bool:
  """Whether each step of a client saw each of its images equally often: then they have no order."""
  return not local_steps(observation.client(name), observation.client_training).is_ordered


def _chosen(flag: str, rounds: Sequence[str] | None, known: list[int]) -> list[int]:
  """The rounds that a flag names, all of `known` if it is not given."""
  if rounds is None:
    return known
  wanted = set()
  for text in rounds or ['']:
    if not text.strip().isdecimal() or int(text) not in known:
      raise UserError(f'--{flag}={text}: use some of {", ".join(map(str, known))}')
    wanted.add(int(text))
  return sorted(wanted)


def _test(run_dir: pathlib.Path) -> dict[str, Any] | None:
  path = run_dir / 'test.json'
  return read_json(path) if path.exists() else None


def defense_words(defense: Mapping[str, Any]) -> str:
  """Name and settings in force; of those that have a kind, what kind and how much."""
  words = []
  for key, value in defense.items():
    if key == 'frozen':
      words.append('frozen' if value else 'drawn anew in each round')
    elif key != 'name' and key not in _idle_settings(defense):
      words.append(f'{_spoken(key)} {_told(value)}')
  return f'{defense["name"]}: {", ".join(words)}' if words else defense['name']


def _told(value: Any) -> str:
  if isinstance(value, Mapping):
    if 'kind' in value:
      return ' '.join(str(value[part]) for part in ('kind', 'value') if part in value)
    return f'({", ".join(f"{_spoken(part)} {_told(own)}" for part, own in value.items())})'
  if isinstance(value, list | tuple):
    return ' and '.join(map(str, value)) or 'none'
  if value is None:
    return 'by its own rule'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  return str(value)


def _spoken(name: str) -> str:
  return name.replace('_', ' ')


def _idle_settings(defense: Mapping[str, Any]) -> set[str]:
  """Settings of shadow noise that do nothing for its shape."""
  if defense['name'] != 'shadow':
    return set()
  noise = ShadowNoise.from_public_settings(defense)
  used = {
    'decoys': noise.needs_decoys,
    'decoy_augmentations': noise.needs_decoys,
    'floor': noise.shape != 'isotropic' and not noise.in_images,
    'saliency': noise.needs_shadow,
    'propagation': noise.needs_shadow,
    'epsilon': noise.needs_shadow and noise.propagation == 'local_training',
    'probes': noise.measures_images or (noise.needs_shadow and noise.shape != 'correlated'),
    'local_epochs': noise.needs_decoys or noise.strength.kind in ('image_ratio', 'region_psnr'),
  }
  return {name for name, is_used in used.items() if not is_used}


def _span(values: Sequence[int]) -> str:
  least, most = min(values), max(values)
  return str(least) if least == most else f'{least} to {most}'
