"""The label of a client's one image, by what updates of each label have in common.

The rules of `attacks.labels` read a few entries of the last layer. Without noise they are exact;
but noise of the whole update hides these long before it hides what all entries together tell. With
clients of public images, whose labels it knows, an attacker fits Fisher's linear discriminant: the
likelihood of normal updates with a mean for each label and one covariance, of what images of a
label differ by and of the noise. Behind much white noise that is the matched filter, the difference
of the labels' means. How common labels are is not used: nobody knows that of the clients.

Which rule is used is decided on played clients: that of the last layer, unless the discriminant is
right more often on clients of images that it was not fitted on.
"""

from typing import NamedTuple

import numpy as np
from sklearn.covariance import ledoit_wolf

from attacks.adaptive.simulated_updates import noise_moments

# Defended clients of each half of the images, for a discriminant to be tried on the other half.
_LEAST_CLIENTS = 3


class PlayedLabels(NamedTuple):
  """Played clients with one image each.

  Attributes:
    clean: [N, k + c], what is seen of their updates without noise, norms last.
    noise: [n, k], by how much the defended ones of the first n differ, in units of `loudness`.
    norm_errors: [n, c], by how much their norms do.
    loudness: [N], of the noise, not of the errors.
    labels: int [N].
    images: int [N], which of the public images each has.
  """

  clean: np.ndarray
  noise: np.ndarray
  norm_errors: np.ndarray
  loudness: np.ndarray
  labels: np.ndarray
  images: np.ndarray

  @property
  def defended(self) -> np.ndarray:
    """[n, k + c], what is seen of the first n under the defence."""
    count = len(self.noise)
    noise = self.noise * self.loudness[:count, None]
    return self.clean[:count] + np.concatenate([noise, self.norm_errors], axis=1)

  def some(self, chosen: np.ndarray) -> 'PlayedLabels':
    """Those of bool [N]."""
    first = chosen[: len(self.noise)]
    return PlayedLabels(
      self.clean[chosen],
      self.noise[first],
      self.norm_errors[first],
      self.loudness[chosen],
      self.labels[chosen],
      self.images[chosen],
    )


class LabelDiscriminant:
  """Fitted on played clients; called with what is seen of others [M, k + c] it gives int [M]."""

  def __init__(self, played: PlayedLabels):
    """Fits it."""
    self._labels, places = np.unique(played.labels, return_inverse=True)
    centers = np.stack([played.clean[places == own].mean(axis=0) for own in np.unique(places)])
    shift, covariance = noise_moments(played.noise, played.norm_errors)
    covariance += ledoit_wolf(played.clean - centers[places], assume_centered=True)[0]
    # Features that nothing moves count for nothing.
    covariance += 1e-9 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    self._weights = np.linalg.solve(covariance, centers.T)
    self._offsets = np.sum((centers.T / 2 + shift[:, None]) * self._weights, axis=0)

  def __call__(self, seen: np.ndarray) -> np.ndarray:
    """See above."""
    return self._labels[np.argmax(seen @ self._weights - self._offsets, axis=1)]


def chosen_rule(
  played: PlayedLabels, inferred: np.ndarray
) -> tuple[LabelDiscriminant | None, np.ndarray]:
  """The rule that is right more often on played clients.

  Args:
    played: See there.
    inferred: int [n], labels of the defended clients by the rule of the last layer.

  Returns:
    None for that rule, or the discriminant of all clients. And int [n], what the chosen rule makes
    of the defended ones, where the discriminant has seen none of their images.
  """
  found = _unseen_labels(played)
  truth = played.labels[: len(inferred)]
  if found is None or np.sum(found == truth) <= np.sum(inferred == truth):
    return None, inferred
  return LabelDiscriminant(played), found


def _unseen_labels(played: PlayedLabels) -> np.ndarray | None:
  """Of each defended client by clients of the other half of the images; None if they are few."""
  halves = played.images % 2
  found = np.zeros(len(played.noise), played.labels.dtype)
  for half in (0, 1):
    fitted, own = played.some(halves != half), halves[: len(found)] == half
    if len(fitted.noise) < _LEAST_CLIENTS:
      return None
    if own.any():
      found[own] = LabelDiscriminant(fitted)(played.defended[own])
  return found
