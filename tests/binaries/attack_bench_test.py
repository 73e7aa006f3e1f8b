"""Tests for binaries.attack_bench."""

from binaries.tables import read_rows
from tests.binaries.programs import assert_one_error_line, run, run_all

_FEW = (
  '--datasets=histology_patches',
  '--batches=2',
  '--local_steps=1',
  '--norms=none',
  '--images=2',
)
_HEAD = (
  'dataset,model,batch_norm_sharing,preset,batch,local_steps,image_size,iterations,psnr,ssim,'
  'region_psnr,label_accuracy,control_psnr,ci95_low,ci95_high,images,seconds'
)


def test_goes_on_with_a_table(tmp_path):
  table = tmp_path / 'attacks.csv'
  known = 'histology_patches,conv_small/none,,best,2,1,32,2,99.00,,,,,,,2,1'
  table.write_text(f'# command: an earlier one\n{_HEAD}\n{known}\n')
  ended = run(
    'attack_bench',
    f'--output={table}',
    '--iterations=2',
    '--presets=best,inverting_gradients',
    *_FEW,
  )
  assert ended.returncode == 0, ended.stderr
  first, made = read_rows(table)
  assert first['psnr'] == '99.00'
  assert (made['preset'], made['iterations'], made['images']) == ('inverting_gradients', '2', '2')
  assert 5 < float(made['psnr']) < 40
  assert 5 < float(made['control_psnr']) < 40
  # One client of two images: there is a mean and no interval.
  assert made['ci95_low'] == made['ci95_high'] == ''


def test_bad_flags_are_one_line():
  runs = [
    ('--batches=17',),
    ('--presets=generative',),
    ('--local_steps=3',),
    ('--datasets=cifar',),
  ]
  for ended, arguments in zip(run_all('attack_bench', runs), runs, strict=True):
    assert_one_error_line(ended, arguments[0].partition('=')[0])
