"""The attack of `binaries/attack_speed.py` as one would write it in PyTorch, to compare with.

Needs torch and numpy only, and runs as a process of its own that is told by lines of JSON on its
standard input what to do, and answers each with a line:

  {"command": "evaluate", "variant": V, "path": P} -> {}, and P holds losses and image gradients;
  {"command": "time", "variant": V, "iterations": N} -> {"seconds": [elapsed, CPU]}.

The first line it writes tells its version and the variants it knows.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# As in attacks/priors.py and attacks/optimizers.py.
_SMOOTHING = 1e-8
_EPSILON = 1e-12


class _Conv(nn.Conv2d):
  """Padded as TensorFlow's 'same' does for even sizes: with stride 2 less before than after."""

  def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
    super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0)
    total = kernel - stride
    before, after = total // 2, total - total // 2
    self._pad = (before, after, before, after) if stride > 1 and total > 0 else None

  def forward(self, x):
    return super().forward(functional.pad(x, self._pad) if self._pad else x)


class _ConvSmall(nn.Module):
  def __init__(self, channels: int, size: int, classes: int):
    super().__init__()
    self.conv0 = _Conv(channels, 32, 3)
    self.conv1 = _Conv(32, 32, 3, 2)
    self.conv2 = _Conv(32, 64, 3)
    self.conv3 = _Conv(64, 64, 3, 2)
    self.logits = nn.Linear(64 * (size // 8) ** 2, classes)

  def forward(self, x):
    x = 4 * x - 2
    for conv in (self.conv0, self.conv1, self.conv2, self.conv3):
      x = functional.relu(conv(x))
    return self.logits(functional.avg_pool2d(x, 2).flatten(1))


class _Block(nn.Module):
  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    self.conv0 = _Conv(inputs, outputs, 3, stride)
    self.conv1 = _Conv(outputs, outputs, 3)
    self.shortcut = nn.Identity()
    if stride != 1 or inputs != outputs:
      self.shortcut = _Conv(inputs, outputs, 1, stride)

  def forward(self, x):
    y = self.conv1(functional.relu(self.conv0(x)))
    return functional.relu(y + self.shortcut(x))


class _ResNet18(nn.Module):
  """With the stem for large images."""

  def __init__(self, channels: int, size: int, classes: int):
    super().__init__()
    if size < 96:
      raise ValueError(f'size {size}: the stem for images below 96 px is not written here')
    self.stem = _Conv(channels, 64, 7, 2)
    self.blocks = []
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
      for index in range(2):
        block = _Block(inputs, outputs, 2 if stage > 0 and index == 0 else 1)
        self.add_module(f'stage{stage}_block{index}', block)
        self.blocks.append(block)
        inputs = outputs
    self.logits = nn.Linear(512, classes)

  def forward(self, x):
    x = functional.relu(self.stem(4 * x - 2))
    # Rounding up lets the last window hang over, which is TensorFlow's 'same' here.
    x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
    for block in self.blocks:
      x = block(x)
    return self.logits(functional.adaptive_avg_pool2d(x, 1).flatten(1))


_MODELS = {'conv_small': _ConvSmall, 'resnet18': _ResNet18}


def _load_weights(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
  """Fills `model` from arrays 'LAYER.kernel' and 'LAYER.bias' in Keras' layout."""
  channels = 0
  for name, layer in model.named_modules():
    if not isinstance(layer, nn.Conv2d | nn.Linear):
      continue
    name = name.replace('.', '_')
    kernel = torch.from_numpy(arrays[f'{name}.kernel'])
    if isinstance(layer, nn.Conv2d):
      kernel = kernel.permute(3, 2, 0, 1)
      channels = layer.out_channels
    else:
      # Keras flattens [H, W, C], torch [C, H, W].
      features, classes = kernel.shape
      kernel = kernel.reshape(features // channels, channels, classes).permute(2, 1, 0)
    with torch.no_grad():
      layer.weight.copy_(kernel.reshape(layer.weight.shape))
      layer.bias.copy_(torch.from_numpy(arrays[f'{name}.bias']))


def _cosine_distance(simulated, observed) -> torch.Tensor:
  dot = sum((a * b).sum() for a, b in zip(simulated, observed, strict=True))
  squares = sum(a.square().sum() for a in simulated)
  observed_squares = sum(b.square().sum() for b in observed)
  return 1 - dot / (squares * observed_squares).sqrt()


def _total_variation(images: torch.Tensor) -> torch.Tensor:
  corner = images[:, :, :-1, :-1]
  down = images[:, :, 1:, :-1] - corner
  right = images[:, :, :-1, 1:] - corner
  return (down.square() + right.square() + _SMOOTHING).sqrt().mean()


class _Attack:
  """What both variants share; images of all restarts are [R, B, C, H, W]."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.starts = torch.from_numpy(arrays['starts']).permute(0, 1, 4, 2, 3).contiguous()
    channels, _, size = self.starts.shape[2:]
    self.model = _MODELS[str(arrays['model'])](channels, size, int(arrays['classes']))
    _load_weights(self.model, arrays)
    self.labels = torch.from_numpy(arrays['labels']).long()
    self.tv_weight = float(arrays['tv_weight'])
    self.learning_rate = float(arrays['learning_rate'])
    images = torch.from_numpy(arrays['images']).permute(0, 3, 1, 2).contiguous()
    parameters = list(self.model.parameters())
    self.observed = torch.autograd.grad(self.training_loss(self.model(images)), parameters)

  def training_loss(self, logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, self.labels)

  def optimizer(self, images: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam([images], lr=self.learning_rate, eps=_EPSILON)


class _Loop(_Attack):
  """One restart after another."""

  def evaluate(self) -> tuple[torch.Tensor, torch.Tensor]:
    """Matching losses [R] and gradients of the objectives at the start images."""
    results = [self._step(start.clone().requires_grad_()) for start in self.starts]
    return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True))

  def run(self, iterations: int) -> None:
    """So many iterations of every restart, from its start."""
    for start in self.starts:
      images = start.clone().requires_grad_()
      optimizer = self.optimizer(images)
      best, best_images = float('inf'), start
      for _ in range(iterations):
        loss, images.grad = self._step(images)
        if (value := loss.item()) < best:
          best, best_images = value, images.detach().clone()
        optimizer.step()
        with torch.no_grad():
          images.clamp_(0, 1)
      del best_images

  def _step(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = list(self.model.parameters())
    training_loss = self.training_loss(self.model(images))
    gradient = torch.autograd.grad(training_loss, parameters, create_graph=True)
    loss = _cosine_distance(gradient, self.observed)
    objective = loss + self.tv_weight * _total_variation(images)
    return loss.detach(), torch.autograd.grad(objective, images)[0]


class _Vmap(_Attack):
  """All restarts at once, by torch.func."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    super().__init__(arrays)
    self._parameters = {k: v.detach() for k, v in self.model.named_parameters()}
    self._step = torch.func.vmap(torch.func.grad(self._objective, has_aux=True))

  def evaluate(self) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_Loop.evaluate`."""
    gradient, loss = self._step(self.starts)
    return loss, gradient

  def run(self, iterations: int) -> None:
    """As `_Loop.run`."""
    images = self.starts.clone()
    optimizer = self.optimizer(images)
    best = torch.full(images.shape[:1], float('inf'))
    best_images = images.clone()
    for _ in range(iterations):
      images.grad, loss = self._step(images)
      better = loss < best
      best = torch.where(better, loss, best)
      best_images[better] = images[better]
      optimizer.step()
      images.clamp_(0, 1)

  def _objective(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def training_loss(parameters):
      return self.training_loss(torch.func.functional_call(self.model, parameters, (images,)))

    gradient = torch.func.grad(training_loss)(self._parameters)
    loss = _cosine_distance(gradient.values(), self.observed)
    return loss + self.tv_weight * _total_variation(images), loss.detach()


_VARIANTS = {'loop': _Loop, 'vmap': _Vmap}


def main() -> None:
  """Answers requests until the input ends."""
  parser = argparse.ArgumentParser(description='The attack in PyTorch; see attack_speed.py.')
  parser.add_argument('--problem', required=True, help='An .npz that attack_speed.py wrote.')
  parser.add_argument('--threads', type=int, required=True, help='Of every operation.')
  arguments = parser.parse_args()
  torch.set_num_threads(arguments.threads)
  with np.load(arguments.problem, allow_pickle=False) as file:
    arrays = dict(file)
  names = ['loop', 'vmap'] if len(arrays['starts']) > 1 else ['loop']
  attacks = {name: _VARIANTS[name](arrays) for name in names}
  _answer(version=torch.__version__, variants=names)
  for line in sys.stdin:
    request = json.loads(line)
    attack = attacks[request['variant']]
    if request['command'] == 'evaluate':
      losses, gradients = attack.evaluate()
      gradients = gradients.permute(0, 1, 3, 4, 2)
      np.savez(request['path'], losses=losses.numpy(), gradients=gradients.numpy())
      _answer()
    elif request['command'] == 'time':
      begin, cpu_begin = time.perf_counter(), time.process_time()
      attack.run(request['iterations'])
      _answer(seconds=[time.perf_counter() - begin, time.process_time() - cpu_begin])
    else:
      raise ValueError(f'unknown command {request["command"]!r}')


def _answer(**values) -> None:
  print(json.dumps(values), flush=True)


if __name__ == '__main__':
  main()
