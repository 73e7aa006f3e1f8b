"""Numbers of the reference implementation that lpips_test.py holds ours to.

python -m tests.attacks.scoring.lpips_reference

It needs torch, and `lpips` (the package of the paper's authors) without its dependencies; it stands
in for torchvision, of which only the layers' sequence is used. Weights and images come from seeds,
with fewer channels than the real networks have, so that nothing large is stored or downloaded.
"""

import pathlib
import sys
import types

import numpy as np
from safetensors.numpy import save_file

WIDTHS = {'alex': (6, 8, 10, 7, 5), 'vgg': (4, 4, 6, 6, 8, 8, 8, 7, 7, 7, 5, 5, 5)}
# Convolutions' positions in torchvision's `features`, their kernels, and which are measured.
CONVOLUTIONS = {
  'alex': ((0, 11), (3, 5), (6, 3), (8, 3), (10, 3)),
  'vgg': tuple((index, 3) for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}
MEASURED = {'alex': (0, 1, 2, 3, 4), 'vgg': (1, 3, 6, 9, 12)}


def seeded_weights(net: str, seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights that keep the scale of the features, under the names of the weights file."""
  generator = np.random.default_rng(seed)
  tensors, channels = {}, 3
  for (index, side), width in zip(CONVOLUTIONS[net], WIDTHS[net], strict=True):
    kernel = generator.standard_normal((width, channels, side, side))
    kernel *= np.sqrt(2 / (channels * side**2))
    tensors[f'features.{index}.weight'] = kernel.astype(np.float32)
    bias = 0.1 * generator.standard_normal(width)
    tensors[f'features.{index}.bias'] = bias.astype(np.float32)
    channels = width
  for number, position in enumerate(MEASURED[net]):
    head = generator.random((1, WIDTHS[net][position], 1, 1)).astype(np.float32)
    tensors[f'lin{number}.model.1.weight'] = head
  return tensors


def seeded_lpips(directory: pathlib.Path, net: str):
  """Our metric with these weights, which it reads from a file written into `directory`."""
  from attacks.scoring.lpips import load_lpips

  save_file(seeded_weights(net), directory / f'{net}.safetensors')
  return load_lpips(directory / f'{net}.safetensors', net)


def seeded_images(height: int, width: int, channels: int, seed: int = 1) -> np.ndarray:
  """Two images in [0, 1], float32 [2, height, width, channels]: the second, noise on the first."""
  generator = np.random.default_rng(seed)
  first = generator.random((height, width, channels))
  second = 0.7 * first + 0.3 * generator.random(first.shape)
  return np.stack([first, second]).astype(np.float32)


def main() -> None:
  """Prints distance, map at two corners, and mean of the map's upper left quarter."""
  import torch
  from torch import nn

  def features(net):
    layers, channels = [], 3
    kernels = dict(CONVOLUTIONS[net])
    pools = {'alex': (2, 5), 'vgg': (4, 9, 16, 23)}[net]
    widths = iter(WIDTHS[net])
    while len(layers) <= max(kernels) + 1:
      index = len(layers)
      if index in kernels:
        side, width = kernels[index], next(widths)
        first = net == 'alex' and index == 0
        stride, padding = (4, 2) if first else (1, side // 2)
        layers.append(nn.Conv2d(channels, width, side, stride, padding))
        channels = width
      elif index in pools:
        layers.append(nn.MaxPool2d(3, 2) if net == 'alex' else nn.MaxPool2d(2, 2))
      else:
        layers.append(nn.ReLU())
    weights = {k.removeprefix('features.'): torch.tensor(v) for k, v in seeded_weights(net).items()}
    sequence = nn.Sequential(*layers)
    sequence.load_state_dict({k: v for k, v in weights.items() if not k.startswith('lin')})
    return types.SimpleNamespace(features=sequence)

  torchvision = types.ModuleType('torchvision')
  torchvision.models = types.ModuleType('torchvision.models')
  torchvision.models.alexnet = lambda **_: features('alex')
  torchvision.models.vgg16 = lambda **_: features('vgg')
  sys.modules |= {'torchvision': torchvision, 'torchvision.models': torchvision.models}
  import lpips

  for net in WIDTHS:
    for shape in ((32, 32, 3), (32, 32, 1), (41, 50, 3)):
      metric = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
      for number, position in enumerate(MEASURED[net]):
        metric.lins[number] = lpips.NetLinLayer(WIDTHS[net][position], use_dropout=True)
        head = seeded_weights(net)[f'lin{number}.model.1.weight']
        metric.lins[number].model[1].weight.data = torch.tensor(head)
      metric.double().eval()
      pair = seeded_images(*shape).astype(np.float64)
      pair = np.broadcast_to(pair, (*pair.shape[:3], 3)).transpose(0, 3, 1, 2).copy()
      first, second = torch.tensor(pair[:1]), torch.tensor(pair[1:])
      with torch.no_grad():
        metric.spatial = False
        value = metric(first, second, normalize=True).item()
        metric.spatial = True
        spatial = metric(first, second, normalize=True).numpy()[0, 0]
      quarter = spatial[: shape[0] // 2, : shape[1] // 2].mean()
      numbers = (value, spatial[0, 0], spatial[-1, -1], quarter)
      print(f'({net!r}, {shape}): ({", ".join(f"{number:.9f}" for number in numbers)}),')


if __name__ == '__main__':
  main()
