"""Labels of a client's images from the gradient of its last layer."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import tensorflow as tf

from attacks.simulator import ClientSimulator
from tff_shadow.errors import UserError

LabelsSource = Literal['known', 'inferred']


@dataclasses.dataclass(frozen=True)
class Labels:
  """Labels an attack works with.

  Attributes:
    values: int32 [B], one per image. Where inferred, sorted: a gradient does not tell an order.
    source: 'known' if the attacker was told them, a stronger threat model.
  """

  values: np.ndarray
  source: LabelsSource


def infer_labels(
  simulator: ClientSimulator,
  gradient: Sequence[tf.Tensor],
  num_images: int,
  typical_images: np.ndarray,
) -> Labels:
  """Infers the labels of `num_images` images from their mean gradient.

  With mean cross-entropy the bias of the logits has the gradient mean(p) - counts / B. For one
  image it is negative at the true class alone (Zhao et al. 2020, "iDLG"); for several the mean
  prediction p of the model on typical images stands in for the unknown one and
  counts = B (p - gradient) (Geng et al. 2021, "Towards general deep leakage in federated
  learning", section 4), rounded to whole images by the largest remainders.

  Args:
    simulator: Of the client.
    gradient: The observed one, per trainable variable.
    num_images: B.
    typical_images: [N, H, W, C] public images, or guesses, for the mean prediction.

  Returns:
    The labels, sorted.

  Raises:
    UserError: If the model does not end in a dense layer that is trained.
  """
  kernel, bias = simulator.logits_layer_gradient(list(gradient))
  if bias is None and kernel is None:
    raise UserError(
      '--labels=infer: needs a model whose last layer is dense and trained; give the labels as a'
      ' list or use --labels=truth'
    )
  if bias is None and num_images > 1:
    raise UserError(
      '--labels=infer: the last layer has no bias, which is needed for more than one image; give'
      ' the labels as a list or use --labels=truth'
    )
  if num_images == 1:
    # Features after a rectifier are not negative, so the sum over them keeps the sign.
    signed = bias if bias is not None else tf.reduce_sum(kernel, axis=0)
    return Labels(np.array([int(tf.argmin(signed))], np.int32), 'inferred')
  prediction = simulator.mean_probabilities(tf.constant(typical_images, simulator.dtype))
  counts = label_counts(np.asarray(prediction), np.asarray(bias), num_images)
  return Labels(np.repeat(np.arange(len(counts), dtype=np.int32), counts), 'inferred')


def label_counts(prediction: np.ndarray, bias_gradient: np.ndarray, num_images: int) -> np.ndarray:
  """How many of `num_images` images each class has.

  Args:
    prediction: [classes], the model's mean prediction.
    bias_gradient: [classes], of the mean cross-entropy.
    num_images: The sum of the counts.

  Returns:
    int64 [classes].
  """
  share = np.maximum(prediction.astype(np.float64) - bias_gradient, 0)
  if not share.sum() > 0:
    share = np.ones_like(share)
  expected = num_images * share / share.sum()
  counts = np.floor(expected).astype(np.int64)
  remainders = expected - counts
  for index in np.argsort(-remainders, kind='stable')[: num_images - counts.sum()]:
    counts[index] += 1
  return counts


def known_labels(values: Sequence[int], num_images: int, num_classes: int, source: str) -> Labels:
  """Labels the attacker was told.

  Raises:
    UserError: If their number or a value does not fit; `source` says where they came from.
  """
  if len(values) != num_images:
    raise UserError(f'{source}: {len(values)} labels for {num_images} images')
  for value in values:
    if not 0 <= value < num_classes:
      raise UserError(f'{source}: label {value} is not in 0..{num_classes - 1}')
  return Labels(np.asarray(values, np.int32), 'known')
