"""What the attacker knows, in plain sentences for reports."""

from collections.abc import Sequence

from attacks.config import AttackConfig
from attacks.initialization import MeanImageStart
from attacks.local_steps import local_steps
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


def warnings(
  observation: Observation, clients: Sequence[ClientObservation], config: AttackConfig
) -> list[str]:
  """Where the simulation is less than exact, one line a kind."""
  several = [client for client in clients if client.num_steps > 1]
  if config.simulation == 'between':
    if not several:
      return []
    return [
      f'{len(several)} of {len(clients)} clients took more than one local step'
      f' ({several[0].client_id} among them): one gradient between their old and new weights stands'
      ' for all steps, which is not exact'
    ]
  training = observation.client_training
  guessed = [client for client in several if not local_steps(client, training).is_exact]
  if not guessed:
    return []
  return [
    f'{len(guessed)} of {len(clients)} clients went through their images more than once'
    f' ({guessed[0].client_id} among them): the order of the first time is taken for all, which the'
    ' server cannot know'
  ]
