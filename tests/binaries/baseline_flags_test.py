import dataclasses

import pytest
from absl import flags
from absl.testing import flagsaver

from binaries import baseline_flags
from tff_shadow.errors import UserError
from tff_shadow.learning import BASELINES, BaselineDefense


@pytest.fixture(autouse=True)
def _parsed_flags():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['train'])


@pytest.mark.parametrize('name', BASELINES)
def test_every_parameter_has_a_flag_that_reaches_the_defense(name):
  defense = baseline_flags.baseline_defense(name)
  assert defense == BASELINES[name]()
  parameters = dataclasses.asdict(defense)
  assert parameters
  assert defense.public_settings() == {'name': name, **parameters}
  for field, value in parameters.items():
    # Smaller by little is allowed for all of them.
    changed = value - 1 if isinstance(value, int) else 0.9 * value
    with flagsaver.flagsaver(**{f'{name}_{field}': changed}):
      defense = baseline_flags.baseline_defense(name)
    assert dataclasses.asdict(defense) == {**parameters, field: changed}


@pytest.mark.parametrize(
  ('name', 'field', 'value'),
  [
    ('percentile_gaussian', 'sigma0', float('nan')),
    ('percentile_gaussian', 'percentile', 100.1),
    ('top_k', 'fraction', 0.0),
    ('quantization', 'bits', 17),
    ('dp_fedavg', 'clip_norm', 0.0),
    ('dp_fedavg', 'noise_multiplier', -1.0),
    ('dp_sgd', 'clip_norm', float('inf')),
    ('dp_sgd', 'noise_multiplier', -0.5),
    ('soteria', 'percentile', -0.1),
  ],
)
def test_a_bad_parameter_names_its_flag(name, field, value):
  with (
    flagsaver.flagsaver(**{f'{name}_{field}': value}),
    pytest.raises(UserError, match=rf'^--{name}_{field} must be .* found {value}$'),
  ):
    baseline_flags.baseline_defense(name)


def _own(**parameters):
  fields = [(name, type(default), default) for name, default in parameters.items()]
  return dataclasses.make_dataclass(
    'Own', fields, bases=(BaselineDefense,), namespace={'name': 'own'}, frozen=True
  )


def test_a_defence_without_help_texts_has_flags_all_the_same():
  holders = baseline_flags.define_flags('own', _own(share=0.5, bits=3, signs='both', mean=True))
  try:
    assert {name: flag.default for name, flag in holders.items()} == {
      'share': 0.5,
      'bits': 3,
      'signs': 'both',
      'mean': True,
    }
    assert flags.FLAGS['own_share'].help == 'See Own.'
    # As a run's config takes them.
    known = flags.FLAGS.get_key_flags_for_module(baseline_flags.__name__)
    assert flags.FLAGS['own_bits'] in known
  finally:
    for name in holders:
      delattr(flags.FLAGS, f'own_{name}')


def test_a_parameter_that_no_flag_can_have_is_named():
  with pytest.raises(TypeError, match=r'Own\.shares: .* the flag --own_shares'):
    baseline_flags.define_flags('own', _own(shares=()))
