"""Puts finished runs of tff-shadow-train-shadow into one table: results/generator.csv.

PSNR in dB of unseen images, mean over images: of the mean training image, after a search of latents
at the published learning rate and at the chosen one, and each after the weight steps that follow.
"""

import json
import pathlib

from absl import flags

from binaries import command, run_directory
from binaries.tables import write_table
from tff_shadow.errors import UserError

_RUN_DIRS = flags.DEFINE_list('run_dirs', [], 'Run directories, in the order of the rows.')
_OUTPUT = flags.DEFINE_string('output', 'results/generator.csv', 'CSV file to write.')
_COLUMNS = (
  'dataset',
  'split',
  'training_images',
  'image_size',
  'steps',
  'learning_rate',
  'mean_image_psnr',
  'latent_psnr',
  'latent_ci95_low',
  'latent_ci95_high',
  'weights_psnr',
  'weights_ci95_low',
  'weights_ci95_high',
  'images',
)


def main() -> None:
  """Writes the table."""
  if not _RUN_DIRS.value:
    raise UserError('--run_dirs is required: run directories of tff-shadow-train-shadow')
  rows = [row for name in _RUN_DIRS.value for row in _rows(pathlib.Path(name))]
  path = pathlib.Path(_OUTPUT.value)
  write_table(path, _COLUMNS, rows)
  print(path.read_text(), end='')


def _rows(run_dir: pathlib.Path) -> list[dict]:
  """One for the published learning rate and one for the chosen one."""
  config = run_directory.read_config(run_dir)
  path = run_dir / 'inversion.json'
  try:
    found = json.loads(path.read_text())
    rows = []
    for name in ('published', 'chosen'):
      row = {key: config['flags'][key] for key in ('dataset', 'split', 'image_size', 'steps')}
      row |= {
        'training_images': config['training_images'],
        'learning_rate': found[name]['learning_rate'],
        'mean_image_psnr': f'{found["mean_image"]["mean"]:.2f}',
        'images': found['images'],
      }
      for column, part in (('latent', 'latent'), ('weights', 'latent_and_weights')):
        interval = found[name][part]
        row[f'{column}_psnr'] = f'{interval["mean"]:.2f}'
        row[f'{column}_ci95_low'] = f'{interval["low"]:.2f}'
        row[f'{column}_ci95_high'] = f'{interval["high"]:.2f}'
      rows.append(row)
    return rows
  except FileNotFoundError as error:
    raise UserError(f'{path}: missing; the run is not finished') from error
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise UserError(f'{path}: damaged ({type(error).__name__}: {error})') from error


def run() -> None:
  """Console script."""
  command.run(main)


if __name__ == '__main__':
  run()
