"""What the attacker knows, in plain sentences for reports."""

from collections.abc import Sequence

from attacks.batch_norm_statistics import statistics_can_be_matched
from attacks.config import AttackConfig
from attacks.generators import GenerativePrior
from attacks.initialization import MeanImageStart
from attacks.local_steps import local_steps
from attacks.matching import NoMatching
from tff_shadow.models import model_from_config, random_layers
from tff_shadow.observations import ClientObservation, Observation

_PRIORS = {
  'total_variation': 'total variation',
  'image_norm': 'small pixel values',
  'group_consistency': 'the agreement of restarts',
  'gaussian_images': 'a Gaussian fitted to public images of the modality',
}


def threat_model(
  observation: Observation,
  config: AttackConfig,
  *,
  labels_known: bool,
  num_rounds: int = 1,
  only_aggregate: bool = False,
) -> list[str]:
  """What an attack with these settings uses, one fact a sentence."""
  training = observation.client_training
  facts = [
    'The attacker is an honest-but-curious server: it follows the protocol and keeps what it sees.',
    f'It knows the architecture ({observation.model_name}) and the global weights that it sent in'
    f' round {observation.round_num}.',
    'It sees only the mean update of all clients, after any defence.'
    if only_aggregate
    else 'It sees the update of each single client, as sent after any defence.',
    f'It knows the local training: {training.optimizer}, learning rate {training.learning_rate:g},'
    f' batch size {_batch_sizes(observation)}, and how many images and steps each client used.',
  ]
  if num_rounds > 1:
    facts.append(f'It has kept {num_rounds} rounds in which a client trained on the same images.')
  if labels_known:
    facts.append('It has been told the labels of the images: a stronger attacker than usual.')
  else:
    facts.append(f'It infers the labels from the gradient (rule {config.label_rule!r}).')
  if config.joint_labels:
    facts.append('It optimises the labels together with the images.')
  if isinstance(config.parametrization, GenerativePrior):
    facts.append('It has a generator of images of the same modality.')
  elif not config.parametrization.invertible:
    facts.append('It draws the images with an untrained network.')
  elif isinstance(config.start, MeanImageStart):
    facts.append('It starts at the mean of public images of the same modality.')
  else:
    facts.append(f'It starts at random images ({config.start.name}).')
  if isinstance(config.matching, NoMatching):
    facts.append('It does not compare updates, only what its prior names.')
  if config.simulation == 'between':
    facts.append('It does not use how the local steps went, only where they led.')
  is_ordered = any(local_steps(client, training).is_ordered for client in observation.clients)
  if is_ordered and config.tries_orders:
    facts.append(
      f'It tries up to {config.orders} orders in which a client may have gone through its images.'
    )
  priors = [_PRIORS[prior.name] for prior in config.image_priors]
  if (
    config.batch_norm_statistics.weight
    and not only_aggregate
    and statistics_can_be_matched(observation)
  ):
    priors.append('the BatchNorm statistics that the client shared')
  facts.append(f'Its prior is {", ".join([*priors, "pixel values within the known range"])}.')
  if config.hold_contrast:
    facts.append(
      'Where the update does not show how much contrast an image has, it assumes that of the public'
      ' mean image.'
    )
  facts.append('It does not use what is public of the defence: it attacks as if there were none.')
  return facts


def _batch_sizes(observation: Observation) -> str:
  sizes = {client.images_per_step(observation.client_training) for client in observation.clients}
  if len(sizes) < 2:
    return str(*sizes or (observation.client_training.batch_size,))
  return f'{min(sizes)} to {max(sizes)} (that of each client)'


def random_training(observation: Observation) -> str | None:
  """Why no simulation is that of the clients, whose model draws at random; None if it does not."""
  random = random_layers(model_from_config(observation.model_config))
  if not random:
    return None
  return (
    f'layer {random[0]!r} of the model draws at random in training, and the attack does not know'
    ' what the clients drew: it fits their updates less well than one that tries to find that out'
  )


def warnings(
  observation: Observation,
  clients: Sequence[ClientObservation],
  config: AttackConfig,
  num_rounds: int = 1,
) -> list[str]:
  """Where the simulation is less than exact, one line a kind.

  Args:
    observation: The first round.
    clients: Those of it that are attacked.
    config: Of the attack.
    num_rounds: That are attacked jointly.
  """
  several = [client for client in clients if client.num_steps > 1]
  found = [unlike] if (unlike := random_training(observation)) else []
  if config.simulation == 'between':
    if not several:
      return found
    return [
      *found,
      f'{len(several)} of {len(clients)} clients took more than one local step'
      f' ({several[0].client_id} among them): one gradient between their old and new weights stands'
      ' for all steps, which is not exact',
    ]
  steps = [local_steps(client, observation.client_training) for client in several]
  ordered = [client for client, own in zip(several, steps, strict=True) if own.is_ordered]
  if ordered:
    tries = config.tries_orders
    chosen = f'the best of up to {config.orders} is taken' if tries else 'one is assumed'
    found.append(
      f'{len(ordered)} of {len(clients)} clients took several steps on parts of their images'
      f' ({ordered[0].client_id} among them), in an order that the server is not told: {chosen}'
    )
  if num_rounds > 1 and ordered:
    found.append(
      'from the second round on, in which the order is another, one gradient between old and new'
      ' weights stands for all steps of these clients, which is not exact'
    )
  return found
