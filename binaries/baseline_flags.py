"""The flags of the baseline defences: --NAME_PARAMETER for each parameter of --defense=NAME."""

import dataclasses

from absl import flags

from tff_shadow.errors import UserError
from tff_shadow.learning import BASELINES, BaselineDefense

_HELP = {
  'percentile_gaussian': {
    'sigma0': 'Standard deviation of the noise over the percentile.',
    'percentile': "Of the magnitudes of a client's update, from 0 to 100.",
  },
  'top_k': {'fraction': 'Of the entries of an update that are sent, the largest ones.'},
  'quantization': {'bits': 'Per entry of an update, from 1 to 16.'},
  'dp_fedavg': {
    'clip_norm': "Of a client's update.",
    'noise_multiplier': 'Standard deviation of the noise on the sum of updates over the clipping'
    ' norm. The server adds it, so the server sees the clipped updates without.',
  },
  'dp_sgd': {
    'clip_norm': "Of one image's gradient.",
    'noise_multiplier': "Standard deviation of the noise on the sum of a batch's gradients over the"
    ' clipping norm.',
  },
  'soteria': {
    'percentile': 'Of the features whose gradients in the last layer are pruned, from 0 to 100.',
  },
}

_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
_FLAGS = {
  name: {
    field.name: _DEFINE[field.type](f'{name}_{field.name}', field.default, _HELP[name][field.name])
    for field in dataclasses.fields(baseline)
  }
  for name, baseline in BASELINES.items()
}


def baseline_defense(name: str) -> BaselineDefense:
  """The baseline `name` with the parameters that the flags say.

  Raises:
    UserError: Names the flag that is out of range.
  """
  try:
    return BASELINES[name](**{field: flag.value for field, flag in _FLAGS[name].items()})
  except ValueError as error:
    raise UserError(f'--{name}_{error}') from error
