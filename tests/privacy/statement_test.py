import pytest

from tff_shadow.privacy import (
  Participation,
  dp_fed_avg_guarantee,
  dp_sgd_guarantee,
  guarantee_of,
)

_PARTICIPATION = Participation(10, 4, 16, uses=3)
_SHADOW = {
  'name': 'shadow',
  'shape': 'correlated',
  'strength': {'kind': 'scale', 'value': 0.1},
  'saliency': {'kind': 'given'},
  'propagation': 'per_step',
}


@pytest.mark.parametrize(
  ('defense', 'word'),
  [
    ({'name': 'none'}, 'as it is'),
    ({'name': 'published'}, 'deterministic'),
    ({'name': 'top_k', 'fraction': 0.1}, 'without clipping'),
    (_SHADOW, 'covariance'),
    ({**_SHADOW, 'saliency': {'kind': 'gradcam_pp'}}, 'region map'),
    ({**_SHADOW, 'propagation': 'images'}, 'region of the image'),
    ({**_SHADOW, 'shape': 'isotropic'}, 'without clipping'),
    (
      {**_SHADOW, 'shape': 'isotropic', 'strength': {'kind': 'ratio', 'value': 1.0}},
      'covariance',
    ),
    ({**_SHADOW, 'shape': 'decoy', 'saliency': {'kind': 'gradcam_pp'}}, 'without clipping'),
    ({**_SHADOW, 'shape': 'decoy', 'strength': {'kind': 'ratio', 'value': 1.0}}, 'covariance'),
    ({'name': 'dp_sgd', 'noise_multiplier': 0.0, 'clip_norm': 1.0}, 'without clipping'),
  ],
)
def test_what_has_no_guarantee_says_why(defense, word):
  guarantee = guarantee_of(defense, _PARTICIPATION, 1e-5)
  assert guarantee.epsilon is None
  assert word in str(guarantee)


def test_differential_privacy_is_accounted_for_every_use_of_an_image():
  dp_sgd = {'name': 'dp_sgd', 'noise_multiplier': 20.0, 'clip_norm': 1.0}
  assert guarantee_of(dp_sgd, _PARTICIPATION, 1e-5) == dp_sgd_guarantee(20.0, 30, 1e-5)
  dp_fed_avg = {'name': 'dp_fedavg', 'noise_multiplier': 2.0, 'clip_norm': 1.0}
  guarantee = guarantee_of(dp_fed_avg, _PARTICIPATION, 1e-5)
  assert guarantee == dp_fed_avg_guarantee(2.0, 4, 16, 10, 1e-5)
  assert 'not against the server' in str(guarantee)
