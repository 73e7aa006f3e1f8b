"""Whose image updates pick out of known ones, with and without a defence: results/recognition.csv.

One round as in the frontier: 16 clients that send one step on one image, or on --images of them;
whether noise is fresh or frozen, one round does not tell. With --rounds it is fresh, the server
keeps so many rounds, and clients have no other images. The server has these images and those of the
validation split, and takes the likeliest under each update (attacks/adaptive/recognition.py); no
image is reconstructed. Half of the validation split, varied, is what it knows the noise from.
`correct` is how many of the clients' images are the likeliest one, apart from others of the same
client, `among_5` how many one of the five likeliest, and `by_another` how many the likeliest by the
update of another client, which is chance. The interval of `share` is that of Wilson over images.

Rows are kept in --cache_dir as they come, so that an interrupted run continues.
"""

import pathlib

import tensorflow_federated as tff
from absl import flags
from scipy import stats

from attacks.adaptive.attacker import AdaptiveAttacker, Effort
from attacks.config import AttackConfig
from attacks.scoring.identification import identify_by_likelihood
from binaries import command
from binaries.attacked_rounds import UNDEFENDED, AttackedRounds, missing_cells, parse_defense
from binaries.small_federation import variations
from binaries.tables import RowCache, write_table
from tff_shadow.data import EMBEDDED

_OUTPUT = flags.DEFINE_string('output', 'results/recognition.csv', 'Table to write.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/recognition', 'Finished rows, to go on from.')
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_DEFENSES = flags.DEFINE_list(
  'defenses',
  [
    *('decoy/scale:3.0+floor:0.99', 'decoy/scale:3.0+floor:0.999'),
    # The plain part of the second alone, as loud and public.
    *('decoy/scale:0.03+floor:0.9999999', 'isotropic/image_ratio:100.0'),
    *('dp_sgd/clip_norm:3+noise_multiplier:0.1', 'dp_sgd/clip_norm:3+noise_multiplier:0.3'),
  ],
  'SHAPE/STRENGTH, strengths as of the frontier, or NAME/PARAMETER:VALUE of a baseline, its other'
  ' parameters at their defaults; the undefended round is always tried too.',
)
_IMAGES = flags.DEFINE_integer('images', 1, 'Of a client, in its one step.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 1, 'How many the server keeps.', lower_bound=1)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Number of seeds.', lower_bound=1)

_GROUP = ('dataset', 'images', 'rounds', 'shape', 'strength')
_KEY = (*_GROUP, 'seed')
_COUNTS = ('sought', 'choices', 'correct', 'among_5', 'by_another')
_COLUMNS = (*_GROUP, *_COUNTS, 'share', 'ci95_low', 'ci95_high', 'seeds')


def main() -> None:
  """Computes what is missing and writes the table."""
  command.check_choices('datasets', _DATASETS.value, EMBEDDED)
  defenses = [UNDEFENDED, *(parse_defense(text, baselines=True) for text in _DEFENSES.value)]
  cache = RowCache(pathlib.Path(_CACHE_DIR.value) / 'recognition.csv', (*_KEY, *_COUNTS))
  setting = (str(_IMAGES.value), str(_ROUNDS.value))
  done = cache.done(_KEY)
  for rounds, defense in missing_cells(
    'recognition',
    _DATASETS.value,
    _SEEDS.value,
    defenses,
    lambda dataset, seed, defense: (dataset, *setting, *defense, str(seed)) in done,
    _IMAGES.value,
    _ROUNDS.value,
  ):
    key = dict(zip(_KEY, (rounds.dataset, *setting, *defense, rounds.seed), strict=True))
    cache.add([key | _counts(rounds, defense)])
  rows = _join(cache.rows)
  write_table(pathlib.Path(_OUTPUT.value), _COLUMNS, rows, key=_GROUP)
  print(f'{len(rows)} rows written to {_OUTPUT.value}')


def _counts(rounds: AttackedRounds, defense: tuple[str, str]) -> dict[str, int]:
  augmentations = variations(rounds.dataset)
  # No image is reconstructed.
  effort = Effort(clients=0, denoiser_steps=0, inversion_clients=0, augmentations=augmentations)
  attacker = AdaptiveAttacker(rounds.data.validation, AttackConfig(seed=rounds.seed), effort)
  kept = rounds.observations(*defense)
  clients = [client.client_id for client in kept[0].clients]
  found = identify_by_likelihood(*attacker.recognize(kept, clients, rounds.truth))
  among = {precision.k: precision.correct for precision in found.precisions}
  counts = (found.of, found.choices, found.correct, among[5], found.control_correct)
  return dict(zip(_COUNTS, counts, strict=True))


def _join(rows: list[dict]) -> list[dict]:
  """A row of the table for each group of `_GROUP`, of all seeds."""
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
  table = []
  for key, own in groups.items():
    sums = {name: sum(int(row[name]) for row in own) for name in _COUNTS}
    correct, sought = sums['correct'], sums['sought']
    interval = stats.binomtest(correct, sought).proportion_ci(0.95, 'wilson')
    table.append(
      dict(zip(_GROUP, key, strict=True))
      | sums
      | {
        'choices': max(int(row['choices']) for row in own),
        'share': f'{correct / sought:.3f}',
        'ci95_low': f'{interval.low:.3f}',
        'ci95_high': f'{interval.high:.3f}',
        'seeds': len(own),
      }
    )
  return table


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
