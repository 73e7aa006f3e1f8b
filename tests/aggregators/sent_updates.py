"""What clients send through a factory, for the tests of those that change updates."""

import collections

import numpy as np
import tensorflow_federated as tff

from tff_shadow.aggregators import observation_tap_factory

FLOAT = tff.types.TensorType(np.float32)
UPDATE_TYPE = tff.types.to_type(
  collections.OrderedDict(b=(np.float32, (2, 3)), a=[np.float32, (np.float32, (4,))])
)


def sent_updates(build, updates, rounds=1):
  """Runs rounds of a factory on updates that are lists of arrays, one list per client.

  Args:
    build: From the inner factory to the factory under test.
    updates: As many tensors for each client, of the same shapes.
    rounds: Each with the same updates.

  Returns:
    What each client sent, as a list of float64 arrays, one round after another; and the output of
    the last round.
  """
  updates = [[np.asarray(tensor, np.float32) for tensor in update] for update in updates]
  factory = build(observation_tap_factory(tff.aggregators.SumFactory()))
  process = factory.create(tff.types.to_type([(np.float32, t.shape) for t in updates[0]]))
  state, sent = process.initialize(), []
  for _ in range(rounds):
    output = process.next(state, updates)
    state = output.state
    stacked = output.measurements['inner']['observation']['updates']
    sent += [[t[index].astype(np.float64) for t in stacked] for index in range(len(updates))]
  return sent, output
