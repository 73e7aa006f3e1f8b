"""(epsilon, delta) where it may be stated, with what it assumes, and a plain no where it may not.

All accounting is dp-accounting's: here is only which mechanism it is. A smaller epsilon is
better; every number errs upward (accountants give upper bounds).
"""

import dataclasses
import math
from typing import Literal

import dp_accounting
from dp_accounting import rdp
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from scipy import optimize

from tff_shadow.data import most_repeats

Unit = Literal['client update (local)', 'client', 'example']
Unproven = Literal[
  'none', 'private region', 'private noise shape', 'image noise', 'published', 'no clipping'
]

_UNPROVEN_REASONS: dict[str, str] = {
  'none': 'the update is sent as it is',
  'private region': (
    'the region map is computed from the private image, so where noise is, and is not, depends on'
    ' what is to be hidden'
  ),
  'private noise shape': (
    "the noise's covariance is computed from the private image, so it tells of the image itself"
  ),
  'image noise': (
    'noise in a region of the image leaves the pixels outside of it exact, and averages out over'
    ' rounds unless it is drawn once for all (privacy/mmse_floor.py bounds what it hides then)'
  ),
  'published': 'the noise of the published method is a deterministic function of image and shadow',
  'no clipping': 'without clipping one client or example can move the result without limit',
}
UNPROVEN: tuple[str, ...] = tuple(_UNPROVEN_REASONS)

_FRESH = 'noise is drawn anew in every round and known to nobody'
_ONLY_UPDATES = 'only the updates are covered: weights, metrics and statistics sent beside are not'
_NOT_TUNED = 'the choice of settings by looking at private data is not counted'


@dataclasses.dataclass(frozen=True)
class Guarantee:
  """What may be stated of a mechanism.

  Attributes:
    epsilon: None where there is no formal guarantee.
    delta: None as above.
    unit: Whose data may be exchanged without being noticed: 'client update (local)', any update of
      one client, against the server; 'client', all data of one client, or 'example', one image,
      against who sees the models. None as above.
    assumptions: Sentences that must all hold.
    reason: Why there is no guarantee; None where there is one.
  """

  epsilon: float | None
  delta: float | None
  unit: Unit | None
  assumptions: tuple[str, ...]
  reason: str | None = None

  def __str__(self) -> str:
    if self.epsilon is None:
      return f'no formal guarantee: {self.reason}'
    statement = f'({self.epsilon:.3g}, {self.delta:g})-differentially private per {self.unit}'
    return f'{statement}, provided that {"; ".join(self.assumptions)}'


def no_guarantee(mechanism: Unproven) -> Guarantee:
  """The statement for everything else: none, and why.

  Args:
    mechanism: One of `UNPROVEN`.

  Raises:
    ValueError: For another mechanism.
  """
  if mechanism not in _UNPROVEN_REASONS:
    raise ValueError(f'mechanism must be one of {UNPROVEN}, found {mechanism!r}')
  return Guarantee(None, None, None, (), _UNPROVEN_REASONS[mechanism])


def public_shape_guarantee(noise_multiplier: float, rounds: int, delta: float) -> Guarantee:
  """Of `public_shadow_noise_factory`, against the server: local differential privacy.

  The Gaussian mechanism in the coordinates Sigma^(-1/2) y, composed over rounds. A client's clipped
  update is replaced by any other, which moves it by at most twice the clipping norm, so the
  multiplier counts half. The value is exact (Balle and Wang 2018, theorem 8).

  Args:
    noise_multiplier: Of the factory, above 0.
    rounds: Rounds in which the client takes part.
    delta: In (0, 1).

  Raises:
    ValueError: If a number is out of range.
  """
  return Guarantee(
    _epsilon(_replaced(noise_multiplier), rounds, 'rounds', delta),
    delta,
    'client update (local)',
    (
      "the noise's shape and the clipping norm are public: computed without private data",
      f'the client takes part in at most {rounds} rounds',
      'that it takes part is no secret',
      _FRESH,
      _ONLY_UPDATES,
      _NOT_TUNED,
    ),
  )


def dp_fed_avg_guarantee(
  noise_multiplier: float, clients_per_round: int, num_clients: int, rounds: int, delta: float
) -> Guarantee:
  """Of `tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed` and `gaussian_adaptive`.

  Client-level, for clients drawn without replacement: one client's data is replaced by any other,
  so that the sum moves by twice the clipping norm and the multiplier counts half. The multiplier of
  `gaussian_adaptive` is the total, its noisy count of clipped clients included (Andrew et al. 2021,
  theorem 1), of which both parts are halved alike. Amplification by sampling is that of Wang, Balle
  and Kasiviswanathan (2019, theorem 27); without it is another valid value, and the smaller counts.

  Args:
    noise_multiplier: As given to TFF, above 0.
    clients_per_round: Drawn in each round.
    num_clients: To draw from.
    rounds: Of training.
    delta: In (0, 1).

  Raises:
    ValueError: If a number is out of range.
  """
  if not 1 <= clients_per_round <= num_clients:
    raise ValueError(
      f'clients_per_round must be from 1 to num_clients = {num_clients}, found {clients_per_round}'
    )
  gaussian = _replaced(noise_multiplier)
  epsilon = _epsilon(gaussian, rounds, 'rounds', delta)
  sampling = 'all clients take part in every round'
  if clients_per_round < num_clients:
    sampling = (
      f'each round draws {clients_per_round} of {num_clients} clients uniformly, without'
      ' replacement and apart from other rounds, and who is drawn stays secret'
    )
    accountant = rdp.RdpAccountant(
      neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    event = dp_accounting.SampledWithoutReplacementDpEvent(num_clients, clients_per_round, gaussian)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
    epsilon = min(epsilon, float(accountant.get_epsilon(delta)))
  return Guarantee(
    epsilon,
    delta,
    'client',
    (
      'the server is trusted: it sees the clipped updates before it adds the noise, so this holds'
      ' against who sees the models, not against the server',
      sampling,
      'the number of clients is public',
      'clients are not weighted',
      _FRESH,
      _ONLY_UPDATES,
      _NOT_TUNED,
    ),
  )


def dp_sgd_guarantee(noise_multiplier: float, uses: int, delta: float) -> Guarantee:
  """Of example-level DP-SGD on one client (Abadi et al. 2016), whatever the order of its examples.

  One example's gradient is left out of every step that uses it. That moves the sum of such a step
  by at most the clipping norm, times how often the example is in its batch, and no other step's.
  Gaussian mechanisms compose by the squares of that, so that a step with an example k times counts
  as k^2 with it once (`example_uses`); the value is exact then (Balle and Wang 2018, theorem 8).
  Nothing is gained from an example's batch being secret: that needs Poisson sampling, and batches
  here are cut from shuffled data, for which its figures do not hold (Chua et al. 2024).

  Args:
    noise_multiplier: Standard deviation of the noise on the sum of clipped gradients, over the
      clipping norm; above 0.
    uses: Local steps of all rounds that one example is in, at most, each counted by `example_uses`.
    delta: In (0, 1).

  Raises:
    ValueError: If a number is out of range.
  """
  return Guarantee(
    _epsilon(_gaussian(noise_multiplier), uses, 'uses', delta),
    delta,
    'example',
    (
      f'an example is in at most {uses} local steps, counted over all rounds; one that has it'
      ' k times counts as k squared',
      'how many examples are in each step is no secret',
      'gradients are clipped per example, with no BatchNorm to mix them',
      _FRESH,
      _ONLY_UPDATES,
      _NOT_TUNED,
    ),
  )


def example_uses(num_examples: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
  """Local steps of a round that one example is in, at most; k times in a step count as k^2.

  Epochs follow each other without a break (`tff_shadow.data.local_training`), so that a batch may
  hold the end of one and the beginning of the next, or several.

  Args:
    num_examples: Of the client.
    batch_size: Examples in a step.
    epochs: Local ones.
    max_steps: At which training is cut; None for no cut.

  Raises:
    ValueError: If a number is below 1.
  """
  if min(num_examples, batch_size, epochs, 1 if max_steps is None else max_steps) < 1:
    raise ValueError('numbers of examples, epochs and steps must be at least 1')
  if num_examples % batch_size == 0:
    together = 1
  elif batch_size % num_examples == 0:
    together = batch_size // num_examples
  else:
    # Epochs that a batch touches if it begins with the last example of one.
    together = (num_examples + batch_size - 2) // num_examples + 1
  times = most_repeats(num_examples, batch_size, epochs, max_steps)
  together = min(together, times)
  full, rest = divmod(times, together)
  return full * together**2 + rest**2


def _gaussian(noise_multiplier: float) -> dp_accounting.GaussianDpEvent:
  if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
    raise ValueError(f'noise_multiplier must be above 0 for a guarantee, found {noise_multiplier}')
  return dp_accounting.GaussianDpEvent(float(noise_multiplier))


def _replaced(noise_multiplier: float) -> dp_accounting.GaussianDpEvent:
  return dp_accounting.GaussianDpEvent(_gaussian(noise_multiplier).noise_multiplier / 2.0)


def _epsilon(event: dp_accounting.GaussianDpEvent, count: int, name: str, delta: float) -> float:
  """Of so many Gaussian mechanisms, which are one of a sqrt(count)-th of the multiplier.

  Solved to a part in 10^9, upward. A privacy loss distribution says the same, in minutes where the
  multiplier is small.
  """
  if count < 1:
    raise ValueError(f'{name} must be at least 1, found {count}')
  if not 0 < delta < 1:
    raise ValueError(f'delta must be in (0, 1), found {delta}')
  shift = math.sqrt(count) / event.noise_multiplier
  mechanism = GaussianPrivacyLoss(1 / shift)
  if mechanism.get_delta_for_epsilon(0.0) <= delta:
    return 0.0
  # The privacy loss is normal of mean shift^2 / 2 and deviation shift, and above this with a
  # probability of less than delta.
  above = shift**2 / 2 + shift * math.sqrt(2 * math.log(1 / delta))
  root = optimize.brentq(
    lambda epsilon: mechanism.get_delta_for_epsilon(epsilon) - delta, 0.0, above, xtol=1e-12
  )
  return root * (1 + 1e-9) + 1e-12
