import dataclasses

import pytest

from binaries.audited_run import defense_words
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.learning import ShadowNoise

_RATIO = NoiseStrength('image_ratio', 100.0)


@pytest.mark.parametrize(
  ('noise', 'words'),
  [
    (ShadowNoise('isotropic', _RATIO), 'shape isotropic, strength image_ratio 100.0, probes 8'),
    (
      ShadowNoise('decoy', NoiseStrength('scale', 3.0)),
      'shape decoy, strength scale 3.0, floor 0.99, local epochs 1, decoys 32, decoy augmentations'
      ' shifts and brightness',
    ),
    (
      ShadowNoise('correlated', NoiseStrength('scale', 0.1), propagation='images'),
      'strength scale 0.1, saliency gradcam_pp, propagation images',
    ),
    (
      ShadowNoise('diagonal', _RATIO, propagation='local_training'),
      'probes 8, epsilon 0.1, floor 0.01',
    ),
  ],
)
def test_tells_the_settings_in_force_alone(noise, words):
  told = defense_words({'name': 'shadow', 'frozen': False, **dataclasses.asdict(noise)})
  assert told.startswith('shadow: drawn anew in each round, shape ')
  assert words in told
  assert ('floor' in told) == (noise.shape != 'isotropic' and not noise.in_images)
  assert ('decoy' in told) == (noise.shape == 'decoy')


def test_other_defences_are_told_whole():
  assert defense_words({'name': 'none'}) == 'none'
  assert defense_words({'name': 'top_k', 'fraction': 0.1}) == 'top_k: fraction 0.1'
