import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from attacks.local_steps import local_steps
from binaries import reproduction
from binaries.reproduction import Plan
from tests.conftest import make_generator
from tff_shadow.errors import UserError
from tff_shadow.models import build_model
from tff_shadow.observations import (
  ClientObservation,
  ClientTraining,
  WeightArrays,
  read_observation,
)
from tff_shadow.published import PublishedDefense, PublishedSettings
from tff_shadow.shadow.latents import LatentFit

_PLAN = Plan(
  'histology_patches',
  None,
  16,
  model='conv_small',
  scale=0.01,
  attacks=('shadow_pixels_released', 'best'),
  max_iterations=3,
)


def _rows(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def test_scale_one_is_the_published_protocol():
  plan = Plan('chestxray', '/data', 224)
  assert (plan.rounds, plan.learning_rate_drops) == (100, (40, 80))
  assert plan.observed_rounds == (1, 25, 50, 75, 100)
  config = reproduction.attack_config(plan, 'shadow_pixels', (224, 224, 3))
  assert (config.iterations, config.schedule.warm_up, config.lanes) == (40_000, 100, 1)
  half = dataclasses.replace(plan, scale=0.5, image_size=32)
  assert (half.rounds, half.learning_rate_drops) == (50, (20, 40))
  assert half.observed_rounds == (1, 12, 25, 38, 50)
  config = reproduction.attack_config(half, 'best', (32, 32, 3))
  assert (config.iterations, config.lanes) == (250, 16)


def test_protocol_of_the_clients():
  plan = dataclasses.replace(_PLAN, scale=0.05)
  data = reproduction.load_data(plan)
  assert [len(own) for own in data.clients.values()] == [1, 2, 6, 26, 1, 2, 6, 26, 1]
  settings = reproduction.training_settings(plan, data, 'none')
  assert list(settings.client_batch_sizes.values()) == [4, 4, 4, 4, 8, 8, 8, 8, 1]
  assert settings.learning_rate_drops == (2, 4)
  rates = [settings.training_in(r).learning_rate for r in (2, 3, 5)]
  assert rates == pytest.approx([1e-2, 1e-3, 1e-4])


def test_a_client_as_one_step_on_one_batch():
  update = WeightArrays((np.full(3, 6.0, np.float32),), (np.full(2, 5.0, np.float32),))
  client = ClientObservation('a', 10, 3, 10.0, update, batch_size=4)
  training = ClientTraining('sgd', 1e-2, 0.0, 8, 1, None)
  one = reproduction.as_one_step(client, training)
  np.testing.assert_array_equal(one.update.trainable[0], 2)
  np.testing.assert_array_equal(one.update.non_trainable[0], 5)
  assert local_steps(one, training).is_single
  assert (one.num_images, one.num_steps) == (4, 1)
  single = dataclasses.replace(client, num_images=4, num_steps=1)
  assert reproduction.as_one_step(single, training) is single


def test_the_whole_experiment_and_that_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
  rows, utility = reproduction.run(_PLAN, ['none'], tmp_path)
  written = _rows(tmp_path / 'results.csv')
  assert tuple(written[0]) == reproduction.COLUMNS
  assert len(written) == len(rows) == 2 * 2 * (1 + 9)
  overall = {(row['attack'], row['scoring']): row for row in rows if row['client'] == 'all'}
  assert set(overall) == {
    (attack, scoring) for attack in _PLAN.attacks for scoring in ('strict', 'lenient')
  }
  for (attack, _), row in overall.items():
    # One batch of five images at four for the published attack; ours simulates the two steps.
    assert row['images'] == 7 + (4 if attack != 'best' else 5) + 5
    assert row['failed'] == 0
    for name in ('psnr', 'ssim', 'region_psnr', 'rdlv', 'iip_1', 'control_psnr'):
      assert np.isfinite(row[name])
    assert row['lpips'] is None
    assert 0 <= row['iip_1'] <= row['iip_3'] <= row['iip_5'] <= 1
  assert 0 <= utility[0]['accuracy'] <= 1
  assert _rows(tmp_path / 'utility.csv')[0]['defense'] == 'none'
  run_dir = tmp_path / 'none'
  observation = read_observation(run_dir / 'observations' / 'round_00001')
  assert [client.num_steps for client in observation.clients] == [1, 1, 1, 2, 1, 1, 1, 1, 1]
  config = json.loads(
    (run_dir / 'attacks' / 'shadow_pixels_released_round_00001' / 'config.json').read_text()
  )
  sentences = ' '.join(config['threat_model'])
  assert 'told the labels' in sentences
  assert 'It takes client_03 as if one step' in sentences
  table = reproduction.printed(rows)
  assert 'shadow_pixels_released' in table
  assert 'lpips' not in table

  # Nothing is done twice; what is missing is made again.
  (run_dir / 'attacks' / 'best_round_00001' / 'rows.json').unlink()

  def never(*args, **kwargs):
    raise AssertionError('done already')

  monkeypatch.setattr(reproduction, 'TrainingRun', never)
  monkeypatch.setattr(reproduction, 'attack_observation', never)
  again, _ = reproduction.run(_PLAN, ['none'], tmp_path)
  assert again == rows


def test_published_defense_is_scaled_with_the_rounds(tmp_path):
  settings = PublishedSettings(latents=LatentFit(steps=2), shadow_steps=1, shadow_rounds=50)
  defense = PublishedDefense(settings, make_generator((16, 16, 3)), (0.5,) * 3, (0.2,) * 3)
  plan = dataclasses.replace(_PLAN, scale=0.02, published=lambda data: defense)
  data = reproduction.load_data(plan)
  found = reproduction.training_settings(plan, data, 'published')
  assert (found.rounds, found.defense.settings.shadow_rounds) == (2, 1)
  reproduction.train(plan, data, 'published', tmp_path)
  rows = _rows(tmp_path / 'metrics.csv')
  assert float(rows[0]['shadow/psnr']) > 0
  assert not rows[1]['shadow/psnr']
  assert float(rows[1]['noise/image_rms']) > 0


def test_regions_come_from_the_trained_model_where_a_set_has_none(tmp_path):
  data = reproduction.load_data(_PLAN)
  model = build_model('conv_small', image_shape=(16, 16, 3), num_classes=2, norm='batch', seed=0)
  model.save(tmp_path / 'model.keras')
  images = data.test.float_images()[:3]
  record = {'target': 'a', 'images': 3, 'labels': [], 'status': 'ok'}
  whole = np.ones((3, 16, 16, 1), np.float32)
  target = reproduction.results.Target('a', record, {}, images, np.zeros(3, np.int32), whole)
  found = reproduction.AttackResult(tmp_path, 'x', {}, (target,))
  regions = reproduction._with_regions(found, tmp_path, data).targets[0].regions
  assert regions.shape == whole.shape
  assert 0.2 < regions.mean() < 0.4


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
    reproduction.load_data(dataclasses.replace(_PLAN, scale=1.0))


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
  command = [sys.executable, '-m', 'binaries.reproduce', f'--output_dir={tmp_path / "x"}']
  done = subprocess.run(
    [*command, '--dataset=eyepacs'], capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith('error: --data_dir is required')
  assert not (tmp_path / 'x').exists()
