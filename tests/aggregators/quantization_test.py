import numpy as np
import pytest

from tests.aggregators.sent_updates import sent_updates
from tff_shadow.aggregators import quantization_factory


def _send(bits, updates, rounds=1):
  return sent_updates(lambda inner: quantization_factory(bits, inner), updates, rounds)


@pytest.mark.parametrize('bits', [0, -3, 17])
def test_bits(bits):
  with pytest.raises(ValueError, match='bits must be'):
    quantization_factory(bits)


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  @pytest.mark.parametrize('bits', [1, 3])
  def test_levels_are_even_and_rounding_is_unbiased(self, bits):
    # Every value 20,000 times, in two clients and rounds.
    values = np.linspace(-0.7, 1.1, 10)
    update = [np.repeat(values, 5000).reshape(100, 500), np.array([3.0, 3.0])]
    sent, output = _send(bits, [update, update], rounds=2)
    steps = 2**bits - 1
    step = 1.8 / steps
    drawn = np.stack([own[0] for own in sent])
    positions = (drawn + 0.7) / step
    np.testing.assert_allclose(positions, np.round(positions), atol=1e-4)
    assert set(np.unique(np.round(positions))) <= set(range(steps + 1))
    assert np.abs(drawn - update[0]).max() < step
    by_value = drawn.reshape(4, 10, 5000).transpose(1, 0, 2).reshape(10, -1)
    fraction = (values + 0.7) / step % 1.0
    deviation = step * np.sqrt(fraction * (1 - fraction))
    bias = np.abs(by_value.mean(axis=1) - values)
    assert np.all(bias < 5 * deviation / np.sqrt(20_000) + 1e-6)
    np.testing.assert_allclose(by_value.std(axis=1), deviation, rtol=0.05, atol=1e-5)
    # A tensor of one value is sent as it is.
    for own in sent:
      np.testing.assert_array_equal(own[1], 3.0)
    errors = (drawn - update[0]).reshape(4, -1)
    norm = np.sqrt(np.sum(update[0] ** 2) + 18.0)
    expected = np.linalg.norm(errors[2:], axis=1).mean() / norm
    assert output.measurements['distortion'] == pytest.approx(expected, rel=1e-3)
    # Clients and rounds round apart from each other.
    assert np.abs(np.corrcoef(errors) - np.eye(4)).max() < 5 / np.sqrt(50_000)

  def test_tensors_round_apart_and_what_is_not_finite_is_zeros(self):
    tensor = np.linspace(-1.0, 1.0, 5000)
    sent, _ = _send(2, [[tensor, tensor], [np.zeros(5000), tensor * np.nan]])
    first, second = (own - tensor for own in sent[0])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(5000)
    assert not np.any(sent[1])
