"""Labels of a client's images from the gradient of its last layer."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import tensorflow as tf

from attacks.simulator import ClientSimulator
from tff_shadow.errors import UserError

LabelsSource = Literal['known', 'inferred']
LabelRule = Literal['bias', 'idlg', 'llg', 'gradinversion']
LABEL_RULES: tuple[LabelRule, ...] = get_args(LabelRule)


@dataclasses.dataclass(frozen=True)
class Labels:
  """Labels an attack works with.

  Attributes:
    values: int32 [B], one per image. Where inferred, sorted: a gradient does not tell an order.
    source: 'known' if the attacker was told them, a stronger threat model.
  """

  values: np.ndarray
  source: LabelsSource


class LabelInference:
  """Infers the labels of clients with one number of images, from one round or from several.

  Every rule reads something of the gradient of the last layer and compares it with what the model
  makes of public images. Of several rounds both are averaged: a client's labels are the same in
  each, and fresh noise is not. The rules:

  - 'bias': for several images `label_counts`; for one the same as 'idlg'.
  - 'idlg': the one class whose gradient is negative (Zhao et al. 2020, "iDLG"). One image only.
  - 'llg': `impact_counts`, with impact and offset measured on the guesses (the white-box attack
    LLG* of Wainakh et al. 2022).
  - 'gradinversion': `distinct_labels`; for images that all have different labels.

  The last two read the kernel and count on features that are not negative, as behind a rectifier.
  """

  def __init__(
    self,
    simulators: Sequence[ClientSimulator],
    num_images: int,
    typical_images: np.ndarray,
    rule: LabelRule = 'bias',
  ):
    """Infers nothing yet.

    Args:
      simulators: Of the clients, one per round.
      num_images: B.
      typical_images: [N, H, W, C] public images, or guesses, for the mean prediction.
      rule: Which of the above.

    Raises:
      UserError: If there is no such rule, or it cannot tell that many labels.
    """
    if rule not in LABEL_RULES:
      raise UserError(f'label rule {rule!r}: unknown; use one of {", ".join(LABEL_RULES)}')
    if rule == 'idlg' and num_images > 1:
      raise UserError(
        f"label rule 'idlg': tells the label of one image, not of {num_images}; use 'bias' or 'llg'"
      )
    self._simulators = list(simulators)
    self._num_images = num_images
    self._typical_images = typical_images
    self._rule = rule

  def shown(self, view: int, gradient: Sequence[tf.Tensor]) -> tf.Tensor:
    """What a client's gradient shows of its labels: all that is needed of it.

    Args:
      view: Which of the rounds it is of.
      gradient: The observed one, per trainable variable.

    Returns:
      [classes], or the gradient of the kernel [features, classes].

    Raises:
      UserError: If the last layer is not as the rule needs it.
    """
    kernel, bias = self._simulators[view].logits_layer_gradient(list(gradient))
    if kernel is None:
      raise UserError(
        '--labels=infer: needs a model whose last layer is dense and trained; give the labels as a'
        ' list or use --labels=truth'
      )
    if self._rule == 'gradinversion':
      return kernel
    if self._rule == 'llg':
      return tf.constant(np.asarray(kernel, np.float64).sum(axis=0))
    if bias is not None:
      return bias
    if self._num_images > 1:
      raise UserError(
        "label rule 'bias': the last layer has no bias, which is needed for more than one image;"
        " use 'llg', give the labels as a list or use --labels=truth"
      )
    # Features after a rectifier are not negative, so the sum over them keeps the sign.
    return tf.reduce_sum(kernel, axis=0)

  def labels(self, shown: Sequence[tf.Tensor]) -> Labels:
    """The labels of a client, sorted.

    Args:
      shown: `LabelInference.shown` of what it sent in each round.

    Raises:
      UserError: If the rule cannot tell them.
    """
    mean = np.asarray(_mean(shown))
    if self._rule == 'gradinversion':
      return _sorted_labels(distinct_labels(mean, self._num_images))
    if self._rule == 'llg':
      return _from_counts(impact_counts(mean, self._num_images, *self._impact))
    if self._num_images == 1:
      return _sorted_labels(np.array([int(np.argmin(mean))]))
    return _from_counts(label_counts(self._prediction, mean, self._num_images))

  @functools.cached_property
  def _prediction(self) -> np.ndarray:
    """[classes]."""
    images = tf.constant(self._typical_images, self._simulators[0].dtype)
    return np.asarray(_mean([own.mean_probabilities(images) for own in self._simulators]))

  @functools.cached_property
  def _impact(self) -> tuple[float, np.ndarray]:
    """Impact of one image and offset [classes]."""
    found = [_impact(own, self._num_images, self._typical_images) for own in self._simulators]
    impacts, offsets = zip(*found, strict=True)
    return float(np.mean(impacts)), np.mean(offsets, axis=0)


def infer_labels(
  simulators: Sequence[ClientSimulator],
  gradients: Sequence[Sequence[tf.Tensor]],
  num_images: int,
  typical_images: np.ndarray,
  rule: LabelRule = 'bias',
) -> Labels:
  """Infers the labels of `num_images` images from their mean gradients; see `LabelInference`.

  Args:
    simulators: Of the client, one per round.
    gradients: The observed one in each round, per trainable variable.
    num_images: B.
    typical_images: [N, H, W, C] public images, or guesses, for the mean prediction.
    rule: Of `LABEL_RULES`.

  Returns:
    The labels, sorted.

  Raises:
    UserError: If the rule cannot tell that many labels, or the last layer is not as it needs it.
  """
  inference = LabelInference(simulators, num_images, typical_images, rule)
  return inference.labels([inference.shown(view, own) for view, own in enumerate(gradients)])


def label_counts(prediction: np.ndarray, bias_gradient: np.ndarray, num_images: int) -> np.ndarray:
  """How many of `num_images` images each class has, from the bias of the logits.

  With mean cross-entropy its gradient is mean(p) - counts / B. The mean prediction p of the model
  on typical images stands in for the unknown one and counts = B (p - gradient) (Geng et al. 2021,
  "Towards general deep leakage in federated learning", section 4), rounded to whole images by the
  largest remainders.

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


def impact_counts(
  kernel_sums: np.ndarray, num_images: int, impact: float, offset: np.ndarray
) -> np.ndarray:
  """How many of `num_images` images each class has, from the kernel of the logits.

  Behind features that are not negative the sum over a class's column is about
  count * impact + offset with a negative impact: a column that sums below zero proves its class
  (property 1 of Wainakh et al. 2022, "User-level label leakage from gradients in federated
  learning", "LLG"), and each image takes one impact away (property 2). So every such class gets an
  image, and the rest go one by one to the class with the least sum left (their algorithm 1).

  Args:
    kernel_sums: [classes], sums over the features of the kernel's gradient.
    num_images: The sum of the counts.
    impact: What one image adds to the sum of its class; negative.
    offset: [classes], what images of other classes add.

  Returns:
    int64 [classes].
  """
  left = kernel_sums.astype(np.float64)
  counts = np.zeros(len(left), np.int64)
  proven = np.flatnonzero(left < 0)
  counts[proven[np.argsort(left[proven], kind='stable')][:num_images]] = 1
  left = left - offset - counts * impact
  for _ in range(num_images - counts.sum()):
    least = np.argmin(left)
    counts[least] += 1
    left[least] -= impact
  return counts


def distinct_labels(kernel_gradient: np.ndarray, num_images: int) -> np.ndarray:
  """The labels of images that all have different ones, from the kernel of the logits.

  Those classes whose columns have the most negative entries (Yin et al. 2021, "See through
  gradients: image batch recovery via GradInversion").

  Args:
    kernel_gradient: [features, classes].
    num_images: B, at most the number of classes.

  Returns:
    int64 [B], the most negative first.

  Raises:
    UserError: If there are more images than classes.
  """
  classes = kernel_gradient.shape[1]
  if num_images > classes:
    raise UserError(
      f"label rule 'gradinversion': needs images with different labels, but there are {num_images}"
      f" images and {classes} classes; use 'bias' or 'llg'"
    )
  return np.argsort(kernel_gradient.min(axis=0), kind='stable')[:num_images]


def start_logits(counts: np.ndarray, confidence: float = 0.9) -> np.ndarray:
  """Where an optimisation of images together with their labels may start.

  Image by image the classes are given out in their order, and each image is sure of its own up to
  `confidence`; the rest is spread over all others. So the optimiser can still correct a count.

  Args:
    counts: int [classes], summing to B.
    confidence: Probability of the class that an image starts with; above 1 / classes, below 1.

  Returns:
    float32 [B, classes]; the softmax of a row has the confidence at its class.

  Raises:
    ValueError: If the confidence is out of range.
  """
  counts = np.asarray(counts)
  classes = len(counts)
  if not 1 / classes < confidence < 1:
    raise ValueError(f'confidence must be above 1 / {classes} and below 1, got {confidence}')
  logits = np.full((counts.sum(), classes), np.log((1 - confidence) / (classes - 1)), np.float32)
  logits[np.arange(len(logits)), np.repeat(np.arange(classes), counts)] = np.log(confidence)
  return logits


def label_accuracy(inferred: Sequence[int], true: Sequence[int]) -> float:
  """Share of the labels that are right as a multiset: the order of neither side counts.

  Args:
    inferred: B labels.
    true: B labels, at least one.

  Returns:
    The size of the two multisets' intersection over B, in [0, 1].

  Raises:
    ValueError: If the numbers of labels differ or are zero.
  """
  if len(inferred) != len(true) or not len(true):
    raise ValueError(f'{len(inferred)} inferred labels for {len(true)} true ones')
  counts = (collections.Counter(int(label) for label in labels) for labels in (inferred, true))
  return sum((next(counts) & next(counts)).values()) / len(true)


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


def _impact(
  simulator: ClientSimulator, num_images: int, typical_images: np.ndarray
) -> tuple[float, np.ndarray]:
  """Impact of one of `num_images` images and offset [classes], see `impact_counts`."""
  images = tf.constant(typical_images, simulator.dtype)

  def kernel_sums(label: int) -> np.ndarray:
    gradient = simulator.gradient(images, tf.fill([len(typical_images)], label))
    kernel, _ = simulator.logits_layer_gradient(gradient)
    return np.asarray(kernel, np.float64).sum(axis=0)

  # The gradient is linear in the one-hot labels, so two labels tell what all others would: the
  # difference is the impact without the paper's correction by 1 + 1 / classes, which is meant for
  # many classes.
  first, second = kernel_sums(0), kernel_sums(1)
  impact = float(first[0] - second[0]) / num_images
  if not impact < 0:
    raise UserError(
      "label rule 'llg': the features before the last layer are negative on average; use 'bias'"
    )
  return impact, np.concatenate([second[:1], first[1:]])


def _mean(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
  return tf.add_n(list(tensors)) / len(tensors)


def _from_counts(counts: np.ndarray) -> Labels:
  return _sorted_labels(np.repeat(np.arange(len(counts)), counts))


def _sorted_labels(values: np.ndarray) -> Labels:
  return Labels(np.sort(values).astype(np.int32), 'inferred')
