import csv
import dataclasses
import json

import numpy as np

from attacks.local_steps import local_steps
from binaries import reproduction, reproduction_table
from binaries.published_protocol import Plan, load_data, training_settings
from tests.binaries.programs import assert_one_error_line, run
from tests.conftest import make_generator
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
  assert tuple(written[0]) == reproduction_table.COLUMNS
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
  table = reproduction_table.printed(rows)
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
  # A call for some of the parts leaves the others in the table.
  some = dataclasses.replace(_PLAN, attacks=('best',))
  assert reproduction.run(some, ['none'], tmp_path)[0] == rows
  assert _rows(tmp_path / 'results.csv') == written


def test_published_defense_is_scaled_with_the_rounds(tmp_path):
  settings = PublishedSettings(latents=LatentFit(steps=2), shadow_steps=1, shadow_rounds=50)
  defense = PublishedDefense(settings, make_generator((16, 16, 3)), (0.5,) * 3, (0.2,) * 3)
  plan = dataclasses.replace(_PLAN, scale=0.02, published=lambda data: defense)
  data = load_data(plan)
  found = training_settings(plan, data, 'published')
  assert (found.rounds, found.defense.settings.shadow_rounds) == (2, 1)
  (tmp_path / 'state' / 'round_0_temp1234').mkdir(parents=True)  # A killed call was saving it.
  reproduction.train(plan, data, 'published', tmp_path)
  rows = _rows(tmp_path / 'metrics.csv')
  assert float(rows[0]['shadow/psnr']) > 0
  assert not rows[1]['shadow/psnr']
  assert float(rows[1]['noise/image_rms']) > 0


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
  ended = run('reproduce', f'--output_dir={tmp_path / "x"}', '--dataset=eyepacs')
  assert_one_error_line(ended, '--data_dir is required')
  assert not (tmp_path / 'x').exists()
