"""What clients send under shadow noise, linearised, and the bounds that follow of any attack."""

import functools
from collections.abc import Collection, Sequence

import numpy as np
import tensorflow as tf

from binaries.attacked_rounds import parse_strength
from tff_shadow.aggregators.shadow_noise import floor_of
from tff_shadow.learning.decoys import DecoyBatches
from tff_shadow.models import classification_loss, graph_function
from tff_shadow.observations import Truth
from tff_shadow.privacy import (
  cramer_rao_bound,
  fit_gaussian_prior,
  gaussian_floor,
  gradient_jacobian,
  image_gradients,
  image_noise_variances,
  pixel_weights,
  spread_information,
  through_image_noise,
  unbiased_floor,
  update_information,
  van_trees_bound,
)
from tff_shadow.shadow.sensitivity import gradient_and_derivatives

# Varied public images from which the covariance of decoy noise is taken, and draws of which the
# energies are averaged.
_DECOY_SAMPLES = 1024
_DRAWS = 256


class LinearisedRelease:
  """Gradients that clients send of one image each, under the noises of the adaptive table."""

  def __init__(
    self,
    model: tf.keras.Model,
    clients: Sequence[Truth],
    public_images: np.ndarray,
    shapes: Collection[str],
    *,
    floor: float | None = None,
    decoys: DecoyBatches | None = None,
  ):
    """Fits the prior; J is computed when noise on the update first needs it.

    Args:
      model: With the weights that the round starts from.
      clients: What each trained on, one image of the same shape each.
      public_images: [N, H, W, C] in [0, 1], at least three.
      shapes: Of the noises that it is asked about, of `NOISE_SHAPES`.
      floor: Share of the energy of noise on the update that is isotropic; by default that of each
        shape.
      decoys: Of decoy noise, of `ShadowNoise.decoys` images.

    Raises:
      ValueError: If there shall be decoy noise and no decoys.
    """
    if 'decoy' in shapes and decoys is None:
      raise ValueError('the bounds of decoy noise need its decoys')
    self._shapes = frozenset(shapes)
    self._floors = {shape: floor_of(shape, floor) for shape in self._shapes}
    self._decoys = decoys
    self._model = model
    self._clients = list(clients)
    self._prior = fit_gaussian_prior(public_images).information()
    # By shape and kind of strength, of noise of strength 1; that of another one has its square
    # times as much variance. Of correlated noise, its floor alone.
    self._information: dict[tuple[str, str], np.ndarray] = {}
    self._scales: list[float] = []

  def errors(self, shape: str, strength: str) -> tuple[float, float]:
    """Least mean squared region errors, averaged over the clients.

    Args:
      shape: Of the noise, one of those announced.
      strength: As `binaries.attacked_rounds.parse_strength` reads it: a ratio; images:S of
        correlated noise; scale:S of decoy noise.

    Returns:
      Of attackers without bias (Cramer-Rao; infinite where the release does not identify the
      region), and of those that know the prior (van Trees). Decoy noise counts as normal with its
      covariance: what a linear estimate makes of it follows from that alone.

    Raises:
      ValueError: For an absolute strength of other noise on the update, or another shape.
    """
    if shape not in self._shapes:
      raise ValueError(f'shape must be one of {sorted(self._shapes)}, found {shape!r}')
    kind, value = parse_strength(strength)
    if kind == 'scale' and shape != 'decoy':
      raise ValueError(f'strength must be a ratio or images:S, found {strength}')
    pairs = []
    for index, client in enumerate(self._clients):
      region, channels = client.regions[0], client.images.shape[-1]
      weights = pixel_weights(region, channels)
      if kind == 'images':
        variances = image_noise_variances(region, value, channels)
        pairs.append(
          (unbiased_floor(weights, variances), gaussian_floor(self._prior, weights, variances))
        )
        continue
      if not self._information:
        for own in self._clients:
          self._add(own)
      # Of one image in one step both ratios are the same.
      information = self._information[shape, 'scale' if kind == 'scale' else 'ratio'] / value**2
      if shape == 'correlated':
        tau = value * self._scales[index]
        information = through_image_noise(information, image_noise_variances(region, tau, channels))
      pairs.append(
        (
          cramer_rao_bound(information, weights),
          van_trees_bound(information, self._prior, weights),
        )
      )
    return tuple(np.mean(pairs, axis=0))

  def _add(self, client: Truth) -> None:
    jacobian = gradient_jacobian(self._model, client.images, client.labels)
    energy = self._gradient_energy(client)
    plain = squared = None
    if self._shapes - {'diagonal'}:
      plain = update_information(jacobian, 1.0)
    if self._shapes & {'diagonal', 'correlated'}:
      squared = self._squared_sensitivity(client, jacobian)
    own = {}
    if 'isotropic' in self._shapes:
      own['isotropic', 'ratio'] = plain * len(jacobian) / energy
    if 'diagonal' in self._shapes:
      floor = self._floors['diagonal']
      deviations = np.sqrt(squared)
      shares = (1 - floor) * deviations / deviations.sum() + floor / len(jacobian)
      own['diagonal', 'ratio'] = update_information(jacobian, energy * shares)
    if 'correlated' in self._shapes:
      floor = self._floors['correlated']
      own['correlated', 'ratio'] = plain * len(jacobian) / (floor * energy)
      # Tau of correlated noise of ratio 1.
      self._scales.append(float(np.sqrt((1 - floor) * energy / squared.sum())))
    if 'decoy' in self._shapes:
      own |= self._beside_decoys(jacobian, plain, energy)
    for key, information in own.items():
      self._information[key] = self._information.get(key, 0.0) + information / len(self._clients)

  def _squared_sensitivity(self, client: Truth, jacobian: np.ndarray) -> np.ndarray:
    """S_j^2 [N] of the client's region."""
    squared_map = image_noise_variances(client.regions[0], 1.0, client.images.shape[-1])
    squared = np.zeros(len(jacobian))
    for column in np.flatnonzero(squared_map):
      squared += squared_map[column] * np.square(jacobian[:, column], dtype=np.float64)
    return squared

  def _beside_decoys(
    self, jacobian: np.ndarray, plain: np.ndarray, energy: float
  ) -> dict[tuple[str, str], np.ndarray]:
    """Of decoy noise of scale 1 and of ratio 1, an update of this energy."""
    floor, num_weights = self._floors['decoy'], len(jacobian)
    spread, products, drawn = self._decoy_spread
    shared = spread @ jacobian
    # The floor follows each draw, a ratio scales it.
    scales = {'scale': (1.0, drawn / (1 - floor)), 'ratio': ((1 - floor) * energy / drawn, energy)}
    return {
      ('decoy', kind): spread_information(
        plain, shared, products, floor * all_of / num_weights, own
      )
      for kind, (own, all_of) in scales.items()
    }

  @functools.cached_property
  def _decoy_spread(self) -> tuple[np.ndarray, np.ndarray, float]:
    """Deviations [M, N] of decoys' gradients over sqrt(M), their products, and the energy of noise.

    The last is the harmonic mean over draws: the information beside the floor is in proportion to
    its inverse.
    """
    images, labels = self._decoys.batch(tf.constant([0, 0]), 0, _DECOY_SAMPLES)
    gradients = image_gradients(self._model, images, labels)
    spread = (gradients - gradients.mean(axis=0)) / np.sqrt(len(gradients))
    wide = spread.astype(np.float64)

    def energy(key):
      weights = self._model.trainable_variables
      return self._decoys.difference(self._mean_gradient, key, tf.constant(1.0), weights)[1]

    energy = graph_function(energy, self._model)
    keys = np.random.default_rng(0).integers(-(2**31), 2**31, (_DRAWS, 2))
    drawn = 1 / np.mean([1 / float(energy(tf.constant(key, tf.int32))) for key in keys])
    return spread, wide @ wide.T, drawn

  def _mean_gradient(self, images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
    loss_fn = classification_loss(self._model)
    return gradient_and_derivatives(
      lambda x: loss_fn(labels, self._model(x, training=True)),
      self._model.trainable_variables,
      images,
      [],
    )[0]

  def _gradient_energy(self, client: Truth) -> float:
    gradient = self._mean_gradient(tf.constant(client.images), tf.constant(client.labels))
    return sum(float(np.square(t.numpy(), dtype=np.float64).sum()) for t in gradient)
