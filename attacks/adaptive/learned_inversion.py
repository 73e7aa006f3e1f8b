"""A network that turns what a client sent into its images, learned on rounds that were simulated.

Wu et al. 2023, "Learning to invert: simple adaptive attacks for gradient inversion in federated
learning": the defence is simulated on public images, and a network learns to give the images back
from the update. Trained on the squared error it approaches the posterior mean, so that it finds
what no search for a match finds under strong noise: brightness, colour and what else shows in many
entries at once.

The network sees what `attacks.adaptive.simulated_updates` keeps of an update. To that of undefended
updates the noise is added anew in every step, with the mean and the covariance that it has in
simulated defended ones, louder where the update is longer if it is so there; few of these are
enough, and the network cannot learn them by heart. Where it is so, the norm of what a client sends
tells that of its gradient, however strong the noise is, and the network sees that too. Of clients
whose images it has not seen follows when it was at its best. What an image does to a gradient
depends on its label, most plainly by its sign, and the label is easily inferred: there is a linear
estimate for each label, or combination of labels in a batch, to begin with. Strong noise hides
labels too, so the network is trained with labels that are taken for others as often as those of
simulated defended clients are. Of clients with one image the same features tell the label too,
where that is right more often than the reader: see `attacks.adaptive.label_inference`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from sklearn.covariance import ledoit_wolf

from attacks.adaptive.label_inference import LabelDiscriminant, PlayedLabels, chosen_rule
from attacks.adaptive.players import NO_EQUIPMENT, Equipment
from attacks.adaptive.simulated_updates import (
  SimulatedClients,
  SimulatedUpdates,
  noise_moments,
)
from attacks.local_steps import local_steps
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.observations import ClientObservation, Observation, WeightArrays
from tff_shadow.shadow.augmentation import check_augmentations

# More combinations of labels than these are not told apart.
_MAX_KINDS = 8
# Steps between two looks at clients that are not trained on, and draws of noise for each of them.
_CHECK_EVERY = 100
_DRAWS = 4


@dataclasses.dataclass(frozen=True)
class InversionSettings:
  """How much is simulated, and how the network is trained.

  Attributes:
    clients: Undefended clients to simulate, of augmented public images.
    defended_clients: At most so many of them are simulated under the defence too, for the noise.
    basis_clients: At most so many of them give the directions; fewer for large models.
    features: Numbers that the network sees of an update, at most.
    components: Principal components of the images that it gives back, at most.
    steps: Training steps.
    batch_size: Clients a step.
    width: Of both hidden layers.
    dropout: Share of their units that is left out.
    learning_rate: Of AdamW; falls along half a cosine.
    augmentations: Of `tff_shadow.shadow.augmentation.AUGMENTATIONS`.
    seed: Decides everything.
  """

  clients: int = 3000
  defended_clients: int = 400
  basis_clients: int = 1000
  features: int = 192
  components: int = 256
  steps: int = 1500
  batch_size: int = 128
  width: int = 512
  dropout: float = 0.1
  learning_rate: float = 1e-3
  augmentations: tuple[str, ...] = ()
  seed: int = 0

  def __post_init__(self):
    """Raises `ValueError` for settings that train nothing."""
    for name in ('clients', 'defended_clients', 'basis_clients'):
      if getattr(self, name) < 3:
        raise ValueError(f'{name} must be at least 3, found {getattr(self, name)}')
    for name in ('features', 'components', 'steps', 'batch_size', 'width'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1, found {getattr(self, name)}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout must be in [0, 1), found {self.dropout}')
    check_augmentations(self.augmentations)


class LabelReader(NamedTuple):
  """How an attacker infers labels.

  Attributes:
    shown: From the place of a round and a client's update in it to what that shows of its labels,
      which is kept for many clients.
    labels: From what a client's updates in all rounds show to its labels [B].
  """

  shown: Callable[[int, WeightArrays], Any]
  labels: Callable[[Sequence[Any]], Sequence[int]]


class LearnedInversion:
  """Trained for rounds under their defence; called with the updates of a client."""

  def __init__(
    self,
    observations: Sequence[Observation],
    like: ClientObservation,
    public: Examples,
    settings: InversionSettings,
    *,
    reader: LabelReader | None = None,
    equipment: Equipment = NO_EQUIPMENT,
    progress: Callable[[int, str], None] = lambda done, detail: None,
  ):
    """Simulates the clients and trains the network.

    Args:
      observations: The rounds; a client trained on the same images in each.
      like: Whose numbers of images and steps the clients have.
      public: Images of the modality with labels and regions, of no attacked client.
      settings: See there.
      reader: How the attacker infers labels where they are not learned; by default it is told them.
      equipment: With which the defence is played.
      progress: Called with how far it is, from 0 to `settings.clients`, and with what it does.

    Raises:
      UserError: If the defence cannot be played, there are no public images, or the training
        diverged.
    """
    if not len(public):
      raise UserError('the learned inversion needs public images')
    self._settings = settings
    self._image_shape = observations[0].image_shape
    self._like = like
    self._training = observations[0].client_training
    clients = SimulatedClients(
      public, like, settings.clients, settings.augmentations, settings.seed
    )
    self._kinds = _Kinds(clients.labels)
    self._rounds = []
    for index, seen in enumerate(observations):

      def show(done, what, index=index):
        progress(round((index + done) / len(observations) * settings.clients), what)

      self._rounds.append(
        SimulatedUpdates(
          seen,
          like,
          clients,
          num_defended=settings.defended_clients,
          num_basis=settings.basis_clients,
          num_features=settings.features,
          shown=None if reader is None else functools.partial(reader.shown, index),
          equipment=equipment,
          is_first=not index,
          progress=show,
        )
      )
    inferred = clients.labels[: settings.defended_clients]
    if reader is not None:
      by_client = zip(*(own.shown for own in self._rounds), strict=True)
      inferred = np.stack([reader.labels(shown) for shown in by_client])
    clean = np.concatenate([own.clean for own in self._rounds], axis=1)
    noise = np.concatenate([own.noise for own in self._rounds], axis=1)
    # Several rounds show much the same: the directions in which they together differ most.
    self._mean = clean.mean(axis=0)
    _, _, directions = np.linalg.svd(clean - self._mean, full_matrices=False)
    self._directions = directions[: settings.features].T.astype(np.float32)
    clean = (clean - self._mean) @ self._directions
    loudness = np.mean([own.loudness for own in self._rounds], axis=0)
    noise = noise @ self._directions / loudness[: len(noise), None]
    norms = np.concatenate([own.norms for own in self._rounds], axis=1)
    errors = np.concatenate([own.norm_errors[: len(noise)] for own in self._rounds], axis=1)
    # As large as what is seen best: they stand out of what is taken for chance.
    self._mean_norms = norms.mean(axis=0)
    self._norm_unit = (clean[:, 0].std() or 1.0) / norms.std(axis=0)
    clean = np.concatenate([clean, (norms - self._mean_norms) * self._norm_unit], axis=1)
    errors = errors * self._norm_unit
    self._label_rule: LabelDiscriminant | None = None
    if reader is not None and like.num_images == 1:
      played = PlayedLabels(
        clean, noise, errors, loudness, clients.labels[:, 0], clients.chosen[:, 0]
      )
      self._label_rule, best = chosen_rule(played, inferred[:, 0])
      inferred = best[:, None]
    self._train(
      clean,
      noise,
      errors,
      loudness,
      clients.images(),
      self._kinds.as_inferred(clients.labels, inferred, settings.seed),
      clients.held_out,
      lambda step: progress(settings.clients, f'training, step {step}'),
    )

  def fits(self, client: ClientObservation) -> bool:
    """Whether a client has as many images and steps as those that it has learned from."""
    own, other = (local_steps(one, self._training) for one in (client, self._like))
    return client.num_images == self._like.num_images and own == other

  def __call__(self, updates: Sequence[WeightArrays], labels: Sequence[int]) -> np.ndarray:
    """The images of a client, float32 [B, H, W, C] in [0, 1], in an order of their own.

    Args:
      updates: What it sent in each round; of a client that `fits`.
      labels: Of its images, in any order, as far as they are known.
    """
    kind = self._kinds.index(labels)
    seen = (self._seen(updates) - self._centers[kind]) / self._scale
    inputs = (tf.constant(seen[None], tf.float32), tf.constant([kind]))
    coefficients = self._network(inputs, training=False).numpy()[0]
    images = self._mean_images[kind] + coefficients @ self._components
    images = images.reshape(self._like.num_images, *self._image_shape)
    return np.clip(images, 0, 1).astype(np.float32)

  @property
  def reads_labels(self) -> bool:
    """Whether `labels` are right more often than those of the reader, on simulated clients."""
    return self._label_rule is not None

  def labels(self, updates: Sequence[WeightArrays]) -> tuple[int, ...] | None:
    """The labels of a client that `fits`, by what updates of each label have in common.

    Args:
      updates: What it sent in each round; finite.

    Returns:
      None unless it `reads_labels`.
    """
    if self._label_rule is None:
      return None
    return (int(self._label_rule(self._seen(updates)[None])[0]),)

  def _seen(self, updates: Sequence[WeightArrays]) -> np.ndarray:
    """[k + c], of what a client sent in each round."""
    sent = list(zip(self._rounds, updates, strict=True))
    features = np.concatenate([own.features_of(update) for own, update in sent])
    norms = np.concatenate([own.norms_of(update) for own, update in sent])
    return np.concatenate(
      [(features - self._mean) @ self._directions, (norms - self._mean_norms) * self._norm_unit]
    )

  def _train(self, clean, noise, norm_errors, loudness, images, kinds, held_out, progress) -> None:
    """Of N simulated clients.

    Args:
      clean: [N, k + c], what is seen of their undefended updates, and what the norms of defended
        ones are expected to be.
      noise: [n, k], by how much the defended ones of the first n differ, in units of `loudness`.
      norm_errors: [n, c], by how much their norms do.
      loudness: [N], of the noise, not of the errors.
      images: [N, D].
      kinds: int [N], of their labels as they are inferred.
      held_out: bool [N], who is not trained on.
      progress: Called with steps.
    """
    settings = self._settings
    mean_noise, covariance = noise_moments(noise, norm_errors)
    exact = np.ones((len(clean), norm_errors.shape[1]))
    loudness = np.concatenate([np.repeat(loudness[:, None], noise.shape[1], axis=1), exact], axis=1)
    own = [kinds == kind for kind in range(len(self._kinds))]
    # What is never inferred stands for nothing in particular.
    groups = [group if group.any() else np.ones_like(group) for group in own]
    self._centers = np.stack([clean[own].mean(axis=0) for own in groups])
    self._mean_images = np.stack([images[own].mean(axis=0) for own in groups])
    clean = clean - self._centers[kinds]
    centered = images - self._mean_images[kinds]
    self._scale = np.sqrt(clean.var(axis=0) + np.diag(covariance))
    _, singular, components = np.linalg.svd(centered, full_matrices=False)
    self._components = components[: settings.components]
    coefficients = centered @ self._components.T
    estimates = [
      self._scale[:, None] * _best_linear(clean[own], coefficients[own], covariance)
      for own in groups
    ]
    deviations = singular[: settings.components] / np.sqrt(len(images))
    self._network = _network(settings, np.stack(estimates), deviations)
    variables = self._network.trainable_variables
    schedule = tf.keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.steps)
    optimizer = tf.keras.optimizers.AdamW(schedule, weight_decay=1e-3)
    optimizer.build(variables)
    clean, shift, root, loudness, scale, coefficients = (
      tf.constant(array, tf.float32)
      for array in (
        clean,
        mean_noise,
        _root(covariance),
        loudness,
        self._scale,
        coefficients,
      )
    )
    kinds = tf.constant(kinds, tf.int32)
    trained, unseen = (tf.constant(np.flatnonzero(own)) for own in (~held_out, held_out))

    def error(chosen, seed, training):
      own = tf.gather(clean, chosen)
      draws = tf.random.stateless_normal(tf.shape(own), seed)
      noise = shift + tf.matmul(draws, root, transpose_b=True)
      inputs = (own + tf.gather(loudness, chosen) * noise) / scale
      found = self._network((inputs, tf.gather(kinds, chosen)), training=training)
      errors = tf.square(found - tf.gather(coefficients, chosen))
      return tf.reduce_mean(tf.reduce_sum(errors, axis=1))

    @tf.function(autograph=False)
    def step(seed):
      seeds = tf.random.experimental.stateless_split(seed, 2)
      places = tf.random.stateless_uniform(
        [settings.batch_size], seeds[0], 0, len(trained), tf.int32
      )
      with tf.GradientTape() as tape:
        loss = error(tf.gather(trained, places), seeds[1], True)
      optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    @tf.function(autograph=False)
    def unseen_error():
      return error(tf.repeat(unseen, _DRAWS), tf.constant([settings.seed, -1]), False)

    # Without any to try it on it stays linear.
    steps = settings.steps if len(unseen) else 0
    best, weights = np.inf, self._network.get_weights()
    for count in range(steps + 1):
      if steps and (count % _CHECK_EVERY == 0 or count == steps):
        own = float(unseen_error())
        if not np.isfinite(own):
          raise UserError(f'the learned inversion diverged before step {count}')
        if own < best:
          best, weights = own, self._network.get_weights()
        progress(count)
      if count < steps:
        step(tf.constant([settings.seed, count]))
    self._network.set_weights(weights)


class _Kinds:
  """The combinations of labels that clients have; all one where there are too many."""

  def __init__(self, labels: np.ndarray):
    """Takes those of clients, int32 [N, B]."""
    known = np.unique(np.sort(labels, axis=1), axis=0)
    self._known = known if len(known) <= _MAX_KINDS else known[:1]

  def __len__(self) -> int:
    return len(self._known)

  def index(self, labels: Sequence[int]) -> int:
    """Which one labels [B] are in any order, or come nearest to."""
    return int(np.argmin(np.count_nonzero(self._known != np.sort(labels), axis=1)))

  def as_inferred(self, labels: np.ndarray, inferred: np.ndarray, seed: int) -> np.ndarray:
    """Which one each of labels [N, B] is taken for, drawn as it was inferred [n, B] of the first n.

    Args:
      labels: See above.
      inferred: See above; n is at most N.
      seed: Decides the draws.

    Returns:
      int [N].
    """
    true, taken = (np.array([self.index(one) for one in rows]) for rows in (labels, inferred))
    drawn = true.copy()
    rng = np.random.default_rng(seed)
    for kind in np.unique(true[: len(taken)]):
      as_what = taken[true[: len(taken)] == kind]
      own = true == kind
      drawn[own] = rng.choice(as_what, np.count_nonzero(own))
    return drawn


def _best_linear(
  clean: np.ndarray, coefficients: np.ndarray, noise_covariance: np.ndarray
) -> np.ndarray:
  """[k, q], from centred features with noise to coefficients: the least mean squared error."""
  covariance = ledoit_wolf(clean, assume_centered=True)[0] + noise_covariance
  # Features that nothing moves count for nothing.
  covariance += 1e-9 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
  return np.linalg.solve(covariance, clean.T @ coefficients / len(clean))


def _root(covariance: np.ndarray) -> np.ndarray:
  """R with R R' = covariance, which may be singular."""
  values, vectors = np.linalg.eigh(covariance)
  return vectors * np.sqrt(np.maximum(values, 0))


def _network(
  settings: InversionSettings, estimates: np.ndarray, deviations: np.ndarray
) -> tf.keras.Model:
  """Features, kind -> coefficients: a linear estimate, and what two hidden layers add to it."""
  tf.keras.utils.set_random_seed(settings.seed)
  kinds, features, coefficients = estimates.shape
  seen, kind = tf.keras.Input((features,)), tf.keras.Input((), dtype=tf.int32)
  # The features in the place of their kind, and zeros in those of the others.
  gates = tf.one_hot(kind, kinds)
  inputs = x = tf.keras.layers.Flatten()(gates[:, :, None] * seen[:, None, :])
  for _ in range(2):
    x = tf.keras.layers.Dense(settings.width, activation='gelu')(x)
    x = tf.keras.layers.Dropout(settings.dropout)(x)
  change = tf.keras.layers.Dense(coefficients, kernel_initializer='zeros')(x)
  estimate = tf.keras.layers.Dense(coefficients, use_bias=False)
  outputs = estimate(inputs) + change * tf.constant(deviations, tf.float32)
  estimate.set_weights([estimates.reshape(kinds * features, coefficients).astype(np.float32)])
  return tf.keras.Model([seen, kind], outputs)
