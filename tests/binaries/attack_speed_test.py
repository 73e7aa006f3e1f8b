"""The parts of the speed comparison that need no torch."""

import dataclasses

import numpy as np
import pytest

from attacks.benchmark import TimedAttack
from attacks.priors import TotalVariation
from binaries import attack_speed


@pytest.fixture(scope='module')
def attack():
  return TimedAttack('conv_small', 8, attack_speed._ATTACK, lanes=2)


def test_the_written_problem_has_all_weights_and_needs_no_pickle(attack, tmp_path):
  attack_speed.write_problem(tmp_path / 'p.npz', 'conv_small', attack)
  with np.load(tmp_path / 'p.npz', allow_pickle=False) as file:
    arrays = dict(file)
  weights = [array for name, array in arrays.items() if '.' in name]
  assert len(weights) == len(attack.model.trainable_variables)
  np.testing.assert_array_equal(arrays['conv3.kernel'], attack.model.get_layer('conv3').kernel)
  np.testing.assert_array_equal(arrays['starts'], attack.starts)
  assert str(arrays['model']) == 'conv_small'


def test_same_arguments_give_the_same_problem(attack):
  again = TimedAttack('conv_small', 8, attack_speed._ATTACK, lanes=2)
  attack_speed.check_agreement(attack.evaluate(), again.evaluate())


def test_another_attack_is_found_out(attack):
  losses, gradients = attack.evaluate()
  attack_speed.check_agreement((losses, gradients), (losses * (1 + 5e-5), gradients * 2))
  with pytest.raises(RuntimeError, match='losses'):
    attack_speed.check_agreement((losses, gradients), (losses * 1.001, gradients))
  with pytest.raises(RuntimeError, match='gradients'):
    attack_speed.check_agreement((losses, gradients), (losses, gradients[:, :, ::-1]))
  with pytest.raises(RuntimeError, match='gradients'):
    attack_speed.check_agreement((losses, gradients), (losses, gradients * np.nan))
  # One lane that differs is enough.
  other = dataclasses.replace(attack_speed._ATTACK, total_variation=TotalVariation(9.0))
  mixed = gradients.copy()
  mixed[1] = TimedAttack('conv_small', 8, other, lanes=2).evaluate()[1][1]
  with pytest.raises(RuntimeError, match='gradients'):
    attack_speed.check_agreement((losses, gradients), (losses, mixed))


def test_contestants_run_in_turn_but_for_hopeless_ones():
  calls = []

  def contestant(name, seconds):
    def run(iterations):
      calls.append((name, iterations))
      return seconds * iterations + len(calls), 0.0

    return run

  contestants = {
    'ours, a': contestant('a', 100.0),
    'ours, b': contestant('b', 1000.0),
    'torch, c': contestant('c', 1000.0),
  }
  seconds = attack_speed.take_turns(contestants, 5, 2)
  assert calls[6:] == [('a', 5), ('c', 5), ('a', 5), ('c', 5)]
  assert list(seconds) == ['ours, a', 'torch, c']
  np.testing.assert_array_equal(seconds['torch, c'][:, 0], [5008, 5010])


def test_ratio_is_the_median_of_the_turns_of_the_two_fastest():
  seconds = {
    'ours, plain': np.array([[1.0, 1.0], [2.0, 1.0], [9.0, 1.0]]),
    'ours, XLA': np.array([[5.0, 1.0]] * 3),
    'torch, loop': np.array([[2.0, 2.0], [8.0, 2.0], [3.0, 2.0]]),
    'torch, vmap': np.array([[4.0, 0.1]] * 3),
  }
  lines = attack_speed.report('some_case', seconds, 2)
  assert lines[-1] == 'BENCH attack_over_torch_some_case 0.50'
  assert lines[1] == '#   ours, plain: 1000.0, 500.0; 500.0'
  assert 'ours, plain over torch, loop: 0.50 of the elapsed, 0.50 of the CPU' in lines[-2]
