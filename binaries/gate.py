"""Prints the gate line of attacked runs and exits 1 unless every attack clears it.

The gate: on at least 16 images the attack beats the better control by 6 dB of PSNR on average, with
the 95 % interval above 4 dB. Nothing measured behind a defence means anything where it fails.
"""

import pathlib
import sys

from absl import flags

from attacks.scoring.gate import gate_line, gate_passed
from attacks.scoring.results import load_attack
from attacks.scoring.scores import score
from binaries import command
from tff_shadow.errors import UserError

_RUN_DIRS = flags.DEFINE_multi_string('run_dir', [], 'Run with an attack; may be repeated.')
_ATTACK = flags.DEFINE_string('attack', None, 'Name of the attack; needed where a run has several.')


def main() -> None:
  """Prints a line per run."""
  if not _RUN_DIRS.value:
    raise UserError('--run_dir is required: a run that was attacked')
  passed = True
  for text in _RUN_DIRS.value:
    run_dir = pathlib.Path(text)
    result = load_attack(run_dir, _attack_name(run_dir))
    scores = score(result)
    print(gate_line(str(result.config['dataset']).split('/')[0], scores), flush=True)
    passed = gate_passed(scores) and passed
  if not passed:
    sys.exit(1)


def _attack_name(run_dir: pathlib.Path) -> str:
  names = sorted(path.name for path in (run_dir / 'attacks').glob('*/'))
  if _ATTACK.value:
    return _ATTACK.value
  if len(names) != 1:
    found = ', '.join(names) or 'none'
    raise UserError(f'--attack: {run_dir} has these attacks: {found}; name one')
  return names[0]


def run() -> None:
  """Console script."""
  command.run(main)


if __name__ == '__main__':
  run()
