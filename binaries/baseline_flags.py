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

_DEFINE = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}


def define_flags(name: str, baseline: type[BaselineDefense]) -> dict[str, flags.FlagHolder]:
  """Defines --NAME_PARAMETER for each parameter of a baseline; returns them by parameter.

  Raises:
    TypeError: If a parameter has no default that a flag can have.
  """
  holders = {}
  for field in dataclasses.fields(baseline):
    if type(field.default) not in _DEFINE:
      raise TypeError(
        f'{baseline.__name__}.{field.name}: needs a default of the type bool, int, float or str, to'
        f' be the flag --{name}_{field.name}'
      )
    words = _HELP.get(name, {}).get(field.name, f'See {baseline.__name__}.')
    define = _DEFINE[type(field.default)]
    holders[field.name] = define(f'{name}_{field.name}', field.default, words)
  return holders


_FLAGS = {name: define_flags(name, baseline) for name, baseline in BASELINES.items()}


def baseline_defense(name: str) -> BaselineDefense:
  """The baseline `name` with the parameters that the flags say.

  Raises:
    UserError: Names the flag that is out of range.
  """
  try:
    return BASELINES[name](**{field: flag.value for field, flag in _FLAGS[name].items()})
  except ValueError as error:
    raise UserError(f'--{name}_{error}') from error
