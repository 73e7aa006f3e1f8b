import dataclasses
import json

import numpy as np
import pytest

from attacks.engine import attack_observation
from attacks.presets import PRESETS
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images


@pytest.mark.parametrize('name', [n for n, preset in PRESETS.items() if not preset.needs_generator])
def test_preset_runs_and_is_plain_data(name):
  image = smooth_images(1, (16, 16, 1))
  observation = play_round(small_model((16, 16, 1), batch_norm=False), [(image, [1])])
  config = PRESETS[name].build()
  json.dumps(config.as_dict(), allow_nan=False)
  config = dataclasses.replace(
    config,
    iterations=4,
    xla='off',
    restarts=2,
    # This model has no BatchNorm.
    batch_norm_statistics=dataclasses.replace(config.batch_norm_statistics, weight=0.0),
  )
  result = attack_observation(observation, config)[0]
  assert result.status == 'ok'
  assert result.labels == (1,)
  assert np.isfinite(result.reconstructions['attack']).all()
  assert PRESETS[name].source


def test_line_search_finds_an_image_through_a_smooth_network():
  image = smooth_images(1, seed=4)
  observation = play_round(small_model(activation='sigmoid'), [(image, [1])])
  config = dataclasses.replace(
    PRESETS['idlg'].build(), iterations=120, xla='off', dtype='float64', seed=1
  )
  result = attack_observation(observation, config)[0]
  assert psnr(result.reconstructions['attack'][0], image[0]) > 40
