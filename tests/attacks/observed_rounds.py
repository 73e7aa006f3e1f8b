"""Observations of rounds played here in plain TensorFlow, so that the answer is known."""

import numpy as np
import tensorflow as tf

from tff_shadow.models import classification_loss, freeze_batch_norm, model_to_config
from tff_shadow.observations import (
  ClientObservation,
  ClientTraining,
  Observation,
  WeightArrays,
  mean_update,
)


def small_model(
  image_shape=(8, 8, 1), num_classes=2, norm='none', activation='relu', seed=0
) -> tf.keras.Model:
  """Two convolutions, the first normalised or not, and a dense layer."""
  tf.keras.backend.clear_session()  # Names decide whether runs share what TFF built.
  tf.keras.utils.set_random_seed(seed)
  inputs = tf.keras.Input(image_shape)
  x = tf.keras.layers.Conv2D(12, 3, padding='same')(inputs)
  if norm == 'batch':
    x = tf.keras.layers.BatchNormalization()(x)
  elif norm == 'group':
    x = tf.keras.layers.GroupNormalization(4)(x)
  x = tf.keras.layers.Activation(activation)(x)
  x = tf.keras.layers.Conv2D(12, 3, strides=2, padding='same', activation=activation)(x)
  return tf.keras.Model(inputs, tf.keras.layers.Dense(num_classes)(tf.keras.layers.Flatten()(x)))


def smooth_images(count, image_shape=(8, 8, 1), seed=0) -> np.ndarray:
  """Float32 [count, H, W, C] in [0, 1]: a bright disc on a slope, no two alike."""
  rng = np.random.default_rng(seed)
  rows, columns = np.mgrid[: image_shape[0], : image_shape[1]] / image_shape[0]
  images = []
  for _ in range(count):
    slope = rng.uniform(0, 0.3) + rng.uniform(0, 0.3) * rows + rng.uniform(0, 0.2) * columns
    center = rng.uniform(0.3, 0.7, 2)
    distance = np.hypot(rows - center[0], columns - center[1])
    image = slope + 0.5 / (1 + np.exp((distance - 0.25) / 0.05))
    images.append(np.repeat(image[..., None], image_shape[2], axis=2))
  return np.clip(images, 0, 1).astype(np.float32)


def play_round(
  model,
  clients: list[tuple[np.ndarray, list[int]]],
  *,
  learning_rate=0.05,
  steps=1,
  momentum=0.0,
  batch_norm_sharing='aggregate',
) -> Observation:
  """Every client takes `steps` SGD steps on all of its images."""
  config = model_to_config(model)
  if batch_norm_sharing == 'frozen':
    freeze_batch_norm(model)
  loss_fn = classification_loss(model)
  statistics = [v.numpy() for v in model.non_trainable_variables]
  start = [v.numpy() for v in model.trainable_variables]
  observed = []
  for index, (images, labels) in enumerate(clients):
    velocity = [np.zeros_like(array) for array in start]
    for _ in range(steps):
      with tf.GradientTape() as tape:
        loss = loss_fn(np.asarray(labels), model(images, training=True))
      gradient = tape.gradient(loss, model.trainable_variables)
      velocity = [momentum * v + g.numpy() for v, g in zip(velocity, gradient, strict=True)]
      for variable, change in zip(model.trainable_variables, velocity, strict=True):
        variable.assign_sub(learning_rate * change)
    update = WeightArrays(
      tuple(v.numpy() - w for v, w in zip(model.trainable_variables, start, strict=True))
    )
    for variable, array in zip(model.trainable_variables, start, strict=True):
      variable.assign(array)
    observed.append(
      ClientObservation(f'client_{index:02d}', len(images), steps, float(len(images)), update)
    )
  image_shape = tuple(model.inputs[0].shape[1:])
  return Observation(
    round_num=1,
    dataset='discs',
    image_shape=image_shape,
    class_names=tuple(f'class {k}' for k in range(model.outputs[0].shape[-1])),
    model_name='small',
    model_config=config,
    batch_norm_sharing=batch_norm_sharing,
    client_training=ClientTraining(
      'sgd', learning_rate, momentum, max(len(images) for images, _ in clients), steps, None
    ),
    defense={'name': 'none'},
    global_weights=WeightArrays(tuple(start), tuple(statistics)),
    clients=tuple(observed),
    aggregate=mean_update(observed),
    public_mean_image=smooth_images(16, image_shape, seed=99).mean(axis=0),
  )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """In dB, for images in [0, 1]."""
  return float(10 * np.log10(1 / np.mean((a.astype(np.float64) - b) ** 2)))
