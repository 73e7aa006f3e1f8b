import dataclasses

import numpy as np
import pytest

from attacks.adaptive.attacker import AdaptiveAttacker, Effort
from attacks.adaptive.calibrated import CANDIDATES, Trial, attack_calibrated
from attacks.adaptive.label_inference import LabelDiscriminant, PlayedLabels, chosen_rule
from attacks.adaptive.players import build_player
from attacks.config import AttackConfig
from attacks.local_steps import local_steps
from attacks.shared_solvers import SharedSolvers
from attacks.targets import Targets
from tests.attacks.adaptive.simulated_defense_test import _defended, _public
from tests.attacks.observed_rounds import play_round, small_model, smooth_images
from tff_shadow.observations import Truth

_CONFIG = AttackConfig(iterations=1, xla='off')
_LABELS = np.arange(200, dtype=np.int32) % 2


def _played(count=600, defended=300, seed=0):
  """Two labels two apart along the first of three features, images of a label along another."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % 2
  clean = np.zeros((count, 3))
  clean[:, 0] = 2 * labels
  clean[:, 1] = 3 * rng.standard_normal(count)
  draws = rng.standard_normal((defended, 3))
  # Noise that the third feature shows too.
  draws[:, 2] = draws[:, 0] + 0.1 * rng.standard_normal(defended)
  nothing, loudness, images = np.zeros((defended, 0)), np.ones(count), np.arange(count) // 2
  return PlayedLabels(clean, draws, nothing, loudness, labels, images)


def test_noise_that_is_seen_elsewhere_is_taken_off():
  fitted, others = _played(), _played(seed=1)
  truth = others.labels[:300]
  alone = np.mean((others.defended[:, 0] > 1) == truth)
  found = LabelDiscriminant(fitted)(others.defended)
  assert 0.8 < alone < 0.9
  assert np.mean(found == truth) > 0.99


def test_several_labels_and_noise_with_a_mean():
  rng = np.random.default_rng(0)
  labels = np.repeat([1, 4, 7], 100)
  clean = labels[:, None] + 0.1 * rng.standard_normal((300, 2))
  noise = 5 + 0.1 * rng.standard_normal((300, 2))
  played = PlayedLabels(clean, noise, np.zeros((300, 0)), np.ones(300), labels, np.arange(300))
  np.testing.assert_array_equal(LabelDiscriminant(played)(played.defended), labels)


def test_the_rule_that_is_right_more_often_is_chosen():
  played = _played()
  truth = played.labels[:300]
  for wrong, is_chosen in ((30, True), (0, False)):
    inferred = truth.copy()
    inferred[:wrong] = 1 - inferred[:wrong]
    rule, found = chosen_rule(played, inferred)
    assert (rule is not None) == is_chosen
    assert np.mean(found == truth) > 0.98


def test_it_is_tried_on_images_that_it_was_not_fitted_on():
  # Images that tell nothing of labels, but can be learned by heart: each is played ten times.
  rng = np.random.default_rng(0)
  images = np.repeat(np.arange(40), 10)
  clean = rng.standard_normal((40, 30))[images]
  labels = rng.integers(0, 2, 40)[images]
  nothing = np.zeros((400, 0))
  played = PlayedLabels(clean, np.zeros_like(clean), nothing, np.ones(400), labels, images)
  assert np.mean(LabelDiscriminant(played)(clean) == labels) > 0.85
  by_chance = np.where(rng.random(400) < 0.75, labels, 1 - labels)
  rule, found = chosen_rule(played, by_chance)
  assert rule is None
  np.testing.assert_array_equal(found, by_chance)


def test_too_few_clients_to_try_it():
  played = _played(count=4, defended=4)
  rule, _ = chosen_rule(played, 1 - played.labels)
  assert rule is None


@pytest.fixture
def quickly(monkeypatch):
  """Without a network that counts for anything."""
  settings = Effort.inversion
  monkeypatch.setattr(
    Effort, 'inversion', lambda self, seed: dataclasses.replace(settings(self, seed), steps=1)
  )


def _rounds(ratio, count=1):
  """Clients with one image each, under fresh isotropic noise."""
  images = smooth_images(len(_LABELS), seed=11)
  clients = [(image[None], [label]) for image, label in zip(images, _LABELS, strict=True)]
  plain = play_round(small_model(), clients)
  defended = _defended(plain, 'isotropic', value=ratio)
  defended = dataclasses.replace(defended, defense={**defended.defense, 'frozen': False})
  steps = local_steps(plain.clients[0], plain.client_training)
  region = np.ones((1, 8, 8, 1), np.float32)
  player = build_player(defended, False)
  rounds = []
  for number in range(1, count + 1):
    sent = [
      player.update(Truth(own, np.array(label), region), steps, (77 + number, index))
      for index, (own, label) in enumerate(clients)
    ]
    clients_sent = tuple(
      dataclasses.replace(client, update=update)
      for client, update in zip(plain.clients, sent, strict=True)
    )
    rounds.append(dataclasses.replace(defended, round_num=number, clients=clients_sent))
  return rounds


def _trained(rounds):
  attacker = AdaptiveAttacker(_public(40), _CONFIG, Effort(3, 0, 200))
  like = rounds[0].clients[0]
  return attacker._trained_inversion(rounds, like, 'any', SharedSolvers(rounds))


def _right(infer):
  """Share of the clients whose label is inferred rightly from their id."""
  found = [infer(f'client_{index:02d}') for index in range(len(_LABELS))]
  return np.mean([own == (label,) for own, label in zip(found, _LABELS, strict=True)])


def _by_last_layer(rounds):
  targets = Targets(rounds, _CONFIG)
  return _right(lambda name: tuple(targets.labels(targets.find(name, None)).values))


def test_behind_noise_updates_as_a_whole_tell_the_label(quickly):
  reached = []
  for count in (1, 2):
    rounds = _rounds(40.0, count)
    learned = _trained(rounds)
    assert learned.reads_labels
    reached.append(
      _right(
        lambda name, learned=learned, rounds=rounds: learned.labels(
          [seen.client(name).update for seen in rounds]
        )
      )
    )
    assert reached[-1] > _by_last_layer(rounds) + 0.1
  assert reached[1] > reached[0]


def test_labels_that_the_last_layer_shows_are_read_there(quickly):
  rounds = _rounds(0.3)
  learned = _trained(rounds)
  assert not learned.reads_labels
  assert learned.labels([rounds[0].clients[0].update]) is None
  assert _by_last_layer(rounds) == 1
  # The attack is as if nothing had been learned of labels.
  maps = {'client_01': np.ones((1, 8, 8, 1), np.float32)}
  trial = Trial(CANDIDATES[0], 0.0, 0.0, False, 0.0)
  (result,) = attack_calibrated(rounds, trial, _CONFIG, None, maps, learned)
  assert (result.labels, result.labels_source) == ((1,), 'inferred')
