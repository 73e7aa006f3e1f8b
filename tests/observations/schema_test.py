import numpy as np
import pytest

from tff_shadow.observations import ClientObservation, WeightArrays, mean_update


def _client(name, weight, *values):
  arrays = tuple(np.full((2, 3), value, np.float32) for value in values)
  return ClientObservation(name, 1, 1, weight, WeightArrays(arrays[:1], arrays[1:]))


@pytest.mark.parametrize(('weights', 'expected'), [((1.0, 3.0), 3.5), ((0.0, 0.0), 3.0)])
def test_clients_count_as_much_as_they_weigh(weights, expected):
  clients = [_client('a', weights[0], 2.0, -2.0), _client('b', weights[1], 4.0, -4.0)]
  mean = mean_update(clients)
  for arrays, sign in ((mean.trainable, 1), (mean.non_trainable, -1)):
    np.testing.assert_allclose(arrays[0], np.full((2, 3), sign * expected))
    assert arrays[0].dtype == np.float32


def test_statistics_that_nobody_shares_have_no_mean():
  assert mean_update([_client('a', 1.0, 2.0)]).non_trainable == ()
