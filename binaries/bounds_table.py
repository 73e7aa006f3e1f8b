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

import functools
import itertools
import pathlib

import tensorflow_federated as tff
from absl import flags

from binaries import command
from binaries.attacked_rounds import AttackedRounds, parse_defense, parse_strength
from binaries.linearised_release import LinearisedRelease
from binaries.progress import Progress
from binaries.small_federation import small_model
from binaries.tables import RowCache, write_table
from tff_shadow.aggregators import NoiseStrength
from tff_shadow.data import EMBEDDED
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import ShadowNoise
from tff_shadow.learning.decoys import decoy_batches, decoy_pool
from tff_shadow.privacy import region_psnr

_OUTPUT = flags.DEFINE_string('output', 'results/bounds.csv', 'Table to write.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/bounds', 'Finished rows, to go on from.')
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_DEFENSES = flags.DEFINE_list(
  'defenses',
  [
    *('isotropic/0.3', 'isotropic/1.0', 'diagonal/0.3', 'diagonal/1.0'),
    *('correlated/0.3', 'correlated/1.0', 'correlated/images:0.05', 'correlated/images:0.1'),
    'decoy/scale:3',
  ],
  'SHAPE/STRENGTH, as of the adaptive table; scale:S only of decoy noise.',
)
_IMAGES = flags.DEFINE_integer('images', 4, 'Clients over which is averaged.', lower_bound=1)

_KEY = ('dataset', 'shape', 'strength')
_COLUMNS = (*_KEY, 'unbiased_region_psnr', 'prior_region_psnr', 'images')


def main() -> None:
  """Computes what is missing and writes the table."""
  command.check_choices('datasets', _DATASETS.value, EMBEDDED)
  defenses = [_parse_defense(text) for text in _DEFENSES.value]
  cache = RowCache(pathlib.Path(_CACHE_DIR.value) / f'bounds-{_IMAGES.value}.csv', _COLUMNS)
  done = cache.done(_KEY)
  cells = list(itertools.product(_DATASETS.value, defenses))
  # Cells come by data set: one release at a time is enough.
  release_of = functools.lru_cache(maxsize=1)(_linearised)
  with local_worker_context(), Progress('bounds', len(cells), 'cells') as progress:
    for count, (dataset, defense) in enumerate(cells):
      if (dataset, *defense) not in done:
        unbiased, prior = release_of(dataset).errors(*defense)
        values = (*(f'{region_psnr(error):.2f}' for error in (unbiased, prior)), _IMAGES.value)
        cache.add([dict(zip(_COLUMNS, (dataset, *defense, *values), strict=True))])
      progress.update(count + 1, f'{dataset} {"/".join(defense)}')
  write_table(pathlib.Path(_OUTPUT.value), _COLUMNS, cache.rows, key=(*_KEY, 'images'))
  print(f'{len(cache.rows)} rows written to {_OUTPUT.value}')


def _parse_defense(text: str) -> tuple[str, str]:
  shape, strength = parse_defense(text)
  if parse_strength(strength)[0] == 'scale' and shape != 'decoy':
    raise UserError(f'--defenses={text}: the strength must be a ratio or images:S')
  if '+' in strength:
    raise UserError(f'--defenses={text}: {strength.partition("+")[2]} is not known to the bounds')
  return shape, strength


def _linearised(dataset: str) -> LinearisedRelease:
  rounds = AttackedRounds(dataset, 0)
  clients = list(rounds.truth.values())[: _IMAGES.value]
  public = rounds.data.validation
  shapes = {shape for shape, _ in map(_parse_defense, _DEFENSES.value)}
  model = small_model(rounds.data, 0, 'none')
  decoys = None
  if 'decoy' in shapes:
    noise = ShadowNoise('decoy', NoiseStrength('scale', 1.0))
    decoys = decoy_batches(noise, decoy_pool(public), model)
  return LinearisedRelease(model, clients, public.float_images(), shapes, decoys=decoys)


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
