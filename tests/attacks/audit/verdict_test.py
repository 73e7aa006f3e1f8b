import numpy as np
import pytest

from attacks.audit.page import Annex, render
from attacks.audit.strongest import (
  score_attacked,
  strongest,
  strongest_identification,
  strongest_names,
)
from attacks.audit.suite import Attacked
from attacks.audit.summary import RoundEvidence, summarise, summarise_round
from attacks.audit.verdict import judge_round
from attacks.results import TargetResult
from attacks.scoring.identification import Identification
from tests.attacks.synthetic_run import ellipse_regions, noisy, photographs
from tff_shadow.observations import Truth

_COUNT = 16
_IMAGES = photographs(_COUNT, 16, 3)
_TRUTH = {
  f'client_{k:02d}': Truth(_IMAGES[k : k + 1], np.array([k % 2], np.int32), ellipse_regions(1, 16))
  for k in range(_COUNT)
}
_MEAN = np.broadcast_to(_IMAGES.mean(axis=0), _IMAGES.shape).astype(np.float32)
_NOBODY = Identification(correct=0, of=_COUNT, choices=_COUNT, control_correct=0, p_value=1.0)


def _attack(images, name='best', failed=()):
  """An attack whose reconstructions are `images`, one a client."""
  found = []
  for k, client in enumerate(_TRUTH):
    ok = client not in failed
    made = {'prior_only': _MEAN[k : k + 1], 'mean_image': _MEAN[k : k + 1]}
    made |= {'attack': images[k : k + 1]} if ok else {}
    found.append(
      TargetResult(
        target=client,
        images=1,
        labels=(k % 2,),
        labels_source='inferred',
        status='ok' if ok else 'failed',
        reason=None if ok else 'it diverged',
        loss=0.1 if ok else None,
        restart_losses=(0.1,) if ok else (),
        chosen_restart=0 if ok else None,
        iterations=1,
        seconds=1.0,
        reconstructions=made,
      )
    )
  return score_attacked(Attacked(name, tuple(found), ('It knows a thing.',)), _TRUTH, ())


def _close(deviation=0.02, seed=0):
  return noisy(_IMAGES, np.full(_COUNT, deviation), seed)


@pytest.fixture(scope='module')
def seeing():
  return _attack(_close())


@pytest.fixture(scope='module')
def blind():
  return _attack(_MEAN)


def test_nothing_beyond_a_guess_needs_everything(blind, seeing):
  def name(**changes):
    arguments = {'control': seeing.scores, 'problems': ()} | changes
    return judge_round(blind.scores, _NOBODY, **arguments)

  assert name().name == 'not_beyond_guess'
  assert name(problems=('Nobody tried.',)).reasons == ('Nobody tried.',)
  assert name(problems=('Nobody tried.',)).name == 'inconclusive'
  without = name(control=blind.scores)
  assert without.name == 'inconclusive'
  assert 'positive control failed' in without.reasons[0]


def test_no_attack_is_no_protection(seeing):
  verdict = judge_round([], None, seeing.scores, ['best failed.'])
  assert verdict.name == 'inconclusive'
  assert verdict.reasons == ('No attack could be made.', 'best failed.')


def test_a_diverged_attack_is_no_protection(seeing):
  failed = _attack(_MEAN, failed=('client_03',))
  verdict = judge_round(failed.scores, _NOBODY, seeing.scores, ())
  assert verdict.name == 'inconclusive'


def test_images_that_are_not_finite_are_no_protection(seeing):
  images = _MEAN.copy()
  images[5] = np.nan
  verdict = judge_round(_attack(images).scores, _NOBODY, seeing.scores, ())
  assert verdict.name == 'inconclusive'


def test_a_leak_is_one_whatever_else_went_wrong(seeing, blind):
  verdict = judge_round(seeing.scores, _NOBODY, blind.scores, ('Nobody tried.',))
  assert verdict.name == 'leaked'


def test_the_strongest_is_chosen_by_image_and_metric(seeing, blind):
  half = _MEAN.copy()
  half[:4] = _close(seed=1)[:4]
  other = _MEAN.copy()
  other[4:] = _close(seed=2)[4:]
  attacks = [_attack(half, 'first'), _attack(other, 'second'), blind]
  rows = strongest(attacks)
  assert strongest_names(attacks, 'psnr') == ['first'] * 4 + ['second'] * 12
  for place, row in enumerate(rows):
    best = max(attack.scores[place].quality['attack'].psnr for attack in attacks)
    assert row.quality['attack'].psnr == best
    assert row.quality['attack'].mse == min(
      attack.scores[place].quality['attack'].mse for attack in attacks
    )
    assert row.quality['prior_only'] == blind.scores[place].quality['prior_only']
  assert strongest_identification(attacks).correct == max(
    attack.identification.correct for attack in attacks
  )
  assert strongest_identification(attacks).p_value == pytest.approx(
    3 * min(attack.identification.p_value for attack in attacks)
  )


def test_an_image_that_one_attack_failed_on_may_be_seen_by_another(seeing):
  rows = strongest([_attack(_MEAN, failed=('client_03',)), seeing])
  assert {row.status for row in rows} == {'ok'}
  rows = strongest([_attack(_MEAN, failed=('client_03',))])
  assert rows[3].status == 'failed'
  assert 'attack' not in rows[3].quality


def _audit(attacks, undefended=(), failed=(), control=None):
  evidence = RoundEvidence((1,), attacks, failed, undefended, control or attacks[0])
  entry = summarise_round(evidence)
  return entry, summarise(
    [entry],
    title='An audit',
    defended=bool(undefended),
    adaptive=True,
    scope={'Model': 'small <b>'},
    seed=0,
    budget={
      'name': 'quick',
      'presets': ['best'],
      'iterations': 1,
      'calibration_clients': 0,
      'denoiser_steps': 0,
    },
    tolerated={'psnr': 1.0, 'region_psnr': 1.0, 'ssim': 0.05, 'region_ssim': 0.05},
    guarantee='no formal guarantee: none',
    utility={'test': {'f1': 0.9}, 'undefended': None},
    command='tff-shadow-audit',
    versions={'numpy': '1'},
  )


def test_the_summary_compares_images_in_pairs(seeing):
  noisier = _attack(_close(0.1, seed=3))
  entry, audit = _audit([noisier], undefended=[seeing])
  expected = np.mean(
    [
      own.quality['attack'].region_psnr - clean.quality['attack'].region_psnr
      for own, clean in zip(noisier.scores, seeing.scores, strict=True)
    ]
  )
  assert entry['change']['region_psnr']['mean'] == pytest.approx(expected)
  assert entry['change']['region_psnr']['ci95_high'] < 0
  assert audit['verdict'] == entry['verdict'] == 'leaked'
  assert 'round 1' in audit['headline']
  assert entry['worst']['margin'] == max(row['worst'] for row in entry['per_client'])
  assert [group['name'] for group in entry['groups']] == ['class 0', 'class 1']
  assert sum(group['margin']['n'] for group in entry['groups']) == _COUNT
  assert entry['attacks'][0]['labels'] == {'correct': _COUNT, 'of': _COUNT}


def test_an_attack_that_could_not_be_made_is_told(blind, seeing):
  entry, _ = _audit([blind], failed=[Attacked('dlg', (), (), 'no labels')], control=seeing)
  assert entry['verdict'] == 'inconclusive'
  assert 'The attack dlg could not be made: no labels.' in entry['reasons']
  assert entry['not_made'] == [{'name': 'dlg', 'problem': 'no labels'}]


def test_the_page_shows_images_only_in_its_annex(seeing, blind):
  _, audit = _audit([seeing], undefended=[seeing])
  page = render(audit)
  assert page.count('data:image/png') == 2  # The plot, light and dark.
  assert 'small &lt;b&gt;' in page
  assert 'Images leaked' in page
  annex = render(audit, [Annex((1,), [seeing, blind])])
  assert annex.count('data:image/png') == 2 + 3 * _COUNT
