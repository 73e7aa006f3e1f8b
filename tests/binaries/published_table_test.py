import csv
import itertools

import pytest
from absl import flags
from absl.testing import flagsaver

from binaries import published_table
from tff_shadow.errors import UserError


@pytest.fixture(autouse=True)
def _parsed_flags():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['published_table'])


def _protection(variant, region_psnrs, scoring='strict'):
  return [
    {
      'dataset': 'chest_phantom',
      'seed': str(image // 2),
      'variant': variant,
      'norm': 'batch',
      'attack': 'best',
      'scoring': scoring,
      'image': str(image % 2),
      'psnr': '20.0',
      'ssim': '0.5',
      'region_psnr': value,
      'region_ssim': '0.25',
    }
    for image, value in enumerate(region_psnrs)
  ]


def test_rows_are_paired_with_no_defense():
  protection = [
    *_protection('none', ['30', '20', '26', '24']),
    *_protection('published', ['28', '19', '23', '20']),
    *_protection('white_noise', ['20', '', '20', '20']),
    *_protection('published', ['5', '5', '5', '5'], scoring='lenient'),
  ]
  utility = [
    {'dataset': 'chest_phantom', 'seed': seed, 'variant': variant, 'f1': value}
    for seed, variant, value in (
      ('0', 'published', '0.8'),
      ('1', 'published', '0.9'),
      ('0', 'none', '0.82'),
      ('1', 'none', '0.91'),
    )
  ]
  cost = [{'dataset': 'chest_phantom', 'learning': '3.10', 'later': '1.20'}]
  rows = published_table._join(protection, utility, cost)
  found = {(row['defense'], row['ablation'], row['scoring']): row for row in rows}
  clean = found['none', '', 'strict']
  assert (clean['region_psnr'], clean['ci95_low'], clean['f1']) == ('25.000', '', '0.8650')
  assert clean['f1_change'] == ''
  own = found['published', '', 'strict']
  assert own['region_psnr'] == '22.500'
  # Changes of -2, -1, -3 and -4 dB.
  assert own['region_psnr_change'] == '-2.50'
  assert float(own['ci95_low']) < -2.5 < float(own['ci95_high']) < 0
  assert (own['images'], own['seeds'], own['f1'], own['round_cost_ratio']) == (
    4,
    2,
    '0.8500',
    '3.10',
  )
  assert own['f1_change'] == '-0.0150'
  assert float(own['f1_ci95_low']) < -0.015 < float(own['f1_ci95_high'])
  ablation = found['published', 'white_noise', 'strict']
  assert (ablation['region_psnr'], ablation['f1']) == ('20.000', '')
  assert found['published', '', 'lenient']['ci95_low'] == ''


def test_ablations_and_networks_without_statistics_meet_our_attacks_alone():
  assert published_table._attacks('published', 'none') == ['best', 'calibrated']
  assert published_table._attacks('white_noise', 'batch') == ['best']
  assert set(published_table._attacks('published', 'batch')) == set(published_table._ATTACKS)


def test_what_is_cached_is_not_computed_again(tmp_path, monkeypatch):
  def never(*args, **kwargs):
    raise AssertionError('done already')

  monkeypatch.setattr(published_table, '_observe', never)
  monkeypatch.setattr(published_table, '_run', never)
  (tmp_path / 'cache').mkdir()
  rows = [
    row | {'seed': '0', 'image': str(image), 'norm': norm}
    for norm in ('none', 'batch')
    for variant in ('none', 'published')
    for image, row in enumerate(_protection(variant, ['30', '20']))
  ]
  for name, columns, own in (
    ('protection', published_table._PROTECTION_COLUMNS, rows),
    (
      'utility',
      published_table._UTILITY_COLUMNS,
      [
        {'dataset': 'chest_phantom', 'seed': '0', 'variant': variant, 'f1': '0.9'}
        for variant in ('none', 'published')
      ],
    ),
  ):
    with (tmp_path / 'cache' / f'{name}.csv').open('w') as file:
      writer = csv.DictWriter(file, columns)
      writer.writeheader()
      writer.writerows(own)
  with flagsaver.flagsaver(
    cache_dir=str(tmp_path / 'cache'),
    output=str(tmp_path / 'table.csv'),
    datasets=['chest_phantom'],
    variants=['published'],
    attacks=['best'],
    seeds=1,
    parts=['utility', 'protection'],
  ):
    published_table.main()
  lines = (tmp_path / 'table.csv').read_text().splitlines()
  assert lines[0].startswith('# command: ')
  table = list(csv.DictReader(itertools.islice(lines, 1, None)))
  assert [(row['model'], row['defense']) for row in table] == [
    (f'conv_small/{norm}', defense)
    for norm in ('none', 'batch')
    for defense in ('none', 'published')
  ]


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('datasets', ['mnist'], '--datasets=mnist'),
    ('variants', ['half'], '--variants=half'),
    ('attacks', ['dlg'], '--attacks=dlg'),
    ('norms', ['layer'], '--norms=layer'),
    ('parts', ['privacy'], '--parts=privacy'),
  ],
)
def test_bad_flags(name, value, message):
  with flagsaver.flagsaver(**{name: value}), pytest.raises(UserError, match=message):
    published_table.main()


def test_missing_generator_names_the_command(tmp_path):
  with (
    flagsaver.flagsaver(generators=str(tmp_path / '{dataset}.keras')),
    pytest.raises(UserError, match=r'chest_phantom\.keras is missing; `make generator`'),
  ):
    published_table._generator('chest_phantom', (32, 32, 1))
