"""What clients send under shadow noise, linearised, and the bounds that follow of any attack."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from binaries.attacked_rounds import parse_strength
from tff_shadow.aggregators.shadow_noise import DEFAULT_FLOOR
from tff_shadow.models import classification_loss
from tff_shadow.observations import Truth
from tff_shadow.privacy import (
  cramer_rao_bound,
  fit_gaussian_prior,
  gaussian_floor,
  gradient_jacobian,
  image_noise_variances,
  pixel_weights,
  through_image_noise,
  unbiased_floor,
  update_information,
  van_trees_bound,
)


class LinearisedRelease:
  """Gradients that clients send of one image each, under the noises of the adaptive table."""

  def __init__(
    self,
    model: tf.keras.Model,
    clients: Sequence[Truth],
    public_images: np.ndarray,
    floor: float = DEFAULT_FLOOR,
  ):
    """Fits the prior; J is computed when noise on the update first needs it.

    Args:
      model: With the weights that the round starts from.
      clients: What each trained on, one image of the same shape each.
      public_images: [N, H, W, C] in [0, 1], at least three.
      floor: Share of the energy of noise on the update that is isotropic.
    """
    self._floor = floor
    self._model = model
    self._clients = list(clients)
    self._prior = fit_gaussian_prior(public_images).information()
    # Per noise of ratio 1; noise of other ratios has its square times as much variance.
    self._information: dict[str, np.ndarray] = {}
    self._scales: list[float] = []

  def errors(self, shape: str, strength: str) -> tuple[float, float]:
    """Least mean squared region errors, averaged over the clients.

    Args:
      shape: Of the noise, one of `NOISE_SHAPES`, but for decoy noise.
      strength: As `binaries.attacked_rounds.parse_strength` reads it: a ratio, or images:S.

    Returns:
      Of attackers without bias (Cramer-Rao; infinite where the release does not identify the
      region), and of those that know the prior (van Trees).

    Raises:
      ValueError: For scale:S, an absolute strength of noise on the update, and for decoy noise.
    """
    if shape == 'decoy':
      raise ValueError('there are no bounds of decoy noise')
    kind, value = parse_strength(strength)
    if kind == 'scale':
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
      information = self._mean_information(shape) / value**2
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

  def _mean_information(self, shape: str) -> np.ndarray:
    """Of noise of ratio 1; of correlated noise, its floor alone."""
    floor = 'isotropic' if shape == 'correlated' else shape
    if floor not in self._information:
      self._scales = []
      for shape_of in ('isotropic', 'diagonal'):
        self._information[shape_of] = 0.0
      for client in self._clients:
        self._add(client)
    information = self._information[floor]
    return information / self._floor if shape == 'correlated' else information

  def _add(self, client: Truth) -> None:
    jacobian = gradient_jacobian(self._model, client.images, client.labels)
    energy = self._gradient_energy(client)
    num_weights = len(jacobian)
    squared_map = image_noise_variances(client.regions[0], 1.0, client.images.shape[-1])
    squared = np.zeros(num_weights)
    for column in np.flatnonzero(squared_map):
      squared += squared_map[column] * np.square(jacobian[:, column], dtype=np.float64)
    shares = {
      'isotropic': np.full(num_weights, 1 / num_weights),
      'diagonal': (1 - self._floor) * np.sqrt(squared) / np.sqrt(squared).sum()
      + self._floor / num_weights,
    }
    for shape, share in shares.items():
      own = update_information(jacobian, energy * share) / len(self._clients)
      self._information[shape] = self._information[shape] + own
    # Tau of correlated noise of ratio 1.
    self._scales.append(float(np.sqrt((1 - self._floor) * energy / squared.sum())))

  def _gradient_energy(self, client: Truth) -> float:
    loss_fn = classification_loss(self._model)
    with tf.GradientTape() as tape:
      loss = loss_fn(client.labels, self._model(client.images, training=True))
    gradient = tape.gradient(loss, self._model.trainable_variables)
    return sum(float(np.square(t.numpy(), dtype=np.float64).sum()) for t in gradient)
