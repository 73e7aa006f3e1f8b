import numpy as np
import pytest

from tests.aggregators.sent_updates import sent_updates
from tff_shadow.aggregators import top_k_factory


def _send(fraction, updates):
  sent, output = sent_updates(lambda inner: top_k_factory(fraction, inner), updates)
  return [np.concatenate([np.ravel(tensor) for tensor in own]) for own in sent], output


@pytest.mark.parametrize('fraction', [0.0, -0.5, 1.01, float('nan')])
def test_fraction(fraction):
  with pytest.raises(ValueError, match='fraction must be'):
    top_k_factory(fraction)


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  def test_sends_the_largest_entries_of_the_whole_update(self):
    rng = np.random.default_rng(0)
    updates = [[rng.normal(size=(10, 10)), 0.3 * rng.normal(size=50)] for _ in range(2)]
    sent, output = _send(0.1, updates)
    distortions = []
    for own, update in zip(sent, updates, strict=True):
      flat = np.concatenate([np.ravel(tensor) for tensor in update]).astype(np.float32)
      expected = np.where(np.abs(flat) >= np.sort(np.abs(flat))[-15], flat, 0.0)
      np.testing.assert_array_equal(own, expected)
      distortions.append(np.linalg.norm(own - flat) / np.linalg.norm(flat))
    assert output.measurements['distortion'] == pytest.approx(np.mean(distortions), rel=1e-4)

  def test_the_fraction_is_exact_with_ties_and_at_its_ends(self):
    ties = [np.array([1.0, -2.0, 2.0, 2.0, -2.0]), np.array([2.0, 0.5, 1.0, -2.0, 0.1])]
    sent, _ = _send(0.3, [ties, [np.zeros(5), np.zeros(5)], [np.full(5, np.nan), np.ones(5)]])
    np.testing.assert_array_equal(sent[0], [0, -2, 2, 2, 0, 0, 0, 0, 0, 0])
    assert not sent[1].any()
    assert not sent[2].any()

  @pytest.mark.parametrize(('fraction', 'kept'), [(1e-6, 1), (1.0, 10)])
  def test_ends(self, fraction, kept):
    update = np.arange(1.0, 11.0)
    sent, _ = _send(fraction, [[update]])
    np.testing.assert_array_equal(sent[0], np.where(update > 10 - kept, update, 0.0))
