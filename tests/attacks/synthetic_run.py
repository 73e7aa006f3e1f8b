"""Writes a run directory in the format of real ones, of pictures that come with scikit-image."""

import json
import pathlib

import numpy as np
from safetensors import numpy as safetensors_numpy
from skimage import data, transform

THREAT_MODEL = [
  'The attacker is the server. It follows the protocol and keeps what it sees.',
  'It sees the model before the round and the update of one client.',
  'It knows the architecture, the learning rate, the batch size and the number of local steps.',
]


def photographs(count: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
  """Random crops, float32 [count, size, size, channels] in [0, 1]."""
  sources = (
    [data.retina(), data.immunohistochemistry()] if channels == 3 else [data.camera(), data.coins()]
  )
  generator = np.random.default_rng(seed)
  crops = []
  for index in range(count):
    source = sources[index % len(sources)]
    top, left = (generator.integers(side // 4, side // 2) for side in source.shape[:2])
    crop = source[top : top + 128, left : left + 128].reshape(128, 128, channels)
    crops.append(transform.resize(crop, (size, size, channels), anti_aliasing=True))
  return np.clip(crops, 0, 1).astype(np.float32)


def ellipse_regions(count: int, size: int) -> np.ndarray:
  """Float32 [count, size, size, 1]: an ellipse off the centre, 1 inside."""
  rows, columns = np.mgrid[:size, :size] / size
  ellipse = ((rows - 0.55) / 0.3) ** 2 + ((columns - 0.45) / 0.2) ** 2 < 1
  return np.repeat(ellipse[None, :, :, None], count, axis=0).astype(np.float32)


def noisy(images: np.ndarray, deviations: np.ndarray, seed: int) -> np.ndarray:
  """`images` with Gaussian noise of one standard deviation per image, clipped to [0, 1]."""
  noise = np.random.default_rng(seed).standard_normal(images.shape)
  return np.clip(images + deviations[:, None, None, None] * noise, 0, 1).astype(np.float32)


def write_run(
  run_dir: pathlib.Path,
  *,
  dataset: str = 'retina',
  defense: str = 'none',
  attack: str = 'pixels',
  targets: int = 16,
  size: int = 32,
  channels: int = 3,
  deviations: tuple[float, float] = (0.02, 0.1),
  failed: tuple[str, ...] = (),
  regions: bool = True,
  labels_source: str = 'inferred',
  blind: bool = False,
  told: bool = False,
  seed: int = 0,
) -> pathlib.Path:
  """One image per target; the reconstructions are the truth with noise from low to high.

  With `blind` they are the mean image with noise, so nothing of the truth; with `told` another
  client's update shows as much as the client's own.
  """
  truths = photographs(targets, size, channels, seed)
  masks = ellipse_regions(targets, size) if regions else np.ones_like(truths[..., :1])
  guess = np.random.default_rng(seed + 2).random(truths.shape).astype(np.float32)
  mean_image = np.broadcast_to(truths.mean(axis=(0, 1, 2)), truths.shape).astype(np.float32)
  seen = mean_image if blind else truths
  attacked = noisy(seen, np.linspace(*deviations, targets), seed + 1)
  truth, reconstructions, records = {}, {}, []
  for index in range(targets):
    name, one = f'client_{index:02d}', slice(index, index + 1)
    label = index % 2
    truth[f'{name}/images'] = truths[one]
    truth[f'{name}/labels'] = np.array([label], np.int32)
    truth[f'{name}/regions'] = masks[one]
    if name not in failed:
      reconstructions[f'{name}/attack'] = attacked[one]
    reconstructions[f'{name}/prior_only'] = transform.resize(
      guess[index, ::8, ::8], truths.shape[1:]
    )[None].astype(np.float32)
    reconstructions[f'{name}/mean_image'] = mean_image[one].copy()
    if told:
      reconstructions[f'{name}/other_update'] = truths[one] * 0.98
    records.append(
      {
        'target': name,
        'images': 1,
        'labels': [label if index else 1 - label],
        'labels_source': labels_source,
        'status': 'failed' if name in failed else 'ok',
        'reason': 'the loss became NaN' if name in failed else None,
        'loss': None if name in failed else 0.01,
        'restart_losses': [0.02, 0.01],
        'chosen_restart': 1,
        'iterations': 1000,
        'seconds': 12.5,
      }
    )
  directory = run_dir / 'attacks' / attack
  directory.mkdir(parents=True)
  (run_dir / 'truth').mkdir()
  metadata = {'format': 'tff-shadow-truth', 'version': '1', 'round': '1'}
  safetensors_numpy.save_file(truth, run_dir / 'truth' / 'round_00001.safetensors', metadata)
  safetensors_numpy.save_file(reconstructions, directory / 'reconstructions.safetensors')
  result = {'format': 'tff-shadow-attack', 'version': 1, 'targets': records}
  (directory / 'result.json').write_text(json.dumps(result))
  config = {
    'attack': {'loss': 'cosine', 'steps': 1000, 'learning_rate': 0.1, 'seed': seed},
    'observation': 'observations/round_00001',
    'round': 1,
    'threat_model': THREAT_MODEL,
    'versions': {'tff-shadow': '0.1.0', 'numpy': np.__version__},
    'dataset': dataset,
    'model': 'convnet',
    'defense': defense,
    'batch_norm_sharing': 'none',
    'image_shape': [size, size, channels],
    'num_classes': 2,
  }
  (directory / 'config.json').write_text(json.dumps(config))
  write_training(run_dir, seed)
  return run_dir


def write_training(run_dir: pathlib.Path, seed: int) -> None:
  """config.json and metrics.csv of a training run of twenty rounds."""
  config = {
    'command': 'tff-shadow-train --dataset=retina --rounds=20 --seed=0',
    'flags': {'dataset': 'retina', 'rounds': 20, 'seed': seed},
    'versions': {'tff-shadow': '0.1.0', 'tensorflow-federated': '0.87.0'},
  }
  (run_dir / 'config.json').write_text(json.dumps(config))
  lines = ['round,train/loss,validation/f1,validation/accuracy']
  for round_number in range(1, 21):
    loss = 0.7 * 0.9**round_number
    score = f'{1 - loss:.4f},{1 - loss / 2:.4f}' if round_number % 2 == 0 else ','
    lines.append(f'{round_number},{loss:.4f},{score}')
  (run_dir / 'metrics.csv').write_text('\n'.join(lines) + '\n')
