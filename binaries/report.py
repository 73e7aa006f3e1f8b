"""Builds report.html and summary.json from one or several run directories.

tff-shadow-report --run_dir=runs/retina --run_dir=runs/chest --output_dir=runs/report
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
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a report that is already there.')


def main() -> None:
  """Scores every attack, writes its scores.csv, the page and the summary; prints the findings."""
  output_dir = _output_dir()
  page.check_free(output_dir, _OVERWRITE.value)
  runs = [reading.read_run(directory) for directory in _RUN_DIRS.value]
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
