"""What an attack's iteration costs, in units of the training step that it simulates."""

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from attacks.config import AttackConfig
from attacks.local_steps import LocalSteps
from attacks.simulator import ClientSimulator
from attacks.solver import Evidence, Solver
from tff_shadow.models import Norm, build_model, classification_loss, model_to_config
from tff_shadow.observations import ClientTraining, Observation, WeightArrays

_REPEATS = 5
_ONE_STEP = LocalSteps(((0,),), is_exact=True)


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
  shape = (image_size, image_size, channels)
  model = build_model(model_name, image_shape=shape, num_classes=2, norm=norm, seed=0)
  simulator = ClientSimulator(_observation(model_name, model, shape))
  image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
  labels = np.zeros((1,), np.int32)
  loss_fn = classification_loss(model)

  @tf.function
  def training_gradient(images):
    with tf.GradientTape() as tape:
      loss = loss_fn(labels, model(images, training=True))
    return tape.gradient(loss, model.trainable_variables)

  observed = training_gradient(tf.constant(image))
  solver = Solver([simulator], [_ONE_STEP], AttackConfig(), matching=True, use_xla=use_xla)
  seeds = np.zeros((1, 2), np.int32)
  evidence = Evidence(
    tf.zeros([1], tf.int32),
    tf.constant(labels[None]),
    (tuple(tensor[None] for tensor in observed),),
    (),
    tf.constant(seeds),
  )
  state = solver.advance(solver.start(np.full_like(image[None], 0.5), seeds), evidence, 1)
  attack_secs, training_secs = [], []
  for _ in range(_REPEATS):
    stop = int(state.iteration) + 1
    attack_secs.append(
      _seconds(lambda state=state, stop=stop: solver.advance(state, evidence, stop).loss)
    )
    training_secs.append(_seconds(lambda: training_gradient(tf.constant(image))[0]))
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
