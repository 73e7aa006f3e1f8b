"""What an attack's iteration costs, in units of the training step that it simulates."""

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.local_steps import LocalSteps
from attacks.simulator import ClientSimulator
from attacks.solver import Evidence, Solver
from tff_shadow.models import (
  Norm,
  build_model,
  classification_loss,
  graph_function,
  model_to_config,
)
from tff_shadow.observations import ClientTraining, Observation, WeightArrays

_REPEATS = 5
_ONE_STEP = LocalSteps(((0,),))


class TimedAttack:
  """The attack on one image of noise sent through a freshly drawn model, ready to be timed.

  The same arguments give the same problem, whether compiled or not.

  Attributes:
    model: The model under attack.
    images: float32 [1, H, W, C], the true image.
    labels: int32 [1].
    starts: float32 [R, 1, H, W, C], where the lanes start.
  """

  def __init__(
    self,
    model_name: str,
    image_size: int,
    config: AttackConfig,
    *,
    lanes: int = 1,
    norm: Norm = 'none',
    channels: int = 3,
    use_xla: bool = False,
  ):
    """Traces nothing yet.

    Args:
      model_name: One of `tff_shadow.models.MODELS`.
      image_size: Side of the image in pixels.
      config: Settings of the attack; its restarts and lanes are not used.
      lanes: Restarts that run side by side.
      norm: Normalisation of the model.
      channels: 1 or 3.
      use_xla: Whether the attack's step is compiled.
    """
    shape = (image_size, image_size, channels)
    self.model = build_model(model_name, image_shape=shape, num_classes=2, norm=norm, seed=0)
    random = np.random.default_rng(0)
    self.images = random.random((1, *shape), dtype=np.float32)
    self.labels = np.zeros((1,), np.int32)
    # Around mid grey, and not so near to 0 or 1 that pixels would be clipped.
    self.starts = 0.5 + 0.1 * (random.random((lanes, 1, *shape), dtype=np.float32) - 0.5)
    self._training_gradient = _training_gradient(self.model, self.labels)
    simulator = ClientSimulator(_observation(model_name, self.model, shape))
    self._solver = Solver([simulator], [_ONE_STEP], config, matching=True, use_xla=use_xla)
    seeds = np.zeros((lanes, 2), np.int32)
    self._evidence = Evidence(
      tf.zeros([lanes], tf.int32),
      tf.constant(self.labels[None]),
      (tuple(tensor[None] for tensor in self._training_gradient(tf.constant(self.images))),),
      (),
      tf.constant(seeds),
    )
    self._start = self._solver.start(self.starts, seeds)

  def evaluate(self) -> tuple[np.ndarray, np.ndarray]:
    """Matching losses [R] and the objectives' pixel gradients [R, 1, H, W, C] at the start."""
    evaluate = graph_function(self._solver.loss_and_gradient, self.model)
    seen = evaluate(self._start.parameters, self._evidence, self._start.iteration)
    return seen.loss.numpy(), seen.gradient['images'].numpy()

  def seconds(self, iterations: int) -> float:
    """Duration of so many iterations of all lanes from the start; the first call traces too."""
    return _seconds(lambda: self._solver.advance(self._start, self._evidence, iterations).loss)

  def training_seconds(self) -> float:
    """Duration of a gradient of the training loss with respect to the weights."""
    return _seconds(lambda: self._training_gradient(tf.constant(self.images))[0])


def attack_over_training_step(
  model_name: str, image_size: int, *, norm: Norm = 'none', channels: int = 3, use_xla: bool = False
) -> tuple[float, float]:
  """Times an attack's iteration and a forward and backward pass on one image.

  The two alternate, so that a change in the machine's load meets both, and the median of each is
  taken.

  Args:
    model_name: One of `tff_shadow.models.MODELS`.
    image_size: Side of the image in pixels.
    norm: Normalisation of the model.
    channels: 1 or 3.
    use_xla: Whether the attack's step is compiled.

  Returns:
    Seconds of an attack iteration (default settings: gradient of the matching loss with respect to
    the image, prior, Adam), and of one gradient of the training loss with respect to the weights.
  """
  attack = TimedAttack(
    model_name, image_size, AttackConfig(), norm=norm, channels=channels, use_xla=use_xla
  )
  attack.seconds(1)
  attack_secs, training_secs = [], []
  for _ in range(_REPEATS):
    attack_secs.append(attack.seconds(1))
    training_secs.append(attack.training_seconds())
  return float(np.median(attack_secs)), float(np.median(training_secs))


def bench_lines() -> list[str]:
  """The lines that `make bench` prints."""
  attack, training = attack_over_training_step('resnet18', 224)
  small, _ = attack_over_training_step('conv_small', 32)
  return [
    f'BENCH attack_over_fwdbwd_resnet18_224 {attack / training:.2f}',
    f'BENCH attack_iterations_per_second_resnet18_224 {1 / attack:.2f}',
    f'BENCH attack_iterations_per_second_conv_small_32 {1 / small:.1f}',
  ]


def _training_gradient(model: tf.keras.Model, labels: np.ndarray) -> Callable:
  loss_fn = classification_loss(model)

  def gradient(images):
    with tf.GradientTape() as tape:
      loss = loss_fn(labels, model(images, training=True))
    return tape.gradient(loss, model.trainable_variables)

  return graph_function(gradient, model)


def _seconds(run: Callable[[], tf.Tensor]) -> float:
  begin = time.perf_counter()
  run().numpy()
  return time.perf_counter() - begin


def _observation(name: str, model: tf.keras.Model, shape: tuple[int, int, int]) -> Observation:
  """As much of an observation as a simulator needs."""
  weights = WeightArrays(
    tuple(variable.numpy() for variable in model.trainable_variables),
    tuple(variable.numpy() for variable in model.non_trainable_variables),
  )
  return Observation(
    round_num=1,
    dataset='noise',
    image_shape=shape,
    class_names=('a', 'b'),
    model_name=name,
    model_config=model_to_config(model),
    batch_norm_sharing='aggregate',
    client_training=ClientTraining('sgd', 0.01, 0.0, 1, 1, None),
    defense={'name': 'none'},
    global_weights=weights,
    clients=(),
    aggregate=weights,
    public_mean_image=np.full(shape, 0.5, np.float32),
  )
