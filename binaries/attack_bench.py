"""The attacks side by side on undefended rounds: rows of results/attacks.csv.

A row is a data set, a model, a preset and what a client trains on. In every row 16 images are
sought (more where a client has more), each client's found images are assigned to its true ones one
to one, and the control is the better, image by image, of the same attack without its matching term
and the public mean image. ci95_low and ci95_high bound the mean of PSNR minus the control's over
clients. Where a model has BatchNorm, batch_norm_sharing says whether the clients sent
their running statistics ('aggregate', as `train` does by default) or kept them ('local').

local_steps: '1', one step on the batch; '5', five steps on the same batch; '5distinct', five steps
on a new batch each; '2epochs', two batches, two times each, in orders the server does not know.
iterations: of each restart; a preset's own are other rows than those of --iterations. Rows that the
file has already are kept, so that an interrupted run continues.
"""

import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time

import numpy as np
import tensorflow_federated as tff
from absl import flags

from attacks.config import AttackConfig
from attacks.engine import attack_observation
from attacks.labels import label_accuracy
from attacks.presets import PRESETS
from attacks.public_prior import fitted_prior
from attacks.scoring.assignment import in_order
from attacks.scoring.metrics import Quality, measure
from attacks.scoring.statistics import mean_interval
from attacks.threads import share_cores
from binaries import command
from binaries.progress import Progress
from binaries.small_federation import variations
from binaries.tables import read_rows, write_table
from tff_shadow.data import EMBEDDED, Partition, load
from tff_shadow.errors import UserError
from tff_shadow.execution import local_worker_context
from tff_shadow.learning import TrainingRun, TrainingSettings
from tff_shadow.models import MODELS, NORMS, build_model
from tff_shadow.observations import (
  BATCH_NORM_SHARING,
  ClientTraining,
  Truth,
  read_round,
)

_OUTPUT = flags.DEFINE_string('output', 'results/attacks.csv', 'CSV file to write or continue.')
_DATASETS = flags.DEFINE_list('datasets', list(EMBEDDED), 'Embedded data sets.')
_PRESETS = flags.DEFINE_list(
  'presets',
  [name for name, preset in PRESETS.items() if not preset.needs_generator],
  'Attacks.',
)
_BATCHES = flags.DEFINE_list('batches', ['1', '4', '8'], 'Batch sizes.')
_STEPS = flags.DEFINE_list('local_steps', ['1', '5', '2epochs'], '1, 5, 5distinct, 2epochs.')
_NORM = flags.DEFINE_list('norms', list(NORMS), 'Normalisations of the model.')
_SHARING = flags.DEFINE_list(
  'batch_norm_sharings', ['aggregate'], 'With BatchNorm: what of its statistics is sent.'
)
_MODEL = flags.DEFINE_string('model', 'conv_small', 'A built-in model.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 32, 'Side of the images.', lower_bound=16)
_ITERATIONS = flags.DEFINE_integer(
  'iterations', None, "In place of every preset's own, to compare at equal cost.", lower_bound=1
)
_IMAGES = flags.DEFINE_integer('images', 16, 'Images sought in a row.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Decides partition, model and starts.', lower_bound=0)

# Batches that a client has, epochs.
_LOCAL_STEPS = {'1': (1, 1), '5': (1, 5), '5distinct': (5, 1), '2epochs': (2, 2)}
_LEARNING_RATE = 0.05
# Of a model without BatchNorm.
_NOTHING_SHARED = ''
_CONTROLS = ('prior_only', 'mean_image')
_KEY = (
  'dataset',
  'model',
  'batch_norm_sharing',
  'preset',
  'batch',
  'local_steps',
  'image_size',
  'iterations',
)
_COLUMNS = (
  *_KEY,
  'psnr',
  'ssim',
  'region_psnr',
  'label_accuracy',
  'control_psnr',
  'ci95_low',
  'ci95_high',
  'images',
  'seconds',
)


def main() -> None:
  """Fills the table row by row."""
  _check_flags()
  path = pathlib.Path(_OUTPUT.value)
  rows = read_rows(path)
  done = {tuple(row[name] for name in _KEY) for row in rows}
  models = [
    (norm, sharing)
    for norm in _NORM.value
    for sharing in (_SHARING.value if norm == 'batch' else [_NOTHING_SHARED])
  ]
  cells = list(
    itertools.product(_DATASETS.value, models, _STEPS.value, _BATCHES.value, _PRESETS.value)
  )
  share_cores(AttackConfig().lanes)
  observed: dict = {}
  with local_worker_context(), Progress('attacks', len(cells), 'rows') as progress:
    for count, (dataset, (norm, sharing), steps, batch, preset) in enumerate(cells):
      model = f'{_MODEL.value}/{norm}'
      config = _config(preset)
      size, iterations = str(_IMAGE_SIZE.value), str(config.iterations)
      key = (dataset, model, sharing, preset, batch, steps, size, iterations)
      if key not in done:
        round_key = (dataset, norm, sharing, int(batch), steps)
        if round_key not in observed:
          # Cells of the same round follow each other; one at a time is kept.
          observed = {round_key: _round(*round_key)}
        observation, truth, public = observed[round_key]
        config = _with_prior(config, preset, dataset, public)
        rows.append(dict(zip(_KEY, key, strict=True)) | _attack(config, observation, truth))
        write_table(path, _COLUMNS, rows)
      progress.update(count + 1, ' '.join((dataset, norm, sharing, steps, batch, preset)))


def _round(dataset: str, norm: str, sharing: str, batch: int, steps: str):
  """Observation and truth of an undefended first round, and public images."""
  batches, epochs = _LOCAL_STEPS[steps]
  size = batches * batch
  clients = max(1, _IMAGES.value // size)
  partition = Partition.parse('sizes:' + '/'.join([str(size)] * clients))
  data = load(dataset, image_size=_IMAGE_SIZE.value, partition=partition, seed=_SEED.value)
  model = build_model(
    _MODEL.value,
    image_shape=tuple(data.image_shape),
    num_classes=data.num_classes,
    norm=norm,
    seed=_SEED.value,
  )
  training = ClientTraining('sgd', _LEARNING_RATE, 0.0, batch, epochs, None)
  settings = TrainingSettings(
    1,
    training,
    observed_rounds=(1,),
    seed=_SEED.value,
    batch_norm_sharing=sharing or 'aggregate',
  )
  with tempfile.TemporaryDirectory() as directory:
    run_dir = pathlib.Path(directory)
    TrainingRun(data, model, settings, run_dir, save_every_rounds=1).train(resume=False)
    return *read_round(run_dir, 1), data.validation.float_images()


def _config(preset: str) -> AttackConfig:
  config = dataclasses.replace(PRESETS[preset].build(), seed=_SEED.value)
  if _ITERATIONS.value is not None:
    config = dataclasses.replace(config, iterations=_ITERATIONS.value)
  # BatchNorm statistics are matched for a single step only, and only where there are any.
  statistics = dataclasses.replace(config.batch_norm_statistics, required=False)
  return dataclasses.replace(config, batch_norm_statistics=statistics)


def _with_prior(config: AttackConfig, preset: str, dataset: str, public) -> AttackConfig:
  """With the prior of public images, if the preset has one."""
  weight = PRESETS[preset].public_prior
  if not weight:
    return config
  prior = fitted_prior(public, variations(dataset), _SEED.value, value_weight=weight)
  return dataclasses.replace(config, gaussian_images=prior)


def _attack(config: AttackConfig, observation, truth) -> dict:
  """The measured columns of a row."""
  started = time.monotonic()
  try:
    results = attack_observation(observation, config)
  except UserError as error:
    return _no_result(str(error))
  seconds = time.monotonic() - started
  attacked, gains, labels = [], [], []
  for result in results:
    own = truth[result.target]
    if result.status != 'ok':
      continue
    found = _qualities(result.reconstructions['attack'], own)
    controls = [_qualities(result.reconstructions[name], own) for name in _CONTROLS]
    control = [max(q.psnr for q in pair) for pair in zip(*controls, strict=True)]
    attacked += [(q.psnr, q.ssim, q.region_psnr, c) for q, c in zip(found, control, strict=True)]
    gains.append(np.mean([q.psnr - c for q, c in zip(found, control, strict=True)]))
    labels.append(label_accuracy(result.labels, own.labels))
  if not attacked:
    return _no_result(results[0].reason)
  psnr, ssim, region_psnr, control_psnr = np.mean(attacked, axis=0)
  interval = mean_interval(gains)
  return {
    'psnr': f'{psnr:.2f}',
    'ssim': f'{ssim:.3f}',
    'region_psnr': f'{region_psnr:.2f}',
    'label_accuracy': f'{np.mean(labels):.3f}',
    'control_psnr': f'{control_psnr:.2f}',
    'ci95_low': '' if interval.low is None else f'{interval.low:.2f}',
    'ci95_high': '' if interval.high is None else f'{interval.high:.2f}',
    'images': len(attacked),
    'seconds': f'{seconds:.0f}',
  }


def _no_result(reason: str) -> dict:
  """A row without numbers: never a success of anything."""
  print(f'warning: no result: {reason}', file=sys.stderr)
  return dict.fromkeys(_COLUMNS[len(_KEY) :], '') | {'images': 0}


def _qualities(images: np.ndarray, own: Truth) -> list[Quality]:
  """Of every true image, by the best one-to-one assignment."""
  matched = in_order(images, own.images)
  return [measure(*triple) for triple in zip(matched, own.images, own.regions, strict=True)]


def _check_flags() -> None:
  for name, given, allowed in (
    ('datasets', _DATASETS.value, EMBEDDED),
    ('presets', _PRESETS.value, [n for n, p in PRESETS.items() if not p.needs_generator]),
    ('local_steps', _STEPS.value, _LOCAL_STEPS),
    ('norms', _NORM.value, NORMS),
    ('batch_norm_sharings', _SHARING.value, BATCH_NORM_SHARING),
    ('model', [_MODEL.value], MODELS),
  ):
    command.check_choices(name, given, allowed)
  for value in _BATCHES.value:
    if not value.isdecimal() or not 1 <= int(value) <= 16:
      raise UserError(f'--batches={value}: must be numbers from 1 to 16')


def run() -> None:
  """Console script."""
  tff.test.set_no_default_context()
  command.run(main)


if __name__ == '__main__':
  run()
