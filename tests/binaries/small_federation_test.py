import types

import pytest

from binaries import small_federation
from tff_shadow.learning import TrainingSettings


@pytest.mark.parametrize('sharing', ['local', 'aggregate'])
def test_f1_is_the_mean_over_the_last_third_of_the_rounds(tiny_data, monkeypatch, sharing):
  estimated, scores = [], iter([0.5, 0.7, 0.9])
  monkeypatch.setattr(
    small_federation, 'estimate_batch_norm_statistics', lambda *args: estimated.append(args)
  )
  monkeypatch.setattr(small_federation, 'evaluate', lambda *args: {'f1': next(scores)})
  settings = TrainingSettings(
    9, small_federation.UTILITY_TRAINING, seed=0, batch_norm_sharing=sharing
  )
  f1 = small_federation.UtilityF1(tiny_data, None, settings)
  for number in range(1, 10):
    f1(types.SimpleNamespace(round_num=number, metrics={'validation/f1': number / 10}))
  assert f1.test == pytest.approx(0.7)
  assert f1.validation == [number / 10 for number in range(1, 10)]
  # The global statistics are there without any estimate.
  assert len(estimated) == (3 if sharing == 'local' else 0)


def test_there_is_always_a_last_round():
  assert [small_federation.num_last(rounds) for rounds in (1, 2, 3, 60)] == [1, 1, 1, 20]
