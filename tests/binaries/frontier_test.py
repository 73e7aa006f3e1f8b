"""What the frontier takes for granted, and its joined rows."""

import numpy as np
import pytest
import tensorflow as tf

from binaries.attacked_rounds import parse_baseline, parse_defense
from tests.binaries.programs import assert_one_error_line, run_all
from tff_shadow.aggregators import NOISE_SHAPES, NoiseStrength
from tff_shadow.aggregators.shadow_noise import DEFAULT_FLOOR, noised_update
from tff_shadow.errors import UserError
from tff_shadow.learning import DpSgd, Quantization, Soteria


@pytest.mark.parametrize('shape', NOISE_SHAPES)
def test_noise_of_a_ratio_is_proportional_to_it(shape):
  rng = np.random.default_rng(0)
  update = [tf.constant(rng.standard_normal(s), tf.float32) for s in ((3, 4), (5,))]
  value = {
    'update': update,
    'noise_key': tf.constant([3, 4]),
    'image_energy': tf.constant(0.0),
    'shape': [tf.square(t) + 0.1 for t in update],
    'region_energy': tf.constant(0.0),
    'region_fourth_moment': tf.constant(0.0),
    'sensitivity_energy': tf.constant(0.0),
    'decoy_energy': tf.constant(5.0),
  }
  noises = []
  for ratio in (1.0, 0.3):
    noised, _ = noised_update(value, shape, NoiseStrength('ratio', ratio), DEFAULT_FLOOR)
    noises.append([(a - b).numpy() for a, b in zip(noised, update, strict=True)])
  for whole, part in zip(*noises, strict=True):
    np.testing.assert_allclose(0.3 * whole, part, rtol=1e-4, atol=1e-6)


def test_bad_flags():
  wrong = [
    '--datasets=mnist',
    '--strengths=-1',
    '--strengths=norm:1',
    '--strengths=scale:3+clip:1',
    '--strengths=scale:3+floor:1',
    '--parts=all',
    '--baselines=top_k/fraction:2',
    '--baselines=dp_sgd/noise_multiplier:1',
    '--learning_rates=nan',
    '--learning_rates=fast',
  ]
  for ended, flag in zip(run_all('frontier', [[flag] for flag in wrong]), wrong, strict=True):
    assert_one_error_line(ended, flag)


def test_rows_are_joined_and_drawn(tmp_path):
  cache = tmp_path / 'cache'
  cache.mkdir()
  utility = ['dataset,seed,shape,strength,freshness,norm,learning_rate,f1,validation_f1']
  protection = ['dataset,seed,shape,strength,image,psnr,region_psnr']
  for seed in (0, 1):
    utility += [f'chest_phantom,{seed},none,0,frozen,batch,0.1,0.9{seed}00,0.5 0.82 0.9']
    utility += [f'chest_phantom,{seed},correlated,0.3,frozen,batch,0.1,0.8900,0.5 0.7 0.7']
    utility += [f'chest_phantom,{seed},correlated,scale:0.1,frozen,batch,0.1,0.9000,0.5 0.7 0.9']
    utility += [f'chest_phantom,{seed},top_k,fraction:0.1,fresh,batch,0.1,0.8800,0.5 0.7 0.9']
    for image in (0, 1):
      protection += [f'chest_phantom,{seed},none,0,{image},{30 + image},{28 + image}']
      for defense in ('correlated,0.3', 'correlated,scale:0.1', 'top_k,fraction:0.1'):
        row = f'chest_phantom,{seed},{defense},{image},{20 + image},{12 + image}'
        protection.append(row)
  # Not attacked.
  utility += [
    f'chest_phantom,2,{own},batch,0.1,0.9000,0.9' for own in ('none,0,frozen', 'decoy,3,fresh')
  ]
  (cache / 'utility.csv').write_text('\n'.join(utility) + '\n')
  (cache / 'protection.csv').write_text('\n'.join(protection) + '\n')
  # Caches that were lost leave the table as it is, and new rows stand on it.
  later = tmp_path / 'later'
  later.mkdir()
  new = 'chest_phantom,1,correlated,0.3,fresh,batch,0.1,0.9000,0.5 0.7 0.9'
  (later / 'utility.csv').write_text(f'{utility[0]}\n{new}\n')
  table, plot = tmp_path / 't.csv', tmp_path / 't.png'
  copied = tmp_path / 'copied.csv'
  runs = [
    [f'--cache_dir={cache}', f'--output={table}', f'--plot={plot}', '--parts='],
    [f'--cache_dir={cache}', f'--output={copied}', f'--plot={plot}', '--parts='],
    [f'--cache_dir={later}', f'--output={copied}', f'--plot={plot}', '--parts='],
  ]
  for ended in run_all('frontier', runs):
    assert ended.returncode == 0, ended.stderr
  lines = table.read_text().splitlines()
  assert len(lines) == 2 + 10
  assert lines[1].startswith(
    'dataset,shape,freshness,strength,seed,norm,learning_rate,f1,f1_undefended,'
    'validation_f1,validation_f1_undefended,rounds_to_90,'
  )
  for defense, measured in {
    'none,frozen,0,1': '0.9100,0.9100,0.9000,0.9000,2,30.50,28.50',
    'correlated,frozen,0.3,0': '0.8900,0.9000,0.7000,0.9000,,20.50,12.50',
  }.items():
    assert f'chest_phantom,{defense},batch,0.1,{measured},30.50,28.50,2' in lines
  assert lines[-1] == 'chest_phantom,decoy,fresh,3,2,batch,0.1,0.9000,0.9000,0.9000,0.9000,1,,,,,'
  assert plot.stat().st_size > 5000
  assert copied.read_text().splitlines()[1:] == [
    *lines[1:],
    'chest_phantom,correlated,fresh,0.3,1,batch,0.1,0.9000,0.9100,0.9000,0.9000,3,20.50,12.50,30.50,28.50,2',
  ]


def test_bad_defenses_of_the_adaptive_table():
  wrong = {
    'diagonal/-1': 'strength must be',
    'diagonal/images:0.1': 'images is no strength of diagonal noise',
    'diagonal/scale:0.1': 'scale is no strength of diagonal noise',
    'decoy/images:0.1': 'images is no strength of decoy noise',
    'square/1.0': 'use some of isotropic, diagonal, correlated, decoy, percentile_gaussian',
    'top_k/0.1': 'use top_k/fraction:VALUE',
    'top_k/fraction:2': 'fraction must be above 0 and at most 1, found 2.0',
    'quantization/bits:4.5': "bits must be of type int, found '4.5'",
  }
  endings = run_all('adaptive_table', [[f'--defenses={text}'] for text in wrong])
  for ended, (text, message) in zip(endings, wrong.items(), strict=True):
    assert_one_error_line(ended, f'--defenses={text.replace("square/1.0", "square")}', message)


def test_baselines_by_one_parameter():
  assert parse_defense('soteria/percentile:80', baselines=True) == ('soteria', 'percentile:80')
  assert parse_defense('decoy/scale:3') == ('decoy', 'scale:3')
  with pytest.raises(UserError, match='--defenses=top_k: use some of isotropic, diagonal, corr'):
    parse_defense('top_k/fraction:0.1')  # There are no bounds of it.
  assert parse_baseline('soteria', 'percentile:80') == Soteria(80.0)
  assert parse_baseline('quantization', 'bits:4') == Quantization(4)
  assert parse_baseline('dp_sgd', 'noise_multiplier:0.1') == DpSgd(1.0, 0.1)
  assert parse_baseline('dp_sgd', 'clip_norm:3+noise_multiplier:0.1') == DpSgd(3.0, 0.1)
  with pytest.raises(ValueError, match='use dp_sgd/clip_norm:VALUE or'):
    parse_baseline('dp_sgd', 'clip_norm:3+clip_norm:4')
