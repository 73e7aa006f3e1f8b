"""What the attacker knows, in plain sentences for reports."""

from collections.abc import Sequence

from attacks.config import AttackConfig
from attacks.initialization import MeanImageStart
from tff_shadow.observations import ClientObservation, Observation


def threat_model(
  observation: Observation, config: AttackConfig, *, labels_known: bool
) -> list[str]:
  """What an attack with these settings uses, one fact a sentence."""
  training = observation.client_training
  facts = [
    'The attacker is an honest-but-curious server: it follows the protocol and keeps what it sees.',
    f'It knows the architecture ({observation.model_name}) and the global weights that it sent in'
    f' round {observation.round_num}.',
    'It sees the update of each single client, as sent after any defence.',
    f'It knows the local training: {training.optimizer}, learning rate {training.learning_rate:g},'
    f' batch size {training.batch_size}, and how many images and steps each client used.',
  ]
  if labels_known:
    facts.append('It has been told the labels of the images: a stronger attacker than usual.')
  else:
    facts.append('It infers the labels from the gradient of the last layer.')
  if isinstance(config.start, MeanImageStart):
    facts.append('It starts at the mean of public images of the same modality.')
  else:
    facts.append(f'It starts at random images ({config.start.name}).')
  facts.append('Its prior is total variation and pixel values within the known range.')
  facts.append('It does not use what is public of the defence: it attacks as if there were none.')
  return facts


def warnings(clients: Sequence[ClientObservation]) -> list[str]:
  """Where the simulation is less than exact, one line a kind."""
  several = [client.client_id for client in clients if client.num_steps > 1]
  if not several:
    return []
  return [
    f'{len(several)} of {len(clients)} clients took more than one local step'
    f' ({several[0]} among them): their mean gradient over the steps is matched as if it were one'
    ' step on all their images, which is not exact'
  ]
