import json
from dataclasses import asdict

import numpy as np
import pytest

from attacks.audit import comparison, comparison_page
from attacks.scoring.statistics import mean_interval
from tests.attacks.audit.made_up import CLASS_MEANS, COUNT, attack_with, audited, close
from tff_shadow.errors import UserError
from tff_shadow.published import PublishedDefense, PublishedSettings
from tff_shadow.shadow.latents import LatentFit

_NOISE = {
  'name': 'shadow',
  'shape': 'correlated',
  'strength': {'kind': 'ratio', 'value': 0.3},
  'saliency': {'kind': 'given'},
  'propagation': 'per_step',
  'frozen': True,
}
_TOP_K = {'name': 'top_k', 'fraction': 0.1}
_DEVIATIONS = {'none': 0.02, 'shadow': 0.3, 'top_k': 0.1}


def _write(directory, defense, seed, f1, epsilon=None, rounds=5):
  clean = attack_with(close(_DEVIATIONS['none'], seed))
  means = CLASS_MEANS if defense['name'] == 'top_k' else None
  own = attack_with(close(_DEVIATIONS[defense['name']], seed + 10), 'best', class_means=means)
  other = attack_with(close(0.5, seed + 20), 'adaptive')
  _, summary = audited(
    [own, other],
    undefended=[] if defense['name'] == 'none' else [clean],
    control=clean,
    dataset='discs',
    defense=defense,
    digests={'data_sha256': 'd', 'model_sha256': f'm{seed}'},
    training={'seed': seed, 'rounds': rounds},
    epsilon=epsilon,
    f1=f1,
  )
  path = directory / f'{defense["name"]}_{seed}.json'
  path.write_text(json.dumps(summary))
  return path


@pytest.fixture(scope='module')
def audits(tmp_path_factory):
  directory = tmp_path_factory.mktemp('audits')
  paths = [
    _write(directory, {'name': 'none'}, 0, 0.9),
    _write(directory, {'name': 'none'}, 1, 0.8),
    _write(directory, _NOISE, 0, 0.85),
    _write(directory, _NOISE, 1, 0.81),
    _write(directory, _TOP_K, 0, 0.7, epsilon=2.0),
  ]
  return [comparison.read_audit(path) for path in paths]


@pytest.fixture(scope='module')
def rows(audits):
  return comparison.compare(audits, 'correlated ratio 0.3')


def test_seeds_are_pooled_and_attacks_told_apart(rows):
  kinds = [(row['defense'], row['attack']) for row in rows]
  attacks = ['strongest', 'best', 'adaptive']
  assert kinds == [(d, a) for d in ('none', 'correlated', 'top_k') for a in attacks]
  by_kind = dict(zip(kinds, rows, strict=True))
  noise = by_kind['correlated', 'strongest']
  assert (noise['images'], noise['seeds'], noise['rounds_observed']) == (2 * COUNT, 2, 1)
  assert noise['strength'] == 'ratio 0.3'
  assert noise['f1'] == pytest.approx(0.83)
  assert noise['f1_undefended'] == pytest.approx(0.85)  # Of the runs from the same starts.
  assert noise['region_psnr'] >= by_kind['correlated', 'best']['region_psnr']
  assert by_kind['correlated', 'adaptive']['knows_noise'] == 'yes'
  assert noise['change_ci95_high'] < -10
  assert noise['epsilon'] == ''
  assert by_kind['top_k', 'strongest']['epsilon'] == 2.0
  assert by_kind['none', 'strongest']['region_psnr_change'] == ''
  assert noise['class_region_psnr'] == ''  # Audits may be older than that.
  top_k = by_kind['top_k', 'strongest']
  assert top_k['control_region_psnr'] < top_k['class_region_psnr']


def test_recognised_images_are_counted_where_all_audits_tried(audits):
  tried = [json.loads(json.dumps(audit.summary)) for audit in audits]
  for correct, summary in zip((4, 6, 1, 2, 0), tried, strict=True):
    summary['rounds'][0]['recognized'] = {'correct': correct, 'of': 20}
  del tried[3]['rounds'][0]['recognized']  # As earlier audits.
  made = [audit._replace(summary=own) for audit, own in zip(audits, tried, strict=True)]
  rows = {(row['defense'], row['attack']): row['recognized'] for row in comparison.compare(made)}
  assert rows['none', 'strongest'] == 0.25
  assert rows['none', 'best'] == ''
  assert rows['correlated', 'strongest'] == ''
  assert rows['top_k', 'strongest'] == 0


def test_a_run_of_other_training_says_nothing_of_the_cost(audits, tmp_path):
  other = comparison.read_audit(_write(tmp_path, _TOP_K, 0, 0.7, rounds=6))
  row = comparison.compare([audits[0], other])[-1]
  assert (row['defense'], row['f1'], row['f1_undefended']) == ('top_k', 0.7, '')


def test_the_cost_may_come_from_longer_trainings(audits):
  utility = {('discs', 'correlated ratio 0.3'): (0.75, 0.76), ('others', 'none'): (0.1, 0.1)}
  rows = comparison.compare(audits, utility=utility)
  found = {row['defense']: (row['f1'], row['f1_undefended']) for row in rows}
  assert found == {'none': ('', ''), 'correlated': (0.75, 0.76), 'top_k': ('', '')}


def test_names_of_defences():
  noise = {**_NOISE, 'frozen': False, 'propagation': 'images', 'saliency': {'kind': 'vanilla'}}
  decoy = {**_NOISE, 'shape': 'decoy', 'floor': 0.7}
  settings = PublishedSettings(
    LatentFit(learning_rate=0.1), map_kind='white', cam_weights=(0.2, 0.5), shadow_rounds=20
  )
  published = PublishedDefense(settings, None, (0.5,), (0.1,)).public_settings()
  assert [
    comparison.defense_names(json.loads(json.dumps(defense)))
    for defense in (
      _NOISE,
      noise,
      decoy,
      {**decoy, 'floor': 0.9999999},
      _TOP_K,
      published,
      {**published, **asdict(PublishedSettings())},
    )
  ] == [
    ('correlated', 'ratio 0.3'),
    ('correlated', 'ratio 0.3, in images, fresh, vanilla'),
    ('decoy', 'ratio 0.3, floor 0.7'),
    ('decoy', 'ratio 0.3, floor 0.9999999'),
    ('top_k', 'fraction 0.1'),
    ('published', 'latents learning_rate 0.1, map_kind white, cam_weights [0.2, 0.5]'),
    ('published', ''),
  ]


def test_the_reference_is_compared_image_by_image(audits, rows):
  row = next(row for row in rows if (row['defense'], row['attack']) == ('top_k', 'strongest'))
  values = {}
  for audit in audits:
    if audit.summary['training'] == {'seed': 0, 'rounds': 5}:
      values[audit.defense] = audit.summary['rounds'][0]['per_image']['values']['strongest']
  expected = np.subtract(values['top_k']['region_psnr'], values['correlated']['region_psnr'])
  assert row['over_reference'] == pytest.approx(expected.mean())
  assert row['reference_ci95_low'] < expected.mean() < row['reference_ci95_high']
  assert row['over_reference'] > 0
  own = next(row for row in rows if row['defense'] == 'correlated')
  assert own['over_reference'] == ''


def _budget(audit, **changes):
  return audit._replace(summary=audit.summary | {'budget': audit.summary['budget'] | changes})


@pytest.mark.parametrize(('clients', 'paired'), [(200, False), (2000, True), (4000, True)])
def test_a_reference_that_was_attacked_less_tells_nothing(audits, clients, paired):
  other = _budget(audits[4], inversion_clients=2000)
  reference = _budget(audits[2], inversion_clients=clients)
  rows = comparison.compare([other, reference], reference.label)
  (row,) = (row for row in rows if (row['defense'], row['attack']) == ('top_k', 'strongest'))
  assert (row['over_reference'] != '') == paired


def test_the_mean_of_the_class_is_another_guess(rows, audits):
  (row,) = (row for row in rows if (row['defense'], row['attack']) == ('top_k', 'strongest'))
  values = audits[4].summary['rounds'][0]['per_image']['values']
  beyond = np.subtract(values['strongest']['region_psnr'], values['class_mean']['region_psnr'])
  expected = mean_interval(beyond)
  interval = row['class_ci95_low'], row['class_ci95_high']
  assert interval == pytest.approx((expected.low, expected.high))
  (row,) = (row for row in rows if (row['defense'], row['attack']) == ('none', 'strongest'))
  assert row['class_region_psnr'] == row['class_ci95_low'] == ''


def test_images_of_a_client_are_one_draw(audits):
  summary = json.loads(json.dumps(audits[2].summary))
  per_image = summary['rounds'][0]['per_image']
  (alone, *_) = comparison.compare([audits[2]])
  per_image['images'] = [f'client_{k // 4:02d}/{k % 4}' for k in range(COUNT)]
  (row, *_) = comparison.compare([audits[2]._replace(summary=summary)])
  values = per_image['values']
  differences = np.subtract(values['strongest']['region_psnr'], values['guess']['region_psnr'])
  expected = mean_interval(differences.reshape(4, 4).mean(axis=1))
  assert (row['ci95_low'], row['ci95_high']) == pytest.approx((expected.low, expected.high))
  assert row['region_psnr'] == pytest.approx(alone['region_psnr'])
  assert row['images'] == COUNT


def test_the_page_shows_all_defences(rows):
  page = comparison_page.render(
    rows, title='A <title>', reference='correlated ratio 0.3', budgets='Here.', command='compare'
  )
  assert 'A &lt;title&gt;' in page
  for words in ('top_k fraction 0.1', 'correlated ratio 0.3', 'data:image/png'):
    assert words in page


def test_what_cannot_be_compared_is_told(audits, tmp_path):
  with pytest.raises(UserError, match='--reference=nothing: use one of correlated ratio'):
    comparison.compare(audits, 'nothing')
  with pytest.raises(UserError, match='are audits of the same defence'):
    comparison.compare([audits[0], audits[0]])
  path = tmp_path / 'summary.json'
  summary = json.loads(audits[0].path.read_text())
  path.write_text(json.dumps({**summary, 'version': 2}))
  with pytest.raises(UserError, match='version 1'):
    comparison.read_audit(path)
  summary['rounds'][0]['per_image']['values']['strongest']['psnr'].pop()
  path.write_text(json.dumps(summary))
  with pytest.raises(UserError, match='damaged'):
    comparison.read_audit(path)
