import dataclasses

import pytest

from binaries import published_protocol
from binaries.published_protocol import Plan
from tff_shadow.errors import UserError

_PLAN = Plan('histology_patches', None, 16, model='conv_small', scale=0.05)


def test_scale_one_is_the_published_protocol():
  plan = Plan('chestxray', '/data', 224)
  assert (plan.rounds, plan.learning_rate_drops) == (100, (40, 80))
  assert plan.observed_rounds == (1, 25, 50, 75, 100)
  config = published_protocol.attack_config(plan, 'shadow_pixels', (224, 224, 3))
  assert (config.iterations, config.schedule.warm_up, config.lanes) == (40_000, 100, 1)
  half = dataclasses.replace(plan, scale=0.5, image_size=32)
  assert (half.rounds, half.learning_rate_drops) == (50, (20, 40))
  assert half.observed_rounds == (1, 12, 25, 38, 50)
  config = published_protocol.attack_config(half, 'best', (32, 32, 3))
  assert (config.iterations, config.lanes) == (250, 16)


def test_protocol_of_the_clients():
  data = published_protocol.load_data(_PLAN)
  assert [len(own) for own in data.clients.values()] == [1, 2, 6, 26, 1, 2, 6, 26, 1]
  settings = published_protocol.training_settings(_PLAN, data, 'none')
  assert list(settings.client_batch_sizes.values()) == [4, 4, 4, 4, 8, 8, 8, 8, 1]
  assert settings.learning_rate_drops == (2, 4)
  rates = [settings.training_in(r).learning_rate for r in (2, 3, 5)]
  assert rates == pytest.approx([1e-2, 1e-3, 1e-4])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'dataset': 'mnist'}, '--dataset=mnist: use one of chestxray, eyepacs'),
    ({'dataset': 'eyepacs'}, '--data_dir is required with --dataset=eyepacs'),
    ({'scale': 0.0}, '--scale=0.0: must be above 0'),
    ({'scale': float('nan')}, '--scale=nan'),
    ({'attacks': ('dlg',)}, '--attacks=dlg: use some of'),
    ({'attacks': ('shadow_generator',)}, '--attacks=shadow_generator: needs --generator'),
  ],
)
def test_plans_that_cannot_be_carried_out(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(_PLAN, **changes)


def test_too_few_images_name_the_scale():
  with pytest.raises(UserError, match=r'--scale=1\.0: .*1361 training examples.*; lower it'):
    published_protocol.load_data(dataclasses.replace(_PLAN, scale=1.0))
