"""Nothing of a single client reaches the server where sums are secure, and the sums are right."""

import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tests.attacks.observed_rounds import small_model
from tff_shadow.aggregators import NoiseStrength, top_k_factory
from tff_shadow.learning import (
  ShadowNoise,
  build_shadow_fed_avg,
  build_weighted_fed_avg,
  keras_model_fn,
)
from tff_shadow.models import model_from_config, model_to_config
from tff_shadow.shadow import SaliencyConfig

_SHAPE = (8, 8, 1)
_SGD = tff.learning.optimizers.build_sgdm(0.1)


def _process(kind, **kwargs):
  model = small_model(_SHAPE, norm='none', seed=3)
  config = model_to_config(model)
  model_fn = keras_model_fn(model, _SHAPE)
  if kind == 'plain':
    return build_weighted_fed_avg(model_fn, _SGD, **kwargs)
  return build_shadow_fed_avg(
    model_fn,
    _SGD,
    noise=ShadowNoise('correlated', NoiseStrength('ratio', 0.3), SaliencyConfig('given')),
    shadow_model_fn=lambda: model_from_config(config),
    **kwargs,
  )


def _client(seed, pixel=0.0, region=1.0):
  rng = np.random.default_rng(seed)
  images = rng.random((8, *_SHAPE)).astype(np.float32)
  images[0, 0, 0] += pixel
  examples = collections.OrderedDict(
    x=images,
    y=rng.integers(0, 2, 8).astype(np.int32),
    noise_key=rng.integers(0, 2**30, (8, 2)).astype(np.int32),
    region=np.full((8, *_SHAPE[:2], 1), region, np.float32),
  )
  return tf.data.Dataset.from_tensor_slices(examples).batch(4)


class TestTypes:
  @pytest.mark.parametrize('kind', ['plain', 'shadow'])
  def test_nothing_of_single_clients(self, kind):
    secure = tff.learning.secure_aggregator()
    process = _process(kind, model_aggregator=secure, secure_measurements=True)
    tff.test.assert_not_contains_unsecure_aggregation(process.next)

  def test_nothing_of_single_clients_that_change_their_update(self):
    process = _process(
      'plain',
      model_aggregator=top_k_factory(
        0.5, tff.learning.secure_aggregator(), secure_measurements=True
      ),
      secure_measurements=True,
    )
    tff.test.assert_not_contains_unsecure_aggregation(process.next)

  def test_simulations_see_them(self):
    process = _process('plain', model_aggregator=tff.learning.secure_aggregator())
    with pytest.raises(AssertionError):
      tff.test.assert_not_contains_unsecure_aggregation(process.next)


@pytest.mark.usefixtures('tff_worker')
def test_secure_measurements_are_the_plain_ones():
  clients = [_client(1), _client(2, pixel=np.nan), _client(3, region=0.0), _client(4)]
  plain, secured = (
    process.next(process.initialize(), clients)
    for process in (_process('shadow', secure_measurements=flag) for flag in (False, True))
  )
  work, secure_work = (output.metrics['client_work'] for output in (plain, secured))
  np.testing.assert_array_equal(work['non_finite'], [0, 1, 0, 0])
  assert (secure_work['non_finite'], secure_work['maps_fell_back']) == (1, 8)
  assert work['maps_fell_back'] == 8
  for name in ('loss', 'num_examples'):
    assert secure_work['train'][name] == pytest.approx(work['train'][name], abs=1e-3)
  noise, secure_noise = (output.metrics['aggregator'] for output in (plain, secured))
  assert secure_noise['fell_back'] == noise['fell_back']
  assert secure_noise['sent_norm'] == pytest.approx(noise['sent_norm'], abs=2e-6)
  for one, other in zip(
    plain.state.global_model_weights.trainable,
    secured.state.global_model_weights.trainable,
    strict=True,
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)
