import pytest

from tff_shadow.aggregators import NoiseStrength
from tff_shadow.learning import ShadowNoise
from tff_shadow.shadow import SaliencyConfig


def _noise(shape, kind, saliency='given'):
  return ShadowNoise(shape, NoiseStrength(kind, 20.0), SaliencyConfig(saliency))


@pytest.mark.parametrize('kind', ['scale', 'region_psnr'])
@pytest.mark.parametrize('saliency', ['given', 'uniform'])
def test_frozen_noise_holds_in_regions_and_of_a_strength_that_stay_the_same(kind, saliency):
  assert _noise('correlated', kind, saliency).why_not_frozen is None


@pytest.mark.parametrize(
  ('noise', 'why'),
  [
    (_noise('isotropic', 'scale'), 'one draw'),
    (_noise('diagonal', 'scale'), 'one draw'),
    (_noise('decoy', 'scale'), 'one draw'),
    (_noise('correlated', 'ratio'), 'two strengths'),
    (_noise('correlated', 'image_ratio'), 'two strengths'),
    (_noise('correlated', 'scale', 'gradcam_pp'), 'two maps'),
    (_noise('correlated', 'region_psnr', 'saliency'), 'two maps'),
  ],
)
def test_other_frozen_noise_is_given_away_by_two_rounds(noise, why):
  assert why in noise.why_not_frozen
