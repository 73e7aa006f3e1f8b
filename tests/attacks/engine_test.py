import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.engine import attack_observation, planned_steps
from attacks.local_steps import LocalSteps
from attacks.priors import ImageNorm
from attacks.results import read_results, write_results
from attacks.shared_solvers import SharedSolvers
from attacks.simulator import ClientSimulator
from attacks.solver import Evidence, Solver
from attacks.targets import Targets
from attacks.threat_model import threat_model, warnings
from tests.attacks.observed_rounds import play_round, psnr, small_model, smooth_images
from tff_shadow.errors import UserError
from tff_shadow.observations import AGGREGATE, WeightArrays

_SHORT = AttackConfig(iterations=60, restarts=2, xla='off')


@pytest.fixture(scope='module')
def observation():
  images = smooth_images(2)
  return play_round(small_model(), [(images[:1], [1]), (images[1:], [0])])


@pytest.fixture(scope='module')
def shared(observation):
  """Traces take longer than these attacks."""
  return SharedSolvers([observation])


def test_recovers_images_far_better_than_the_controls(observation):
  config = AttackConfig(iterations=300, xla='off')
  results = attack_observation(observation, config)
  for result, image, label in zip(results, smooth_images(2), (1, 0), strict=True):
    quality = {name: psnr(found[0], image) for name, found in result.reconstructions.items()}
    assert result.status == 'ok'
    assert result.labels == (label,)
    assert quality['attack'] > 25
    assert quality['attack'] > max(quality['prior_only'], quality['mean_image']) + 6
    for found in result.reconstructions.values():
      assert found.dtype == np.float32
      assert found.min() >= 0
      assert found.max() <= 1


def test_chooses_by_its_own_loss_and_returns_the_image_of_that_loss(observation, shared):
  result = attack_observation(observation, _SHORT, ['client_01'], shared=shared)[0]
  assert len(result.restart_losses) == 2
  assert result.restart_losses[0] != result.restart_losses[1]
  assert result.loss == min(result.restart_losses)
  assert result.restart_losses[result.chosen_restart] == result.loss


def test_restarts_may_be_averaged():
  images = smooth_images(3)
  observation = play_round(small_model(), [(images, [1, 0, 1])])
  attack = functools.partial(
    attack_observation,
    observation,
    labels={'client_00': [1, 0, 1]},
    shared=SharedSolvers([observation]),
    controls=False,
  )

  def combined(restarts, combination):
    return attack(dataclasses.replace(_SHORT, restarts=restarts, combination=combination))[0]

  best, mean = combined(3, 'best'), combined(3, 'mean')
  assert best.restart_losses == mean.restart_losses
  assert best.loss == mean.loss
  assert np.abs(mean.reconstructions['attack'] - best.reconstructions['attack']).max() > 1e-3
  alone, again = combined(1, 'best'), combined(1, 'mean')
  np.testing.assert_array_equal(alone.reconstructions['attack'], again.reconstructions['attack'])


def test_control_does_not_look_at_the_update(observation, shared):
  client = observation.clients[0]
  other = dataclasses.replace(
    client, update=WeightArrays(tuple(2 - 3 * array for array in client.update.trainable))
  )
  changed = dataclasses.replace(observation, clients=(other, *observation.clients[1:]))
  attack = functools.partial(
    attack_observation,
    config=_SHORT,
    targets=['client_00'],
    labels={'client_00': [1]},
    shared=shared,
  )
  a, b = (attack(o)[0].reconstructions for o in (observation, changed))
  np.testing.assert_array_equal(a['prior_only'], b['prior_only'])
  assert np.abs(a['attack'] - b['attack']).max() > 0.01


class _StopAt:
  """Raises KeyboardInterrupt as Ctrl-C would, at the first report past so many steps."""

  def __init__(self, done):
    self.done = done

  def __call__(self, progress):
    if progress.done >= self.done:
      raise KeyboardInterrupt


@pytest.mark.parametrize(
  ('lanes', 'done'), [(16, 10), (1, 1), (1, 65)], ids=['together', 'first turn', 'second turn']
)
@pytest.mark.parametrize('settings', [{}, {'joint_labels': True, 'langevin': 0.01}])
def test_resumed_attack_gives_the_same_bits(observation, shared, tmp_path, lanes, done, settings):
  config = dataclasses.replace(_SHORT, lanes=lanes, **settings)
  attack = functools.partial(
    attack_observation, observation, config, ['client_00'], shared=shared, controls=False
  )
  whole = attack()[0]
  path = tmp_path / 'checkpoint.safetensors'
  with pytest.raises(KeyboardInterrupt):
    attack(checkpoint_path=path, progress=_StopAt(done))
  assert path.exists()
  reports = []
  resumed = attack(checkpoint_path=path, progress=reports.append)[0]
  assert reports[0].done > done
  np.testing.assert_array_equal(whole.reconstructions['attack'], resumed.reconstructions['attack'])
  assert whole.restart_losses == resumed.restart_losses
  assert not path.exists()


def test_lanes_do_not_know_of_each_other(observation):
  # Few iterations: rounding differs with the number of lanes, and grows.
  config = dataclasses.replace(_SHORT, iterations=15)
  together = attack_observation(observation, config, controls=False)
  alone = attack_observation(observation, dataclasses.replace(config, lanes=1), controls=False)
  for a, b in zip(together, alone, strict=True):
    np.testing.assert_allclose(a.restart_losses, b.restart_losses, rtol=1e-3)
    np.testing.assert_allclose(a.reconstructions['attack'], b.reconstructions['attack'], atol=1e-3)


@pytest.fixture(scope='module', name='attack_three')
def _attack_three():
  """Attacks on a round of three clients, that share their traces."""
  images = smooth_images(3)
  observation = play_round(small_model(), [(images[i : i + 1], [i % 2]) for i in range(3)])
  return functools.partial(
    attack_observation, observation, shared=SharedSolvers([observation]), controls=False
  )


@pytest.mark.parametrize(('restarts', 'lanes'), [(1, 2), (2, 4), (3, 2)])
def test_targets_and_restarts_need_not_fill_the_lanes(attack_three, restarts, lanes):
  config = dataclasses.replace(_SHORT, iterations=15, restarts=restarts, lanes=lanes)
  found = attack_three(config)
  for result, name in zip(found, ('client_00', 'client_01', 'client_02'), strict=True):
    alone = attack_three(dataclasses.replace(config, lanes=1), [name])[0]
    assert (result.target, result.status) == (name, 'ok')
    np.testing.assert_allclose(result.restart_losses, alone.restart_losses, rtol=1e-3)


def test_one_diverged_lane_leaves_the_others_alone(observation, shared):
  client = observation.clients[0]
  huge = WeightArrays(tuple(array * 1e30 for array in client.update.trainable))
  broken = dataclasses.replace(
    observation, clients=(dataclasses.replace(client, update=huge), observation.clients[1])
  )
  (_, healthy), (_, expected) = (
    attack_observation(o, _SHORT, shared=shared, controls=False) for o in (broken, observation)
  )
  np.testing.assert_array_equal(
    healthy.reconstructions['attack'], expected.reconstructions['attack']
  )


@dataclasses.dataclass(frozen=True)
class _BreaksAt(ImageNorm):
  """A prior whose gradient is not finite at one iteration, so that no later loss is."""

  iteration: int = 0

  def __call__(self, images, iteration, iterations, target):
    factor = tf.where(iteration == self.iteration, np.nan, 0.0)
    return factor * tf.reduce_sum(images, axis=[1, 2, 3, 4])


@pytest.mark.parametrize('combination', ['best', 'mean'])
def test_a_restart_that_diverges_late_keeps_its_best_images(observation, shared, combination):
  config = dataclasses.replace(
    _SHORT, iterations=20, image_norm=_BreaksAt(weight=1.0, iteration=18), combination=combination
  )
  result = attack_observation(observation, config, ['client_00'], shared=shared, controls=False)[0]
  assert result.status == 'ok'
  assert result.reason.endswith('in all restarts, first at iteration 19')
  assert result.loss == min(result.restart_losses)
  assert np.isfinite(result.reconstructions['attack']).all()


def test_several_local_steps_are_simulated_exactly():
  image = smooth_images(1, seed=5)
  several = play_round(small_model(), [(image, [1])], steps=5, learning_rate=0.5, momentum=0.5)
  quality = {}
  for simulation in ('exact', 'between'):
    config = AttackConfig(iterations=300, xla='off', simulation=simulation)
    result = attack_observation(several, config)[0]
    quality[simulation] = psnr(result.reconstructions['attack'], image)
    assert quality[simulation] > psnr(result.reconstructions['mean_image'], image) + 3
  assert quality['exact'] > max(25, quality['between'] + 3)


def test_frozen_layers_stand_still_in_several_steps():
  model = small_model()
  model.layers[1].trainable = False
  image = smooth_images(1, seed=5)
  observation = play_round(model, [(image, [1])], steps=3, learning_rate=0.1)
  config = AttackConfig(iterations=200, xla='off')
  (result,) = attack_observation(observation, config)
  found = psnr(result.reconstructions['attack'], image)
  assert found > psnr(result.reconstructions['mean_image'], image) + 3


def test_the_mean_is_searched_on_the_way_that_its_clients_went():
  """Of a single client it is that client's update, and the way there four steps long."""
  image = smooth_images(1)
  observation = play_round(small_model(), [(image, [1])], steps=4, learning_rate=0.1)
  config = dataclasses.replace(_SHORT, simulation='between')
  targets = Targets([observation], config)
  losses = {}
  for name in ('client_00', AGGREGATE):
    target = targets.find(name, (1,))
    gradients = [[tensor[None] for tensor in own] for own in targets.gradients(target)]
    evidence = Evidence(tf.zeros(1, tf.int32), tf.constant([[1]]), gradients, (), None)
    solver = Solver(targets.simulators, target.steps, config, matching=True)
    for position in (0.0, 0.5):
      tried = {'images': tf.constant(image), 'position': tf.constant(position)}
      losses[name, position] = float(solver.lane_loss(tried, 0, evidence, tf.constant(0))[0])
  for position in (0.0, 0.5):
    assert losses[AGGREGATE, position] == pytest.approx(losses['client_00', position], rel=1e-5)
  assert losses[AGGREGATE, 0.5] < 0.9 * losses[AGGREGATE, 0.0]
  # Without a way, one step on all images is all that explains it.
  assert Targets([observation], _SHORT).find(AGGREGATE, None).steps[0].is_single


@pytest.fixture(scope='module', name='ordered')
def _ordered():
  """A client with two images one by one, twice: first the one of label 1."""
  images = smooth_images(2, seed=3)
  observation = play_round(small_model(num_classes=5), [(images, [1, 3])], learning_rate=0.2)
  training = dataclasses.replace(observation.client_training, batch_size=1, local_epochs=2)
  observation = dataclasses.replace(observation, client_training=training)
  simulator = ClientSimulator(observation)
  steps = LocalSteps(((1,), (0,), (0,), (1,)))
  gradient = simulator.mean_gradient(tf.constant(images), tf.constant([1, 3]), steps)
  scale = -simulator.update_over_gradient(4)
  update = WeightArrays(tuple(scale * tensor.numpy() for tensor in gradient))
  client = dataclasses.replace(observation.clients[0], num_steps=4, update=update)
  return images, dataclasses.replace(observation, clients=(client,))


def test_the_order_of_local_steps_is_searched(ordered):
  images, observation = ordered
  config = AttackConfig(iterations=150, order_iterations=60, xla='off')
  attack = functools.partial(
    attack_observation, observation, shared=SharedSolvers([observation]), controls=False
  )
  (found,) = attack(config)
  assert found.order == (1, 0, 0, 1)
  (assumed,) = attack(dataclasses.replace(config, orders=1))
  assert assumed.order == (0, 1, 0, 1)
  assert found.loss < 0.5 * assumed.loss
  # Four orders are all there are.
  assert found.iterations == 150 + 4 * 60
  (told,) = attack(config, orders={'client_00': found.order})
  assert told.loss == found.loss
  assert told.iterations == 150

  def closeness(result):
    return np.mean(
      [psnr(*pair) for pair in zip(result.reconstructions['attack'], images, strict=True)]
    )

  assert closeness(found) > closeness(assumed) + 2


@pytest.mark.parametrize('interrupted_at', ['order', 'attack'])
def test_an_interrupted_search_for_an_order_goes_on(ordered, tmp_path, interrupted_at):
  _, observation = ordered
  config = AttackConfig(iterations=12, order_iterations=8, lanes=2, xla='off')
  path = tmp_path / 'checkpoint.safetensors'
  attack = functools.partial(
    attack_observation, observation, config, shared=SharedSolvers([observation]), controls=False
  )
  (whole,) = attack()
  seen = []

  def stop(at):
    seen.append(at)
    if len(seen) == 3 if interrupted_at == 'order' else not at.trying_orders:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    attack(checkpoint_path=path, progress=stop)
  assert seen[-1].trying_orders == (interrupted_at == 'order')
  done = [at.done for at in seen]
  assert done == sorted(set(done))
  # Of 16 orders that may be tried there are four, and then the attack's first step is done.
  assert interrupted_at == 'order' or done[-1] == 16 * 8 + 1
  (resumed,) = attack(checkpoint_path=path, progress=seen.append)
  assert seen[-1].done == planned_steps(observation, config, ['client_00']) == 16 * 8 + 12
  assert resumed.loss == whole.loss
  assert resumed.order == whole.order
  np.testing.assert_array_equal(resumed.reconstructions['attack'], whole.reconstructions['attack'])


def test_several_rounds_are_attacked_jointly():
  images = smooth_images(1, seed=5)
  rounds = [play_round(small_model(seed=seed), [(images, [1])]) for seed in (0, 1, 2)]
  noisy = []
  for k, seen in enumerate(rounds):
    rng = np.random.default_rng(k)
    client = seen.clients[0]
    arrays = client.update.trainable
    size = np.sqrt(sum((a**2).sum() for a in arrays) / sum(a.size for a in arrays))
    update = WeightArrays(
      tuple((a + 0.5 * size * rng.standard_normal(a.shape)).astype(np.float32) for a in arrays)
    )
    noisy.append(dataclasses.replace(seen, clients=(dataclasses.replace(client, update=update),)))
  config = AttackConfig(iterations=200, xla='off')
  alone = attack_observation(noisy[0], config)[0].reconstructions['attack']
  jointly = attack_observation(noisy, config)[0].reconstructions['attack']
  assert psnr(jointly, images) > psnr(alone, images) + 2
  other = play_round(small_model(), [(smooth_images(2), [0, 1])])
  with pytest.raises(UserError, match='only rounds on the same images'):
    attack_observation([rounds[0], other], config)


def test_labels_are_inferred_from_all_rounds():
  seen = play_round(small_model(), [(smooth_images(1), [1])])
  client = seen.clients[0]
  rounds = []
  for k, sign in enumerate((1, -1)):
    # Of the bias of the logits: the first round says 0, both together 1.
    bias = client.update.trainable[-1] + sign * np.array([1, -1], np.float32)
    own = dataclasses.replace(client, update=WeightArrays((*client.update.trainable[:-1], bias)))
    rounds.append(dataclasses.replace(seen, round_num=k + 1, clients=(own,)))
  config = dataclasses.replace(_SHORT, iterations=1)
  found = [attack_observation(own, config, controls=False)[0].labels for own in (rounds[0], rounds)]
  assert found == [(0,), (1,)]


def test_labels_that_the_attacker_has_inferred_by_itself(observation):
  config = dataclasses.replace(_SHORT, iterations=1)
  names = [client.client_id for client in observation.clients]
  by_rule = attack_observation(observation, config, names, controls=False)
  other = tuple(1 - label for label in by_rule[0].labels)
  found = attack_observation(observation, config, names, inferred={names[0]: other}, controls=False)
  assert found[0].labels == tuple(sorted(other))
  assert [own.labels for own in found[1:]] == [own.labels for own in by_rule[1:]]
  assert {own.labels_source for own in found} == {'inferred'}
  told = {name: by_rule[k].labels for k, name in enumerate(names)}
  known = attack_observation(
    observation, config, names, labels=told, inferred={names[0]: other}, controls=False
  )
  assert (known[0].labels, known[0].labels_source) == (by_rule[0].labels, 'known')
  with pytest.raises(UserError, match='labels of client_00: label 7 is not in'):
    attack_observation(observation, config, names[:1], inferred={names[0]: [7] * len(other)})


def test_the_mean_of_all_clients_is_attacked_as_one_batch():
  images = smooth_images(2, seed=3)
  model = small_model(num_classes=5)
  apart = play_round(model, [(images[:1], [3]), (images[1:], [1])])
  together = play_round(model, [(images, [3, 1])])
  for a, b in zip(apart.aggregate.trainable, together.clients[0].update.trainable, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  result = attack_observation(apart, AttackConfig(iterations=300, xla='off'), [AGGREGATE])[0]
  found = result.reconstructions['attack']
  assert result.labels == (1, 3)
  assert np.mean([psnr(found[0], images[1]), psnr(found[1], images[0])]) > 20


def test_damaged_checkpoint_is_named(observation, tmp_path):
  path = tmp_path / 'checkpoint.safetensors'
  path.write_bytes(b'not safetensors')
  with pytest.raises(UserError, match=r'checkpoint\.safetensors'):
    attack_observation(observation, _SHORT, ['client_00'], checkpoint_path=path)


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    (lambda a: a * 0, 'all zeros'),
    (lambda a: a * np.nan, 'not finite'),
    (lambda a: a * 1e30, 'stopped being finite'),
  ],
  ids=['zero', 'nan', 'overflow'],
)
def test_failed_targets_say_why_and_have_no_reconstruction(observation, shared, change, reason):
  client = observation.clients[0]
  update = WeightArrays(tuple(change(array) for array in client.update.trainable))
  broken = dataclasses.replace(
    observation, clients=(dataclasses.replace(client, update=update), observation.clients[1])
  )
  first, second = attack_observation(broken, _SHORT, shared=shared)
  assert first.status == 'failed'
  assert reason in first.reason
  assert first.loss is None
  assert set(first.reconstructions) == {'prior_only', 'mean_image'}
  assert second.status == 'ok'


def test_results_survive_the_files(observation, shared, tmp_path):
  results = attack_observation(observation, _SHORT, shared=shared)
  write_results(tmp_path, results)
  again = read_results(tmp_path)
  for a, b in zip(results, again, strict=True):
    assert a.as_dict() == b.as_dict()
    for name, images in a.reconstructions.items():
      np.testing.assert_array_equal(images, b.reconstructions[name])
  # What is finished is kept and not computed again.
  kept = attack_observation(
    observation, dataclasses.replace(_SHORT, iterations=1), finished=again[:1], controls=False
  )
  assert kept[0].loss == results[0].loss
  assert kept[1].loss > results[1].loss


def test_a_batch_is_recovered_as_a_set():
  images = smooth_images(2, seed=3)
  # With two classes an untrained net sends little more than the difference of the two images.
  observation = play_round(small_model(num_classes=5), [(images, [3, 1])])
  result = attack_observation(observation, AttackConfig(iterations=300, xla='off'))[0]
  assert result.labels == (1, 3)
  found = result.reconstructions['attack']
  assert np.mean([psnr(found[0], images[1]), psnr(found[1], images[0])]) > 20


def test_threat_model_and_warnings_follow_what_is_used(observation):
  inferred = ' '.join(threat_model(observation, _SHORT, labels_known=False))
  told = ' '.join(threat_model(observation, _SHORT, labels_known=True))
  between = dataclasses.replace(_SHORT, simulation='between')
  assert 'infers the labels' in inferred
  assert 'told the labels' in told
  assert 'batch size 1,' in told
  own = dataclasses.replace(observation.clients[0], batch_size=8)
  mixed = dataclasses.replace(observation, clients=(own, *observation.clients))
  assert 'batch size 1 to 8 (that of each client)' in ' '.join(
    threat_model(mixed, _SHORT, labels_known=True)
  )
  assert warnings(observation, observation.clients, _SHORT) == []
  several = play_round(small_model(), [(smooth_images(2), [0, 1])], steps=2)
  assert warnings(several, several.clients, _SHORT) == []
  assert 'not exact' in warnings(several, several.clients, between)[0]
  training = dataclasses.replace(several.client_training, batch_size=1, local_epochs=2)
  shuffled = dataclasses.replace(
    several,
    client_training=training,
    clients=tuple(dataclasses.replace(client, num_steps=4) for client in several.clients),
  )
  assert 'the best of up to 16' in warnings(shuffled, shuffled.clients, _SHORT)[0]
  for changes in ({'orders': 1}, {'joint_labels': True}):
    first = dataclasses.replace(_SHORT, **changes)
    assert 'one is assumed' in warnings(shuffled, shuffled.clients, first)[0]
    assert 'orders' not in ' '.join(threat_model(shuffled, first, labels_known=False))
  assert 'up to 16 orders' in ' '.join(threat_model(shuffled, _SHORT, labels_known=False))
  assert 'orders' not in ' '.join(threat_model(several, _SHORT, labels_known=False))
  # Over rounds every order is another.
  assert warnings(several, several.clients, _SHORT, num_rounds=2) == []
  layers = [small_model(), tf.keras.layers.Dropout(0.5, name='drops')]
  drops = play_round(tf.keras.Sequential(layers), [(smooth_images(1), [1])])
  (warning,) = warnings(drops, drops.clients, _SHORT)
  assert "layer 'drops' of the model draws at random" in warning
  once = dataclasses.replace(
    shuffled,
    client_training=dataclasses.replace(training, local_epochs=1),
    clients=tuple(dataclasses.replace(client, num_steps=2) for client in several.clients),
  )
  # Which of two labels came first the server is not told either.
  assert len(warnings(once, once.clients, _SHORT)) == 1
  assert 'from the second round on' in warnings(once, once.clients, _SHORT, num_rounds=2)[1]


def test_unknown_target(observation):
  with pytest.raises(UserError, match="no client 'client_07'"):
    attack_observation(observation, _SHORT, ['client_07'])
