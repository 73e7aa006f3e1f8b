"""Trains the generator of the shadow defence on images that no client trains on.

As the decoder of a variational autoencoder, whose encoder is thrown away: the defence needs
reconstructions of unseen images, which adversarial training alone does not aim at. A GAN of your
own works through the same interface, `tff_shadow.models.load_generator`.

Writes a run directory: config.json, checkpoints/, tensorboard/, samples/ (PNG grids: samples of
the prior, and unseen images above what the autoencoder makes of them) and, at the end,
generator.keras, inversion.json, how well a search of latents reconstructs unseen images, and
inversion.png, these images above their inversions at the published rate and at the chosen one.
"""

import dataclasses
import pathlib
import sys
import time

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

from attacks.scoring.metrics import psnr_from_mse
from attacks.scoring.statistics import mean_interval
from binaries import command, data_flags, run_directory
from binaries.progress import Progress
from tff_shadow.data import FederatedData
from tff_shadow.data.chest_phantom import draw_public_films
from tff_shadow.errors import UserError
from tff_shadow.shadow import LatentFit
from tff_shadow.shadow.augmentation import AUGMENTATIONS
from tff_shadow.shadow.generator_training import GeneratorSettings, GeneratorTraining
from tff_shadow.shadow.inversion import invert

_DEFAULTS = GeneratorSettings()
_SPLITS = ('train', 'validation', 'test')
_DRAWN = 'drawn'

_RUN_DIR = flags.DEFINE_string('run_dir', None, 'Directory of this run; must be new or empty.')
_RESUME = flags.DEFINE_bool('resume', False, 'Continue the run in --run_dir.')
_SPLIT = flags.DEFINE_enum(
  'split',
  'validation',
  [*_SPLITS, _DRAWN],
  'Images to train on. They must be disjoint from those that the clients train on, so train is for'
  ' a set that is wholly public. drawn: new films that are in no split, for chest_phantom alone.',
)
_DRAWN_IMAGES = flags.DEFINE_integer(
  'drawn_images', 1600, 'Films to draw with --split=drawn.', lower_bound=1
)
_AUGMENT = flags.DEFINE_list(
  'augment',
  ['shifts', 'brightness'],
  'How training images are varied: '
  + '; '.join(f'{name} ({text})' for name, text in AUGMENTATIONS.items())
  + '. Choose what the modality is indifferent to.',
)
_LATENT_SIZE = flags.DEFINE_integer('latent_size', _DEFAULTS.latent_size, 'Numbers in a latent.')
_CHANNELS = flags.DEFINE_integer('channels', _DEFAULTS.channels, "Of the generator's finest level.")
_STEPS = flags.DEFINE_integer('steps', _DEFAULTS.steps, 'Training steps in all.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', _DEFAULTS.batch_size, 'Images a step.')
_LEARNING_RATE = flags.DEFINE_float(
  'learning_rate', _DEFAULTS.learning_rate, 'Of Adam; falls along half a cosine.'
)
_KL_WEIGHT = flags.DEFINE_float(
  'kl_weight',
  _DEFAULTS.kl_weight,
  'How much the latents are pressed to N(0, 1), against the mean squared error.',
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Decides weights, batches, noise and the start of the inversion.', lower_bound=0
)
_SAVE_EVERY_SECS = flags.DEFINE_float(
  'save_every_secs', 60.0, 'Seconds between two checkpoints.', lower_bound=0
)
_SAMPLE_EVERY_STEPS = flags.DEFINE_integer(
  'sample_every_steps', 500, 'Steps between two sample grids.', lower_bound=1
)
_INVERSION_SPLIT = flags.DEFINE_enum(
  'inversion_split', 'test', _SPLITS, 'Unseen images; not --split.'
)
_INVERSION_IMAGES = flags.DEFINE_integer(
  'inversion_images', 16, 'Unseen images to invert at the end.', lower_bound=2
)
_LATENT_LEARNING_RATE = flags.DEFINE_float(
  'latent_learning_rate', 0.1, 'Of the inversion, which is also done with the published rate.'
)

_MAY_CHANGE = frozenset(
  {
    'data_dir',
    'inversion_images',
    'inversion_split',
    'latent_learning_rate',
    'resume',
    'run_dir',
    'sample_every_steps',
    'save_every_secs',
  }
)
_LOG_EVERY_STEPS = 20
_GRID_COLUMNS = 8
_GAP = ((0, 0), (0, 1), (0, 1), (0, 0))


def main() -> None:
  """Trains as the flags say."""
  if not _RUN_DIR.value:
    raise UserError('--run_dir is required: a new directory for this run')
  run_dir = pathlib.Path(_RUN_DIR.value)
  if not _RESUME.value:
    run_directory.check_unclaimed(run_dir)  # Before minutes of loading data.
  if _SPLIT.value == _INVERSION_SPLIT.value:
    raise UserError(
      f'--split={_SPLIT.value}: the inversion is measured on these images, which must be unseen;'
      ' set --inversion_split to another split'
    )
  dataset = command.flag_values(data_flags)['dataset']
  if _SPLIT.value == _DRAWN and dataset != 'chest_phantom':
    raise UserError(f'--split=drawn: only chest_phantom can be drawn, not --dataset={dataset}')
  settings = GeneratorSettings(
    latent_size=_LATENT_SIZE.value,
    channels=_CHANNELS.value,
    steps=_STEPS.value,
    batch_size=_BATCH_SIZE.value,
    learning_rate=_LEARNING_RATE.value,
    kl_weight=_KL_WEIGHT.value,
    augmentations=tuple(_AUGMENT.value),
    seed=_SEED.value,
  )
  fits = _fits()
  data = data_flags.load_data(seed=_SEED.value)
  images = _images(data, _SPLIT.value)
  unseen = _choose(_images(data, _INVERSION_SPLIT.value), _INVERSION_IMAGES.value)
  training = GeneratorTraining(images, settings, run_dir / 'checkpoints')
  config = {
    'program': 'train_shadow',
    'flags': {
      **command.flag_values(sys.modules[__name__]),
      **command.flag_values(data_flags),
    },
    'dataset': data.name,
    'data_sha256': data.digest(),
    'training_images': len(images),
  }
  run_directory.claim(run_dir, config, resume=_RESUME.value, may_change=_MAY_CHANGE)
  if _RESUME.value:
    training.restore()
  else:
    training.save()  # So that a run killed at any time can be continued.
  _train(training, settings, unseen, run_dir)
  training.generator.save(run_dir / 'generator.keras')
  mean_image = images.mean(axis=0, dtype=np.float64) / 255
  document = _inversions(training.generator, unseen, mean_image, fits, run_dir)
  command.write_json(run_dir / 'inversion.json', document)
  print(f'generator and inversion.json in {run_dir}')


def _train(
  training: GeneratorTraining,
  settings: GeneratorSettings,
  unseen: np.ndarray,
  run_dir: pathlib.Path,
) -> None:
  writer = tf.summary.create_file_writer(str(run_dir / 'tensorboard'))
  saved_at, figures = time.monotonic(), []
  with writer.as_default(), Progress('step', settings.steps, 'steps', done=training.step) as shown:
    try:
      while training.step < settings.steps:
        figures.append(training.train())
        step = training.step
        if step % _LOG_EVERY_STEPS == 0 or step == settings.steps:
          means = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
          means['psnr'] = psnr_from_mse(means.pop('mse'))
          figures = []
          for name, value in means.items():
            tf.summary.scalar(f'train/{name}', value, step=step)
          shown.update(
            step,
            f'loss {means["loss"]:.5f}  {means["psnr"]:.2f} dB  KL {means["kl"]:.0f} nats',
          )
        if step % _SAMPLE_EVERY_STEPS.value == 0 or step == settings.steps:
          _write_samples(training, settings, unseen, run_dir / 'samples')
        if time.monotonic() - saved_at >= _SAVE_EVERY_SECS.value:
          training.save()
          saved_at = time.monotonic()
    finally:
      # A step that went wrong has raised before; an interrupt comes between two steps.
      if not isinstance(sys.exc_info()[1], UserError):
        training.save()


def _write_samples(
  training: GeneratorTraining,
  settings: GeneratorSettings,
  unseen: np.ndarray,
  directory: pathlib.Path,
) -> None:
  shape = (2 * _GRID_COLUMNS, settings.latent_size)
  latents = np.random.default_rng(settings.seed).standard_normal(shape).astype(np.float32)
  originals = unseen[:_GRID_COLUMNS]
  drawn = training.reconstruct(originals)
  psnr = float(
    np.mean([psnr_from_mse(mse) for mse in np.mean((drawn - originals) ** 2, (1, 2, 3))])
  )
  samples = training.generator(latents, training=False).numpy()
  rows = [samples[:_GRID_COLUMNS], samples[_GRID_COLUMNS:], originals, drawn]
  pixels = _grid(rows)
  directory.mkdir(exist_ok=True)
  _write_png(directory / f'step_{training.step:06d}.png', pixels)
  tf.summary.image('samples', pixels[None], step=training.step)
  tf.summary.scalar('unseen/reconstruction_psnr', psnr, step=training.step)


def _inversions(
  generator: tf.keras.Model,
  unseen: np.ndarray,
  mean_image: np.ndarray,
  fits: dict[str, LatentFit],
  run_dir: pathlib.Path,
) -> dict:
  """PSNR of unseen images in dB: of the mean image, and of inversions."""
  control = [psnr_from_mse(mse) for mse in np.mean((mean_image - unseen) ** 2, axis=(1, 2, 3))]
  document = {
    'split': _INVERSION_SPLIT.value,
    'images': len(unseen),
    'unit': 'PSNR in dB, mean over images with its 95 % interval',
    'mean_image': _interval(control),
  }
  rows = [unseen[:_GRID_COLUMNS]]
  for name, fit in fits.items():
    found = invert(generator, unseen, fit, seed=_SEED.value)
    rows.append(found.images[:_GRID_COLUMNS])
    document[name] = {
      'learning_rate': fit.learning_rate,
      'latent_steps': fit.steps,
      'latent': _interval([psnr_from_mse(mse) for mse in found.latent_mse]),
      'latent_and_weights': _interval([psnr_from_mse(mse) for mse in found.weights_mse]),
    }
    latent, weights = (document[name][key]['mean'] for key in ('latent', 'latent_and_weights'))
    print(
      f'inversion of unseen images, {name} rate {fit.learning_rate}: {latent:.2f} dB, with weight'
      f' steps {weights:.2f} dB; the mean image {document["mean_image"]["mean"]:.2f} dB',
      flush=True,
    )
  _write_png(run_dir / 'inversion.png', _grid(rows))
  return document


def _interval(values: list[float]) -> dict:
  return {**dataclasses.asdict(mean_interval(values)), 'values': [round(v, 3) for v in values]}


def _fits() -> dict[str, LatentFit]:
  try:
    return {'published': LatentFit(), 'chosen': LatentFit(_LATENT_LEARNING_RATE.value)}
  except ValueError as error:
    raise UserError(f'--latent_learning_rate={_LATENT_LEARNING_RATE.value}: {error}') from error


def _images(data: FederatedData, split: str) -> np.ndarray:
  """uint8 [N, H, W, C]."""
  if split == _DRAWN:
    films = draw_public_films(_DRAWN_IMAGES.value, image_size=data.image_shape[0], seed=_SEED.value)
    return np.repeat(films, data.image_shape[-1], axis=-1)
  if split == 'train':
    return np.concatenate([examples.images for examples in data.clients.values()])
  return {'validation': data.validation, 'test': data.test}[split].images


def _choose(images: np.ndarray, count: int) -> np.ndarray:
  """float32 [count, H, W, C] in [0, 1]; sets may be in the order of their classes."""
  if count > len(images):
    raise UserError(
      f'--inversion_images={count}: the split {_INVERSION_SPLIT.value} has {len(images)}'
    )
  chosen = np.random.default_rng(_SEED.value).choice(len(images), count, replace=False)
  return images[chosen].astype(np.float32) / np.float32(255)


def _grid(rows: list[np.ndarray]) -> np.ndarray:
  """Rows of images in [0, 1], uint8 [H, W, 3], with a gap of a pixel; shorter rows end in white."""
  columns = max(map(len, rows))
  lines = []
  for row in rows:
    gaps = ((0, columns - len(row)), (0, 0), (0, 0), (0, 0))
    row = np.pad(np.pad(row, gaps, constant_values=1.0), _GAP, constant_values=1.0)
    lines.append(np.concatenate(list(row), axis=1))
  pixels = np.rint(np.concatenate(lines, axis=0) * 255).astype(np.uint8)
  return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _write_png(path: pathlib.Path, pixels: np.ndarray) -> None:
  Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def run() -> None:
  """Entry point of `tff-shadow-train-shadow`."""
  command.run(main)


if __name__ == '__main__':
  run()
