import dataclasses

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
from attacks.audit.summary import (
  RoundEvidence,
  round_ranges,
  round_words,
  summarise_round,
  with_problems,
)
from attacks.audit.verdict import judge_round
from attacks.scoring.identification import Precision
from attacks.scoring.metrics import measure
from tests.attacks.audit.made_up import (
  CLASS_MEANS,
  COUNT,
  MEAN,
  NOBODY,
  TRUTH,
  attack_with,
  audited,
  close,
)


@pytest.fixture(scope='module')
def seeing():
  return attack_with(close())


@pytest.fixture(scope='module')
def blind():
  return attack_with(MEAN)


def test_nothing_beyond_a_guess_needs_everything(blind, seeing):
  def name(**changes):
    arguments = {'control': seeing.scores, 'clean': [seeing.scores], 'problems': ()} | changes
    return judge_round(blind.scores, NOBODY, **arguments)

  assert name().name == 'not_beyond_guess'
  assert name(problems=('Nobody tried.',)).reasons == ('Nobody tried.',)
  assert name(problems=('Nobody tried.',)).name == 'inconclusive'
  without = name(control=blind.scores)
  assert without.name == 'inconclusive'
  assert 'positive control failed' in without.reasons[0]


def test_nothing_beyond_a_guess_needs_attacks_that_work_without_the_defence(blind, seeing):
  def reasons(clean):
    verdict = judge_round(blind.scores, NOBODY, seeing.scores, clean, ())
    assert verdict.name == 'inconclusive'
    return verdict.reasons

  (reason,) = reasons([blind.scores])
  assert reason.startswith(
    'Without a defence, from the same images, steps and batches, the attacks'
  )
  assert len(reasons([[]])) == 1
  assert 'were not attacked without a defence' in reasons([])[0]
  assert len(reasons([seeing.scores, blind.scores])) == 1  # Of two rounds, attacked jointly.


def test_known_images_that_are_recognised_are_a_part_of_a_leak(blind, seeing):
  some = dataclasses.replace(NOBODY, correct=5, choices=216, p_value=0.0005)

  def verdict(scores, recognized, control=seeing):
    return judge_round(scores, NOBODY, control.scores, [seeing.scores], (), recognized=recognized)

  found = verdict(blind.scores, some)
  assert (found.name, found.pictures) == ('partly_leaked', 'not_beyond_guess')
  assert found.reasons[0].endswith(f'updates pick 5 of {COUNT} images out of 216.')
  assert found.reasons[1] == 'No reconstruction shows more of the images than a guess.'
  found = verdict(blind.scores, some, control=blind)
  assert (found.name, found.pictures) == ('partly_leaked', 'inconclusive')
  assert 'positive control failed' in found.reasons[2]
  found = verdict(seeing.scores, some)
  assert (found.name, found.pictures) == ('leaked', 'leaked')
  by_chance = dataclasses.replace(some, correct=1, p_value=0.2)
  assert verdict(blind.scores, by_chance).name == 'not_beyond_guess'
  # Clients that cannot change places with any other clear nothing.
  untold = dataclasses.replace(some, p_value=1.0, chance_p_value=1e-9, least_p_value=1.0)
  found = verdict(blind.scores, untold)
  assert (found.name, found.pictures) == ('inconclusive', 'not_beyond_guess')
  assert found.reasons[0].startswith(f'Updates pick 5 of {COUNT} images out of 216 known ones')
  assert verdict(seeing.scores, untold).name == 'leaked'


def test_the_page_tells_which_known_images_were_recognised(blind, seeing):
  precisions = (Precision(1, 5, 1), Precision(3, 7, 1), Precision(5, 9, 2))
  some = dataclasses.replace(NOBODY, correct=5, choices=216, p_value=0.0005, precisions=precisions)
  entry, summary = audited([blind], undefended=[seeing], control=seeing, recognized=some)
  assert entry['recognized']['correct'] == 5
  assert entry['pictures'] == 'not_beyond_guess'
  assert summary['headline'] == (
    'From round 1 a server that has an image already could have told who trained on it.'
  )
  text = ' '.join(render(summary).split())
  assert f'Of {COUNT} images, 5 are the likeliest of 216 known ones, 7 among the 3' in text
  assert '9 among the 5 likeliest (by the update of another client: 0;' in text
  entry, summary = audited([blind], undefended=[seeing], control=seeing)
  assert entry['recognized'] is None
  assert 'Not tried' in render(summary)


def test_a_round_without_a_defence_is_never_cleared(blind, seeing):
  entry, _ = audited([blind], control=seeing)
  assert entry['verdict'] == 'inconclusive'
  entry, _ = audited([blind], undefended=[seeing], control=seeing)
  assert entry['verdict'] == 'not_beyond_guess'
  entry, _ = audited([blind], undefended=[blind], control=seeing)
  assert entry['verdict'] == 'inconclusive'


def test_what_was_not_attacked_jointly_is_a_doubt_where_it_belongs(blind, seeing):
  single = RoundEvidence((1,), [blind], (), [seeing], seeing, clean=[[seeing]])
  joint = single._replace(rounds=(1, 2), undefended=())

  def verdicts(evidence):
    rounds = [summarise_round(own) for own in with_problems(evidence, ['Not together.'])]
    return [entry['verdict'] for entry in rounds]

  assert verdicts([single, joint]) == ['not_beyond_guess', 'inconclusive']
  assert verdicts([single, single]) == ['inconclusive'] * 2


def test_an_attack_that_gave_nothing_is_a_doubt_however_well_others_worked(blind, seeing):
  failed = attack_with(MEAN, 'dlg', failed=list(TRUTH))
  entry, _ = audited([blind, failed], undefended=[seeing], control=seeing)
  assert entry['verdict'] == 'inconclusive'
  assert entry['reasons'] == [f'The attack dlg gave no usable result on 16 of {COUNT} images.']
  early = attack_with(MEAN, 'dlg', early=('client_03',))
  entry, _ = audited([blind, early], undefended=[seeing], control=seeing)
  assert entry['reasons'] == [f'The attack dlg ended early on 1 of {COUNT} clients: it diverged.']


def test_no_attack_is_no_protection(seeing):
  verdict = judge_round([], None, seeing.scores, [], ['best failed.'])
  assert verdict.name == 'inconclusive'
  assert verdict.reasons == ('No attack could be made.', 'best failed.')


def test_a_diverged_attack_is_no_protection(seeing):
  failed = attack_with(MEAN, failed=('client_03',))
  verdict = judge_round(failed.scores, NOBODY, seeing.scores, [seeing.scores], ())
  assert verdict.name == 'inconclusive'


def test_images_that_are_not_finite_are_no_protection(seeing):
  images = MEAN.copy()
  images[5] = np.nan
  verdict = judge_round(attack_with(images).scores, NOBODY, seeing.scores, [seeing.scores], ())
  assert verdict.name == 'inconclusive'


def test_a_leak_is_one_whatever_else_went_wrong(seeing, blind):
  verdict = judge_round(seeing.scores, NOBODY, blind.scores, [blind.scores], ('Nobody tried.',))
  assert verdict.name == 'leaked'


def test_the_strongest_is_chosen_by_image_and_metric(seeing, blind):
  half = MEAN.copy()
  half[:4] = close(seed=1)[:4]
  other = MEAN.copy()
  other[4:] = close(seed=2)[4:]
  attacks = [attack_with(half, 'first'), attack_with(other, 'second'), blind]
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


def test_what_an_attacker_is_told_is_no_leak(seeing):
  told = close(0.05, seed=3)
  ignorant = attack_with(told, 'adaptive')
  assert (
    judge_round(strongest([ignorant]), NOBODY, seeing.scores, [seeing.scores], ()).name == 'leaked'
  )
  others = close(0.045, seed=4)
  fair = attack_with(told, 'adaptive_region', other_update=others)
  rows = strongest([attack_with(MEAN, other_update=MEAN), fair])
  assert [row.quality['other_update'] for row in rows] == [
    row.quality['other_update'] for row in fair.scores
  ]
  assert (
    judge_round(strongest([fair]), NOBODY, seeing.scores, [seeing.scores], ()).name
    == 'not_beyond_guess'
  )
  identified = strongest_identification([fair])
  assert (identified.correct, identified.control_correct) == (COUNT, COUNT)
  assert identified.p_value == 1.0


def test_an_image_that_one_attack_failed_on_may_be_seen_by_another(seeing):
  rows = strongest([attack_with(MEAN, failed=('client_03',)), seeing])
  assert {row.status for row in rows} == {'ok'}
  rows = strongest([attack_with(MEAN, failed=('client_03',))])
  assert rows[3].status == 'failed'
  assert 'attack' not in rows[3].quality


def test_the_summary_compares_images_in_pairs(seeing):
  noisier = attack_with(close(0.1, seed=3))
  entry, audit = audited([noisier], undefended=[seeing])
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
  assert sum(group['margin']['n'] for group in entry['groups']) == COUNT
  assert entry['attacks'][0]['labels'] == {'correct': COUNT, 'of': COUNT}


def test_what_the_class_alone_shows_is_told_apart_and_is_no_guess(seeing, blind):
  plain, _ = audited([blind], control=seeing)
  assert plain['class_mean']['psnr']['n'] == plain['beyond_class']['psnr']['n'] == 0
  # An attack that shows the class and no more.
  images = np.stack([CLASS_MEANS[k % 2] for k in range(COUNT)])
  classes = [attack_with(images, name, class_means=CLASS_MEANS) for name in ('best', 'adaptive')]
  entry, audit = audited([blind, *classes], control=seeing)
  expected = [measure(*triple).region_psnr for triple in _with_regions(images)]
  assert entry['class_mean']['region_psnr']['mean'] == pytest.approx(np.mean(expected))
  assert entry['per_image']['values']['class_mean']['region_psnr'] == pytest.approx(expected)
  own = entry['per_image']['values']['strongest']['region_psnr']
  beyond = entry['beyond_class']['region_psnr']
  assert beyond['mean'] == pytest.approx(np.mean(own) - np.mean(expected))
  assert entry['guess'] == plain['guess']
  assert 'Mean public image of its class' in render(audit)
  known_in_part = attack_with(images, class_means={0: CLASS_MEANS[0]})
  entry, audit = audited([known_in_part], control=seeing)
  assert entry['class_mean']['psnr']['n'] == COUNT // 2


def _with_regions(images):
  return [
    (image, truth.images[0], truth.regions[0])
    for image, truth in zip(images, TRUTH.values(), strict=True)
  ]


def test_an_attack_that_could_not_be_made_is_told(blind, seeing):
  entry, _ = audited([blind], failed=[Attacked('dlg', (), (), 'no labels')], control=seeing)
  assert entry['verdict'] == 'inconclusive'
  assert 'The attack dlg could not be made: no labels.' in entry['reasons']
  assert entry['not_made'] == [{'name': 'dlg', 'problem': 'no labels'}]


def test_a_positive_control_that_could_not_be_made_leaves_it_open(blind, seeing):
  control = score_attacked(Attacked('best', (), (), 'no labels'), TRUTH, ())
  entry, audit = audited([blind], undefended=[seeing], control=control)
  assert entry['verdict'] == 'inconclusive'
  assert entry['reasons'] == [
    'The positive control could not be made: no labels.',
    'Without a positive control it is not shown that a leak would be seen.',
  ]
  assert (entry['control']['images'], entry['control']['passed']) == (0, False)
  assert 'NOT MADE' in render(audit)
  # Nor could any other attack.
  entry, audit = audited([], failed=[Attacked('best', (), (), 'no labels')], control=control)
  assert entry['verdict'] == 'inconclusive'
  assert entry['reasons'][0] == 'No attack could be made.'
  assert 'could not be made: no labels' in render(audit)
  entry, _ = audited([seeing], control=control)
  assert entry['verdict'] == 'leaked'


def test_the_page_shows_images_only_in_its_annex(seeing, blind):
  _, audit = audited([seeing], undefended=[seeing])
  page = render(audit)
  assert 'Mean public image of its class' not in page
  assert page.count('data:image/png') == 2  # The plot, light and dark.
  assert 'small &lt;b&gt;' in page
  assert 'Images leaked' in page
  annex = render(audit, [Annex((1,), [seeing, blind])])
  assert annex.count('data:image/png') == 2 + 3 * COUNT


def test_a_bound_stands_beside_what_one_attack_reached_on_the_same_clients(seeing):
  farther = attack_with(close(0.1, seed=1), 'farther')
  names = ['client_02', 'client_05']
  bound = {'name': 'B', 'region_psnr': 30.0, 'holds_here': True, 'rests_on': 'x', 'clients': names}
  entry, audit = audited([farther, seeing], bounds=[bound])
  own = [row for row in seeing.scores if row.target in names]
  errors = [row.quality['attack'].region_mse for row in own]
  expected = -10 * np.log10(np.mean(errors))
  assert entry['bounds'][0]['measured'] == pytest.approx(expected)
  assert 'images of 2 of the clients' in render(audit)
  assert 'the estimate does not hold' in render(audit)
  _, audit = audited([seeing], bounds=[bound | {'region_psnr': expected + 0.1}])
  assert 'the estimate does not hold' not in render(audit)
  failed = attack_with(close(), failed=names)
  entry, _ = audited([failed], control=seeing, bounds=[bound])
  assert entry['bounds'][0]['measured'] is None


@pytest.mark.parametrize(
  ('rounds', 'words', 'short'),
  [
    ([3], 'Round 3', '3'),
    ([1, 2], 'Rounds 1, 2 together', '1+2'),
    ([7, 1, 3, 2, 9, 8, 20], 'Rounds 1 to 3, 7 to 9, 20 together', '1-3+7-9+20'),
  ],
)
def test_many_rounds_are_named_shortly(rounds, words, short):
  assert round_words(rounds) == words
  assert '+'.join(round_ranges(rounds, '-')) == short
