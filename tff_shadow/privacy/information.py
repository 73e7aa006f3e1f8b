"""Fisher information of a client's images for the noises of this package, over one or many rounds.

All are [d, d] for the d pixel values of the client's images, exact, for problems of a size at which
that fits; `probed_bounds` goes without. Noise in an image and correlated noise in an update are one
thing here: n = J(tau m v) + sigma z is what isotropic noise and noise tau m v on the image give.
"""

import numpy as np

from tff_shadow.privacy.region_bounds import checked_information

# Of a Jacobian's rows at a time, in float64: 32 MB at 1,024 pixels.
_CHUNK = 4096


def update_information(jacobian: np.ndarray, variances: float | np.ndarray) -> np.ndarray:
  """J^T Sigma^-1 J for independent noise per weight, computed in float64.

  Args:
    jacobian: [N, d], weights by pixel values.
    variances: Of the noise: one for all weights, or [N].

  Returns:
    float64 [d, d].

  Raises:
    ValueError: If a shape does not fit or a variance is not above 0: a weight without noise gives
      all it knows.
  """
  jacobian = np.asarray(jacobian)
  if jacobian.ndim != 2:
    raise ValueError(f'jacobian must be [weights, pixels], found shape {jacobian.shape}')
  variances = np.asarray(variances, np.float64)
  if variances.shape not in ((), (len(jacobian),)):
    raise ValueError(f'variances must be one or {len(jacobian)}, found shape {variances.shape}')
  if not ((variances > 0) & np.isfinite(variances)).all():
    raise ValueError('variances must be finite and above 0')
  deviations = np.broadcast_to(np.sqrt(variances), (len(jacobian),))
  information = np.zeros((jacobian.shape[1],) * 2)
  for start in range(0, len(jacobian), _CHUNK):
    rows = slice(start, start + _CHUNK)
    whitened = jacobian[rows].astype(np.float64) / deviations[rows, None]
    information += whitened.T @ whitened
  return information


def spread_information(
  plain: np.ndarray, shared: np.ndarray, products: np.ndarray, floor: float, scale: float
) -> np.ndarray:
  """J^T Sigma^-1 J for Sigma = floor 1 + scale U^T U, by Woodbury's identity.

  Args:
    plain: J^T J [d, d].
    shared: U J [M, d]. With U the deviations of M samples over sqrt(M), U^T U is their covariance.
    products: U U^T [M, M].
    floor: Variance of the isotropic part, above 0.
    scale: Not negative.

  Returns:
    float64 [d, d].

  Raises:
    ValueError: If an argument has another form or is out of range.
  """
  plain = checked_information(plain, 'plain')
  products = checked_information(products, 'products')
  if shared.shape != (len(products), len(plain)):
    raise ValueError(
      f'shared must be [{len(products)}, {len(plain)}], found shape {np.shape(shared)}'
    )
  if not (0 < floor < np.inf and 0 <= scale < np.inf):
    raise ValueError(
      f'floor must be above 0 and scale not negative, both finite; found {floor} and {scale}'
    )
  factor = np.linalg.cholesky(floor * np.eye(len(products)) + scale * products)
  left = np.linalg.solve(factor, np.sqrt(scale) * shared)
  return (plain - left.T @ left) / floor


def image_noise_variances(region: np.ndarray, tau: float, channels: int) -> np.ndarray:
  """tau^2 m^2 per pixel value: what `region_noise` times tau adds to the images.

  Args:
    region: [..., 1] in [0, 1].
    tau: In image units, not negative.
    channels: C of the images.

  Returns:
    float64 [d].

  Raises:
    ValueError: If tau is negative or not finite.
  """
  if not 0 <= tau < np.inf:
    raise ValueError(f'tau must be finite and not negative, found {tau}')
  repeated = np.repeat(np.asarray(region, np.float64), channels, axis=-1).reshape(-1)
  return np.square(tau * repeated)


def through_image_noise(information: np.ndarray, variances: np.ndarray) -> np.ndarray:
  """What is left of the information if the images carry Gaussian noise of these variances.

  (D + I^-1)^-1 with D = diag(variances), also where I or D is singular. With I = J^T J / sigma^2 it
  is J^T Sigma^-1 J for Sigma = J D J^T + sigma^2 1, by Woodbury's identity: the correlated shape on
  its floor.

  Args:
    information: [d, d] of the images as the client trains on them.
    variances: [d], not negative; see `image_noise_variances`.

  Returns:
    float64 [d, d], at most `information` and at most D^-1 (as quadratic forms).

  Raises:
    ValueError: If an argument has another form.
  """
  information = checked_information(information)
  variances = np.asarray(variances, np.float64)
  if variances.shape != (len(information),):
    raise ValueError(f'variances must be [{len(information)}], found shape {variances.shape}')
  if not ((variances >= 0) & np.isfinite(variances)).all():
    raise ValueError('variances must be finite and not negative')
  eigenvalues, vectors = np.linalg.eigh(information)
  root = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))
  # R (1 + R^T D R)^-1 R^T with I = R R^T. Woodbury's own difference would cancel where noise in the
  # update is small beside noise in the image.
  factor = np.linalg.cholesky(np.eye(len(root)) + (root.T * variances) @ root)
  left = np.linalg.solve(factor, root.T)
  return left.T @ left


def information_after_rounds(
  information: np.ndarray,
  rounds: int,
  *,
  image_variances: np.ndarray | None = None,
  frozen: bool = True,
) -> np.ndarray:
  """Information of all that is sent in `rounds` rounds at (nearly) the same weights.

  Noise drawn anew each round: T I, so bounds fall as 1/T. Frozen noise in image units: every round
  tells of the same x' = x + n, so the information stays below diag(variances)^-1 however large T
  is. With several rounds at different weights give the mean information per round.

  For frozen noise the value at a finite T takes g to be linear over the noise; the limit does not,
  for all that is sent is then computed from x'.

  Args:
    information: [d, d] of one round, for the noise per weight that is drawn anew each round.
    rounds: At least 1.
    image_variances: [d] of the noise in image units, None for none.
    frozen: Whether that noise is the same in every round.

  Returns:
    float64 [d, d].

  Raises:
    ValueError: If `rounds` is below 1 or an argument has another form.
  """
  if rounds < 1:
    raise ValueError(f'rounds must be at least 1, found {rounds}')
  information = checked_information(information)
  if image_variances is None:
    return rounds * information
  if frozen:
    return through_image_noise(rounds * information, image_variances)
  return rounds * through_image_noise(information, image_variances)
