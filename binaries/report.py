"""Builds report.html and summary.json from one or several run directories.

tff-shadow-report --run_dir=runs/retina --run_dir=runs/chest --output_dir=runs/report

LPIPS is measured where its weights are given: `attacks.scoring.lpips` says how to make the file.
"""

import pathlib

from absl import flags

from attacks.report import page, reading
from attacks.scoring import scores
from binaries import command
from tff_shadow.errors import UserError

_RUN_DIRS = flags.DEFINE_multi_string(
  'run_dir', [], 'Run directory with at least one attack under attacks/; may be given repeatedly.'
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'Where report.html and summary.json go; default: the run directory.'
)
_MAX_IMAGES = flags.DEFINE_integer(
  'max_images',
  7,
  'Images shown for each attack, in even steps from the best to the worst by PSNR.',
  lower_bound=1,
)
_TITLE = flags.DEFINE_string('title', 'Gradient inversion report', "The page's title.")
_LPIPS_WEIGHTS = flags.DEFINE_string(
  'lpips_weights', None, 'Safetensors file with the weights of LPIPS; without it, no LPIPS.'
)
_LPIPS_NET = flags.DEFINE_enum(
  'lpips_net',
  None,
  ['alex', 'vgg'],
  'Network of --lpips_weights: alex, the default, for images from 31 px; vgg from 16 px.',
)
_GALLERY = flags.DEFINE_string(
  'gallery',
  None,
  'Images that originals are picked out of, besides all attacked ones: "run" for all images of '
  "the run's truth files, or another directory of truth files.",
)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a report that is already there.')


def main() -> None:
  """Scores every attack, writes its scores.csv, the page and the summary; prints the findings."""
  output_dir = _output_dir()
  page.check_free(output_dir, _OVERWRITE.value)
  measures = reading.Measures(_lpips(), _GALLERY.value)
  runs = [reading.read_run(directory, measures) for directory in _RUN_DIRS.value]
  for scored in runs:
    for attack in scored.attacks:
      path = scored.directory / 'attacks' / attack.result.name / 'scores.csv'
      scores.write_scores(path, attack.scores)
  summary = page.write_report(runs, output_dir, _TITLE.value, _MAX_IMAGES.value)
  print(summary['headline'])
  for entry in summary['attacks']:
    print(f'{entry["run"]}/{entry["attack"]}: {entry["finding"]} {entry["numbers"]}')
  print(f'wrote {output_dir / page.PAGE_NAME} and {output_dir / page.SUMMARY_NAME}')


def run() -> None:
  """The entry point of tff-shadow-report."""
  command.run(main)


def _lpips():
  if _LPIPS_WEIGHTS.value is None:
    if _LPIPS_NET.value is not None:
      raise UserError('--lpips_net needs --lpips_weights, the file with the weights')
    return None
  from attacks.scoring.lpips import load_lpips  # Imports TensorFlow.

  return load_lpips(_LPIPS_WEIGHTS.value, _LPIPS_NET.value or 'alex')


def _output_dir() -> pathlib.Path:
  directories = _RUN_DIRS.value
  if not directories:
    raise UserError('--run_dir is missing: name the run directory of a training or an attack')
  if len({pathlib.Path(directory).resolve() for directory in directories}) < len(directories):
    raise UserError(f'--run_dir names a directory twice: {", ".join(directories)}')
  if _OUTPUT_DIR.value is not None:
    return pathlib.Path(_OUTPUT_DIR.value)
  if len(directories) > 1:
    raise UserError('--output_dir is missing: several runs need a place for their common report')
  return pathlib.Path(directories[0])


if __name__ == '__main__':
  run()
