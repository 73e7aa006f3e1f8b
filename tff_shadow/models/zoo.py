"""Keras task models built here: `conv_small` and `resnet18`."""

from typing import Literal

import tensorflow as tf

from tff_shadow.errors import UserError

Norm = Literal['none', 'batch', 'group']
NORMS: tuple[Norm, ...] = ('none', 'batch', 'group')
# PyTorch's momentum 0.1: a client takes few local steps, so Keras' 0.99 would hardly move.
_BATCH_NORM_MOMENTUM = 0.9
_EPSILON = 1e-5


def build_model(
  name: str, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm = 'none', seed: int
) -> tf.keras.Model:
  """Builds a task model with freshly drawn weights.

  Args:
    name: One of `MODELS`.
    image_shape: (H, W, C) of the input images, which are float32 in [0, 1].
    num_classes: Number of logits.
    norm: Normalisation after each convolution.
    seed: Decides every initial weight.

  Returns:
    A functional Keras model [B, H, W, C] -> logits [B, num_classes].

  Raises:
    UserError: For an unknown name or norm.
  """
  if name not in MODELS:
    raise UserError(
      f'--model={name}: unknown; use one of {", ".join(sorted(MODELS))} or a path to a .keras file'
    )
  if norm not in NORMS:
    raise UserError(f'--norm={norm}: use one of {", ".join(NORMS)}')
  tf.keras.backend.clear_session()
  tf.keras.utils.set_random_seed(seed)
  return MODELS[name](image_shape, num_classes, norm)


def _standardise(inputs: tf.Tensor) -> tf.Tensor:
  """Maps [0, 1] to about zero mean and unit variance; part of the model, so nobody forgets it."""
  return tf.keras.layers.Rescaling(scale=4.0, offset=-2.0, name='standardise')(inputs)


def _normalise(x: tf.Tensor, norm: Norm, name: str) -> tf.Tensor:
  if norm == 'batch':
    return tf.keras.layers.BatchNormalization(
      momentum=_BATCH_NORM_MOMENTUM, epsilon=_EPSILON, name=f'{name}_bn'
    )(x)
  if norm == 'group':
    return tf.keras.layers.GroupNormalization(
      groups=min(32, x.shape[-1] // 2), epsilon=_EPSILON, name=f'{name}_gn'
    )(x)
  return x


def _conv(
  x: tf.Tensor, filters: int, kernel: int, stride: int, norm: Norm, name: str, gain: float = 2.0
) -> tf.Tensor:
  x = tf.keras.layers.Conv2D(
    filters,
    kernel,
    strides=stride,
    padding='same',
    use_bias=norm == 'none',
    kernel_initializer=tf.keras.initializers.VarianceScaling(gain, 'fan_in', 'truncated_normal'),
    name=name,
  )(x)
  return _normalise(x, norm, name)


def _conv_small(image_shape: tuple[int, int, int], num_classes: int, norm: Norm) -> tf.keras.Model:
  """Four convolutions and a dense layer: 32, 32, 64, 64 filters, two of stride 2."""
  inputs = tf.keras.Input(image_shape, name='image')
  x = _standardise(inputs)
  for index, (filters, stride) in enumerate(((32, 1), (32, 2), (64, 1), (64, 2))):
    x = _conv(x, filters, 3, stride, norm, f'conv{index}')
    x = tf.keras.layers.Activation('relu', name=f'relu{index}')(x)
  x = tf.keras.layers.AveragePooling2D(2, name='pool')(x)
  x = tf.keras.layers.Flatten(name='flatten')(x)
  return tf.keras.Model(
    inputs, tf.keras.layers.Dense(num_classes, name='logits')(x), name='conv_small'
  )


def _residual_block(
  x: tf.Tensor, filters: int, stride: int, norm: Norm, name: str, num_blocks: int
) -> tf.Tensor:
  shortcut = x
  y = _conv(x, filters, 3, stride, norm, f'{name}_conv0')
  y = tf.keras.layers.Activation('relu', name=f'{name}_relu0')(y)
  # Without normalisation the variance would double with every block (Fixup's remedy, softened).
  gain = 2.0 / num_blocks if norm == 'none' else 2.0
  y = _conv(y, filters, 3, 1, norm, f'{name}_conv1', gain)
  if stride != 1 or x.shape[-1] != filters:
    shortcut = _conv(x, filters, 1, stride, norm, f'{name}_shortcut', gain=1.0)
  y = tf.keras.layers.Add(name=f'{name}_add')([shortcut, y])
  return tf.keras.layers.Activation('relu', name=f'{name}_relu1')(y)


def _resnet18(image_shape: tuple[int, int, int], num_classes: int, norm: Norm) -> tf.keras.Model:
  """ResNet-18 (He et al. 2016, table 1); a 3x3 stem without pooling below 96 px, as for CIFAR."""
  inputs = tf.keras.Input(image_shape, name='image')
  x = _standardise(inputs)
  if min(image_shape[:2]) >= 96:
    x = _conv(x, 64, 7, 2, norm, 'stem')
    x = tf.keras.layers.Activation('relu', name='stem_relu')(x)
    x = tf.keras.layers.MaxPooling2D(3, 2, padding='same', name='stem_pool')(x)
  else:
    x = _conv(x, 64, 3, 1, norm, 'stem')
    x = tf.keras.layers.Activation('relu', name='stem_relu')(x)
  for stage, filters in enumerate((64, 128, 256, 512)):
    for block in range(2):
      stride = 2 if stage > 0 and block == 0 else 1
      x = _residual_block(x, filters, stride, norm, f'stage{stage}_block{block}', num_blocks=8)
  x = tf.keras.layers.GlobalAveragePooling2D(name='pool')(x)
  return tf.keras.Model(
    inputs, tf.keras.layers.Dense(num_classes, name='logits')(x), name='resnet18'
  )


MODELS = {'conv_small': _conv_small, 'resnet18': _resnet18}
