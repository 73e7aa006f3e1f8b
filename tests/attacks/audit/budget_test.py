import dataclasses

from attacks.audit.budget import BUDGETS


def test_less_of_what_the_knowing_attacker_has_is_named():
  default = BUDGETS['default']
  assert default.less_than(default) == BUDGETS['thorough'].less_than(default) == []
  reduced = dataclasses.replace(default, denoiser_steps=0, inversion_clients=100)
  assert reduced.less_than(default) == ['--denoiser_steps=0', '--inversion_clients=100']
  assert '--calibration_clients=0' in BUDGETS['quick'].less_than(default)


def test_a_budget_includes_a_smaller_one_but_not_other_attacks():
  default = BUDGETS['default']
  fewer = dataclasses.replace(default, inversion_clients=200)
  assert default.includes(default)
  assert default.includes(fewer)
  assert not fewer.includes(default)
  assert BUDGETS['thorough'].includes(default)
  assert not default.includes(dataclasses.replace(fewer, presets=('dlg',)))
