import numpy as np
import pytest
from scipy import stats

from tests.aggregators.sent_updates import sent_updates
from tff_shadow.aggregators import percentile_noise_factory


def _send(sigma0, percentile, updates, rounds=1):
  return sent_updates(
    lambda inner: percentile_noise_factory(sigma0, percentile, inner), updates, rounds
  )


class TestArguments:
  @pytest.mark.parametrize('sigma0', [-0.1, float('nan'), float('inf')])
  def test_sigma0(self, sigma0):
    with pytest.raises(ValueError, match='sigma0 must be'):
      percentile_noise_factory(sigma0)

  @pytest.mark.parametrize('percentile', [-1.0, 100.5, float('nan')])
  def test_percentile(self, percentile):
    with pytest.raises(ValueError, match='percentile must be'):
      percentile_noise_factory(0.1, percentile)


@pytest.mark.usefixtures('tff_worker')
class TestExecution:
  @pytest.mark.parametrize('percentile', [50.0, 95.0])
  def test_scale_is_that_of_the_percentile_of_what_is_not_zero(self, percentile):
    rng = np.random.default_rng(0)
    # Zeros would pull a percentile of all entries down; the two tensors differ in scale.
    updates = [
      [scale * rng.normal(size=(40, 100)) * (rng.random((40, 100)) < 0.5), rng.normal(size=3000)]
      for scale in (1.0, 30.0)
    ]
    sent, output = _send(0.2, percentile, updates)
    distortions = []
    for update, own in zip(updates, sent, strict=True):
      flat = np.concatenate([np.ravel(tensor) for tensor in update]).astype(np.float32)
      noise = np.concatenate([np.ravel(tensor) for tensor in own]) - flat
      sigma = 0.2 * np.percentile(np.abs(flat[flat != 0]), percentile)
      # Standard error 0.85 %.
      assert noise.std() == pytest.approx(sigma, rel=0.04)
      assert abs(noise.mean()) < 5 * sigma / np.sqrt(noise.size)
      assert stats.kstest(noise / sigma, 'norm').pvalue > 1e-4
      distortions.append(np.linalg.norm(noise) / np.linalg.norm(flat))
    assert output.measurements['distortion'] == pytest.approx(np.mean(distortions), rel=1e-4)

  def test_noise_is_each_client_s_and_round_s_own(self):
    update = [np.random.default_rng(1).normal(size=4000)]
    sent, _ = _send(0.5, 95.0, [update, update], rounds=2)
    correlations = np.corrcoef([own[0] - update[0] for own in sent]) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)

  def test_a_client_that_was_dropped_gets_no_noise(self):
    sent, _ = _send(0.5, 95.0, [[np.zeros(50)], [np.full(50, np.nan)], [np.ones(50)]])
    assert not np.any(sent[0])
    assert not np.any(sent[1])
    assert np.std(sent[2]) > 0.1
