"""Bounds of the region error that no attack passes, beside shadow noise: results/bounds.csv.

For the rounds of the adaptive table, without any attack: J is the exact derivative of a client's
gradient, and J^T Sigma^-1 J is averaged over the first clients. Two bounds of the region PSNR, each
the PSNR of the mean error:

unbiased_region_psnr: Cramer-Rao, for attackers without bias.
prior_region_psnr: van Trees, for attackers that know what images look like, by a Gaussian prior
fitted to public images; of noise in the images the error of the best linear estimate. It is an
ESTIMATE, no guarantee: images are not Gaussian, so an attack may come above it, and the shape of
diagonal noise depends on the image and so tells of it.
"""

import itertools
import pathlib

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from absl import flags

from binaries import command
from binaries.attacked_rounds import AttackedRounds, parse_defense, parse_strength
from binaries.progress import Progress
from binaries.small_federation import small_model
from binaries.tables import RowCache, write_table
from tff_shadow.aggregators.shadow_noise import DEFAULT_FLOOR
from tff_shadow.data import EMBEDDED
from tff_shadow.execution import local_worker_context
from tff_shadow.models import classification_loss
from tff_shadow.observations import Truth
from tff_shadow.privacy import (
  cramer_rao_bound,
  fit_gaussian_prior,
  gaussian_floor,
  gradient_jacobian,
  image_noise_variances,
  pixel_weights,
  region_psnr,
  through_image_noise,
  unbiased_floor,
  update_information,
  van_trees_bound,
)

_OUTPUT = flags.DEFINE_string('output', 'results/bounds.csv', 'Table to write.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/bounds', 'Finished rows, to go on from.')
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_DEFENSES = flags.DEFINE_list(
  'defenses',
  [
    *('isotropic/0.3', 'isotropic/1.0', 'diagonal/0.3', 'diagonal/1.0'),
    *('correlated/0.3', 'correlated/1.0', 'correlated/images:0.05', 'correlated/images:0.1'),
  ],
  'SHAPE/STRENGTH, as of the adaptive table.',
)
_IMAGES = flags.DEFINE_integer('images', 4, 'Clients over which is averaged.', lower_bound=1)

_KEY = ('dataset', 'shape', 'strength')
_COLUMNS = (*_KEY, 'unbiased_region_psnr', 'prior_region_psnr', 'images')


def main() -> None:
  """Computes what is missing and writes the table."""
  command.check_choices('datasets', _DATASETS.value, EMBEDDED)
  defenses = [parse_defense(text) for text in _DEFENSES.value]
  cache = RowCache(pathlib.Path(_CACHE_DIR.value) / 'bounds.csv', _COLUMNS)
  done = cache.done(_KEY)
  cells = list(itertools.product(_DATASETS.value, defenses))
  release: _Release | None = None
  with local_worker_context(), Progress('bounds', len(cells), 'cells') as progress:
    for count, (dataset, defense) in enumerate(cells):
      if (dataset, *defense) not in done:
        if release is None or release.dataset != dataset:
          release = _Release(dataset)
        unbiased, prior = release.errors(*defense)
        values = (*(f'{region_psnr(error):.2f}' for error in (unbiased, prior)), _IMAGES.value)
        cache.add([dict(zip(_COLUMNS, (dataset, *defense, *values), strict=True))])
      progress.update(count + 1, f'{dataset} {"/".join(defense)}')
  write_table(pathlib.Path(_OUTPUT.value), _COLUMNS, cache.rows)
  print(f'{len(cache.rows)} rows in {_OUTPUT.value}')


class _Release:
  """What the clients of one data set release, linearised."""

  def __init__(self, dataset: str):
    self.dataset = dataset
    rounds = AttackedRounds(dataset, 0)
    self._model = small_model(rounds.data, 0, 'none')
    self._clients = list(rounds.truth.values())[: _IMAGES.value]
    self._prior = fit_gaussian_prior(rounds.data.validation.float_images()).information()
    # Per noise of ratio 1; noise of other ratios has its square times as much variance.
    self._information: dict[str, np.ndarray] = {}
    self._scales: list[float] = []

  def errors(self, shape: str, strength: str) -> tuple[float, float]:
    """Mean squared region errors: without bias, and with the prior."""
    kind, value = parse_strength(strength)
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
    return information / DEFAULT_FLOOR if shape == 'correlated' else information

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
      'diagonal': (1 - DEFAULT_FLOOR) * np.sqrt(squared) / np.sqrt(squared).sum()
      + DEFAULT_FLOOR / num_weights,
    }
    for shape, share in shares.items():
      own = update_information(jacobian, energy * share) / len(self._clients)
      self._information[shape] = self._information[shape] + own
    # Tau of correlated noise of ratio 1.
    self._scales.append(float(np.sqrt((1 - DEFAULT_FLOOR) * energy / squared.sum())))

  def _gradient_energy(self, client: Truth) -> float:
    loss_fn = classification_loss(self._model)
    with tf.GradientTape() as tape:
      loss = loss_fn(client.labels, self._model(client.images, training=True))
    gradient = tape.gradient(loss, self._model.trainable_variables)
    return sum(float(np.square(t.numpy(), dtype=np.float64).sum()) for t in gradient)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
