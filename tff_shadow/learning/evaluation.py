"""Metrics of a global model on held-out images."""

import numpy as np
import tensorflow as tf
from sklearn.metrics import f1_score, roc_auc_score

from tff_shadow.models import batch_norm_layers, outputs_logits

_EVALUATION_BATCH = 256


def evaluate(model: tf.keras.Model, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Computes the metrics of a classifier.

  Args:
    model: Images -> logits or probabilities.
    images: float32 [N, H, W, C] in [0, 1].
    labels: int32 [N].

  Returns:
    'loss' (cross-entropy, nats), 'accuracy', 'f1' (of class 1 for two classes, else the mean over
    classes) and 'auc' (area under the ROC curve; one against the rest, averaged, for more classes).
    'auc' is missing where `labels` lack a class.
  """
  outputs = model.predict(images, batch_size=_EVALUATION_BATCH, verbose=0).astype(np.float64)
  if outputs_logits(model):
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
  else:
    log_probabilities = np.log(np.clip(outputs, 1e-7, 1.0))
  num_classes = outputs.shape[-1]
  predicted = outputs.argmax(axis=-1)
  metrics = {
    'loss': float(-log_probabilities[np.arange(len(labels)), labels].mean()),
    'accuracy': float(np.mean(predicted == labels)),
    'f1': float(
      f1_score(
        labels,
        predicted,
        average='binary' if num_classes == 2 else 'macro',
        labels=None if num_classes == 2 else list(range(num_classes)),
        zero_division=0.0,
      )
    ),
  }
  if not np.isfinite(outputs).all():
    return metrics
  if len(np.unique(labels)) == num_classes:
    probabilities = np.exp(log_probabilities)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    metrics['auc'] = float(
      roc_auc_score(labels, probabilities[:, 1])
      if num_classes == 2
      else roc_auc_score(labels, probabilities, multi_class='ovr')
    )
  return metrics


def estimate_batch_norm_statistics(model: tf.keras.Model, images: np.ndarray) -> None:
  """Sets the BatchNorm statistics of `model` to those of `images` (AdaBN, Li et al. 2016).

  For `batch_norm_sharing='local'`, where the global model has none of its own: whoever uses it
  estimates them on unlabelled images of their own. One pass; each layer gets the mean over batches,
  weighted by their images, of the batch statistics that its own training mode computes.

  Args:
    model: Changed in place. Nothing happens without BatchNormalization layers.
    images: float32 [N, H, W, C] in [0, 1], at least two.
  """
  layers = batch_norm_layers(model)
  if not layers:
    return
  momenta = [layer.momentum for layer in layers]
  try:
    seen = 0
    for start in range(0, len(images), _EVALUATION_BATCH):
      batch = images[start : start + _EVALUATION_BATCH]
      # The running statistics are then the mean over the images so far of those of their batches.
      for layer in layers:
        layer.momentum = seen / (seen + len(batch))
      model(batch, training=True)
      seen += len(batch)
  finally:
    for layer, momentum in zip(layers, momenta, strict=True):
      layer.momentum = momentum
