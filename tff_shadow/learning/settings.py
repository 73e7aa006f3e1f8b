"""The settings of a run that decide its numbers."""

import dataclasses
from typing import Any

from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning.baselines import BaselineDefense
from tff_shadow.learning.noise_settings import ShadowNoise
from tff_shadow.observations import BatchNormSharing, ClientTraining
from tff_shadow.published import PublishedDefense


@dataclasses.dataclass(frozen=True)
class ShadowDefense:
  """Shadow noise in a run.

  Attributes:
    noise: What noise.
    frozen: Whether an image keeps its noise for the whole run. Fresh noise averages out over the
      rounds that a server observes; frozen noise does not, where `ShadowNoise.why_not_frozen` is
      None, and is undone by two rounds elsewhere.
    secrets: Each client's secret, from which its keys come. A server that knows it can subtract the
      noise.
    decoys: Public images, for decoy noise.
  """

  noise: ShadowNoise
  frozen: bool
  secrets: dict[str, bytes]
  decoys: Examples | None = None

  def public_settings(self) -> dict[str, Any]:
    """What an attacker may know: everything but the secrets."""
    return {'name': 'shadow', 'frozen': self.frozen, **dataclasses.asdict(self.noise)}


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
  """Everything that decides the numbers of a run besides its data and its initial model.

  Attributes:
    rounds: Rounds to train.
    clients_per_round: Clients drawn without replacement in each round; None for all.
    client_training: The local training; its learning rate is that of the first rounds.
    learning_rate_drops: Rounds after each of which the clients' learning rate is multiplied by
      `learning_rate_drop_factor`: with (40, 80), rounds 1 to 40 have the full one.
    learning_rate_drop_factor: See above.
    client_batch_sizes: By client id, where its batches are not of the size in `client_training`.
    secure_measurements: Whether the server sees losses, accuracies and counts of the clients only
      as secure sums (`build_weighted_fed_avg`), so that it is not told which client was dropped but
      by an update of zeros. 'distortion' of a baseline stays a plain mean.
    server_learning_rate: Of the server's SGD on the mean update; 1 is plain FedAvg.
    server_momentum: Its momentum, 0 for none.
    batch_norm_sharing: See `build_weighted_fed_avg`.
    observed_rounds: Rounds whose observation is written.
    seed: Decides client sampling and the order of the local training.
    defense: Shadow noise, the published defence, a baseline, or None.
  """

  rounds: int
  client_training: ClientTraining
  clients_per_round: int | None = None
  server_learning_rate: float = 1.0
  server_momentum: float = 0.0
  batch_norm_sharing: BatchNormSharing = 'aggregate'
  observed_rounds: tuple[int, ...] = (1,)
  seed: int = 0
  defense: ShadowDefense | PublishedDefense | BaselineDefense | None = None
  learning_rate_drops: tuple[int, ...] = ()
  learning_rate_drop_factor: float = 0.1
  client_batch_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
  secure_measurements: bool = False

  def __post_init__(self):
    """Raises `UserError` for a schedule of learning rates or a batch size that is none."""
    drops = self.learning_rate_drops
    if any(drop < 1 for drop in drops) or list(drops) != sorted(set(drops)):
      raise UserError(
        f'--client_learning_rate_drops={",".join(map(str, drops))}: use rounds from 1 in rising'
        ' order'
      )
    if not 0 < self.learning_rate_drop_factor < float('inf'):
      raise UserError(
        f'--client_learning_rate_drop_factor={self.learning_rate_drop_factor}: must be a positive'
        ' number'
      )
    for client_id, size in self.client_batch_sizes.items():
      if size < 1:
        raise UserError(f'--client_batch_sizes: {size} for {client_id} must be at least 1')

  def batch_size_of(self, client_id: str) -> int:
    """Images per local step of a client."""
    return self.client_batch_sizes.get(client_id, self.client_training.batch_size)

  def training_in(self, round_num: int) -> ClientTraining:
    """The local training with the learning rate of `round_num`."""
    passed = sum(round_num > drop for drop in self.learning_rate_drops)
    rate = self.client_training.learning_rate * self.learning_rate_drop_factor**passed
    return dataclasses.replace(self.client_training, learning_rate=rate)

  def local_training(self, client_id: str, round_num: int) -> ClientTraining:
    """The local training of one client in one round."""
    return dataclasses.replace(
      self.training_in(round_num), batch_size=self.batch_size_of(client_id)
    )

  @property
  def shadow_defense(self) -> ShadowDefense | None:
    """The defence if it is noise in the round itself."""
    return self.defense if isinstance(self.defense, ShadowDefense) else None

  @property
  def baseline(self) -> BaselineDefense | None:
    """The defence if it is a baseline."""
    return self.defense if isinstance(self.defense, BaselineDefense) else None
