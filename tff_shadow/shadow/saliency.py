"""Region maps from where a task model looks, computed by tf-keras-vis in a graph."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import tensorflow as tf
from tf_keras_vis.gradcam import Gradcam
from tf_keras_vis.saliency import Saliency

from tff_shadow.errors import UserError
from tff_shadow.models import graph_function
from tff_shadow.shadow.region_maps import (
  RegionMap,
  RegionMaps,
  given_region_map,
  maps_from_scores,
  uniform_region_map,
)
from tff_shadow.shadow.tapped_model import TAP, choose_layer, tap_model

ScoreFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

_CAM_KINDS = ('gradcam_pp', 'gradcam', 'layercam')
_GRADIENT_KINDS = ('saliency', 'smoothgrad')
KINDS = (*_CAM_KINDS, *_GRADIENT_KINDS, 'given', 'uniform')


@dataclasses.dataclass(frozen=True)
class SaliencyConfig:
  """What a region map is made of.

  Attributes:
    kind: `gradcam_pp` (Chattopadhyay et al. 2018), `gradcam` (Selvaraju et al. 2017), `layercam`
      (Jiang et al. 2021), `saliency` (Simonyan et al. 2014), `smoothgrad` (Smilkov et al. 2017),
      `given` (the regions of the data set) or `uniform` (ones).
    layer: Convolutional layer of the class activation maps; None for the last one.
    target: Whose score is explained: the class `label`, the `predicted` class, or a fixed index.
    linear_output: Explain the logit of a model that ends in a softmax. By default the score is the
      model's output for the class, as in tf-keras-vis: a probability then, whose gradient vanishes
      where the model is sure.
    top_fraction: Keep this fraction of the pixels, in (0, 1); None for the whole range of scores.
    softness: Width of the ramp at the edge of the top fraction, in units of the score's maximum.
    smooth_samples: Noisy copies of an image for `smoothgrad`; 0 makes it `saliency`.
    smooth_noise: Their noise's standard deviation over the range of the image's values.
    seed: Decides the noise of `smoothgrad`. The noise is the same for every image, so that the map
      of an image does not depend on its batch.
  """

  kind: str = 'gradcam_pp'
  layer: str | None = None
  target: Literal['label', 'predicted'] | int = 'label'
  linear_output: bool = False
  top_fraction: float | None = None
  softness: float = 0.05
  smooth_samples: int = 8
  smooth_noise: float = 0.2
  seed: int = 0

  def __post_init__(self):
    if self.kind == 'scorecam':
      raise UserError(
        "saliency kind 'scorecam': tf-keras-vis computes it with NumPy, SciPy and Model.predict,"
        ' which cannot run inside a TFF computation; compute the maps beforehand with'
        " tf_keras_vis.scorecam.Scorecam and pass them with kind 'given'"
      )
    if self.kind not in KINDS:
      raise UserError(f'saliency kind {self.kind!r}: unknown; use one of {", ".join(KINDS)}')
    if self.layer is not None and self.kind not in _CAM_KINDS:
      raise UserError(f"saliency layer {self.layer}: kind '{self.kind}' uses none; leave it out")
    is_index = isinstance(self.target, int) and not isinstance(self.target, bool)
    if not (self.target in ('label', 'predicted') or (is_index and self.target >= 0)):
      raise UserError(
        f"saliency target {self.target!r}: use 'label', 'predicted' or the index of a class"
      )
    if self.top_fraction is not None:
      if self.kind in ('given', 'uniform'):
        raise UserError(f"saliency top_fraction: kind '{self.kind}' is used as it is; leave it out")
      if not 0.0 < self.top_fraction < 1.0:
        raise UserError(f'saliency top_fraction {self.top_fraction}: must be between 0 and 1')
    if not 0.0 < self.softness <= 1.0:
      raise UserError(f'saliency softness {self.softness}: must be above 0 and at most 1')
    if self.smooth_samples < 0:
      raise UserError(f'saliency smooth_samples {self.smooth_samples}: must be at least 0')
    if not (self.smooth_noise >= 0.0 and np.isfinite(self.smooth_noise)):
      raise UserError(f'saliency smooth_noise {self.smooth_noise}: must be at least 0')


def build_region_map(config: SaliencyConfig, model: tf.keras.Model | None = None) -> RegionMap:
  """Builds the region map that `config` describes.

  The map of an image depends on that image, its label and the weights that `model` has when the map
  is called. It is traced once, here; so inside a TFF computation build it there, around the model
  whose variables hold the global weights. Layers are in inference mode. No gradient flows through.

  Args:
    config: What to compute.
    model: The shadow model [B, H, W, C] -> [B, classes]; not needed for `given` and `uniform`.

  Returns:
    A `RegionMap` for any batch size. Called eagerly it raises `UserError` for a label without a
    class; in a graph such an image has no score and falls back.

  Raises:
    UserError: If the model has no such layer or class.
  """
  if config.kind == 'uniform':
    return uniform_region_map
  if config.kind == 'given':
    return given_region_map
  score_fn = build_score_fn(config, model)
  num_classes = model.outputs[0].shape[-1]

  def compute(images, labels):
    finite = tf.reduce_all(tf.math.is_finite(images), axis=[1, 2, 3], keepdims=True)
    return maps_from_scores(
      tf.where(finite, score_fn(images, labels), np.nan),
      tf.shape(images)[1:3],
      top_fraction=config.top_fraction,
      softness=config.softness,
    )

  # Traced here, for a model built in a graph later would leave this one's layers not callable.
  traced = graph_function(compute, model).get_concrete_function(
    tf.TensorSpec(model.inputs[0].shape, tf.float32), tf.TensorSpec([None], tf.int32)
  )

  def region_map(images, labels, given_regions=None):
    del given_regions
    images = tf.convert_to_tensor(images, tf.float32)
    labels = tf.cast(labels, tf.int32)
    if not images.shape.is_compatible_with(model.inputs[0].shape):
      raise UserError(
        f'saliency: images of shape {tuple(images.shape)}, but the model takes'
        f' {tuple(model.inputs[0].shape)}'
      )
    if tf.executing_eagerly() and config.target == 'label':
      _check_labels(labels.numpy(), num_classes)
    result = RegionMaps(*traced(images, labels))
    return RegionMaps(
      tf.ensure_shape(result.maps, [*images.shape[:3], 1]),
      tf.ensure_shape(result.fell_back, images.shape[:1]),
    )

  return region_map


def build_score_fn(config: SaliencyConfig, model: tf.keras.Model | None) -> ScoreFn:
  """The scores behind a region map, as tf-keras-vis gives them before any resizing or scaling.

  Equal to the library's eager result (`expand_cam=False, normalize_cam=False` or
  `normalize_map=False`), but for Grad-CAM++ by a factor per image: see `_grad_cam_pp_weights`.

  Args:
    config: What to compute; its top fraction is not used.
    model: See `build_region_map`.

  Returns:
    A function from images [B, H, W, C] and labels int32 [B] to float32 [B, h, w, 1], at least 0;
    [h, w] is the layer's size, or the image's for the gradient kinds. Traceable, any batch size.
  """
  if config.kind not in (*_CAM_KINDS, *_GRADIENT_KINDS):
    raise UserError(f"saliency kind '{config.kind}' has no scores")
  if model is None:
    raise UserError(f"saliency kind '{config.kind}' needs a model")
  if len(model.inputs) != 1 or len(model.outputs) != 1:
    raise UserError(
      f"saliency kind '{config.kind}': model {model.name} has {len(model.inputs)} inputs and"
      f' {len(model.outputs)} outputs; it must have one of each'
    )
  num_classes = model.outputs[0].shape[-1]
  if num_classes == 1 and isinstance(config.target, str):
    raise UserError(
      f"saliency target '{config.target}': model {model.name} has a single output, which is no"
      " score of a class; use a model with one output per class, or saliency 'given' or 'uniform'"
    )
  if not isinstance(config.target, str) and config.target >= num_classes:
    raise UserError(
      f'saliency target {config.target}: model {model.name} has classes 0 to {num_classes - 1}'
    )
  layer = choose_layer(model, config.layer) if config.kind in _CAM_KINDS else None
  tapped = tap_model(model, layer, linear_output=config.linear_output)

  def class_score(labels):
    def score(outputs):
      classes = config.target
      if config.target == 'label':
        classes = labels
      elif config.target == 'predicted':
        classes = tf.argmax(outputs, axis=-1)
      # A label without a class scores 0 and has no gradient, where a gather would end the round.
      return tf.reduce_sum(outputs * tf.one_hot(classes, num_classes, dtype=outputs.dtype), axis=-1)

    return score

  if config.kind in _CAM_KINDS:
    cam = _TraceableCam(tapped, _CAM_WEIGHTS[config.kind])

    def scores(images, labels):
      maps = cam(
        class_score(labels),
        images,
        penultimate_layer=TAP,
        seek_penultimate_conv_layer=False,
        expand_cam=False,
        normalize_cam=False,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
      )
      return maps[..., tf.newaxis]

    return scores

  saliency = Saliency(tapped)

  def gradient_size(images, labels):
    # Without `keepdims` the library takes NumPy's maximum over channels.
    return saliency(class_score(labels), images, keepdims=True, normalize_map=False)

  def scores(images, labels):
    if config.kind == 'smoothgrad' and config.smooth_samples > 0:
      sizes = _mean_over_noise(lambda noisy: gradient_size(noisy, labels), images, config)
    else:
      sizes = gradient_size(images, labels)
    # A maximum may pass over a NaN.
    finite = tf.reduce_all(tf.math.is_finite(sizes), axis=-1, keepdims=True)
    return tf.where(finite, tf.reduce_max(sizes, axis=-1, keepdims=True), np.nan)

  return scores


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if wrong.size:
    raise UserError(
      f'saliency: label {labels[wrong[0]]} of image {wrong[0]} of the batch; the model has classes'
      f' 0 to {num_classes - 1}'
    )


def _mean_over_noise(gradient_size, images: tf.Tensor, config: SaliencyConfig) -> tf.Tensor:
  """SmoothGrad's mean; the library's own draws from NumPy's global generator, once per trace."""
  axes = [1, 2, 3]
  spread = config.smooth_noise * (
    tf.reduce_max(images, axes, keepdims=True) - tf.reduce_min(images, axes, keepdims=True)
  )

  def add(sample, total):
    seed = tf.stack([tf.constant(config.seed, tf.int64), tf.cast(sample, tf.int64)])
    noise = tf.random.stateless_normal(tf.shape(images)[1:], seed, alg='philox')
    return sample + 1, total + gradient_size(images + spread * noise)

  _, total = tf.while_loop(
    lambda sample, _: sample < config.smooth_samples,
    add,
    (0, tf.zeros_like(images)),
    parallel_iterations=1,
  )
  return total / config.smooth_samples


class _TraceableCam(Gradcam):
  """The library's Gradcam with the last step, NumPy there, in TensorFlow."""

  def __init__(self, model, weights_fn):
    super().__init__(model)
    self._weights_fn = weights_fn

  def _calculate_cam(self, grads, penultimate_output, gradient_modifier, activation_modifier):
    del gradient_modifier
    weights = self._weights_fn(grads, penultimate_output)
    cam = activation_modifier(tf.reduce_sum(weights * penultimate_output, axis=-1))
    # A ReLU may turn a NaN into 0, which would mean: not sensitive.
    finite = tf.math.is_finite(grads) & tf.math.is_finite(penultimate_output)
    return tf.where(tf.reduce_all(finite, axis=[1, 2, 3])[:, None, None], cam, np.nan)


def _grad_cam_weights(gradients, activations):
  del activations
  return tf.reduce_mean(gradients, axis=[1, 2], keepdims=True)


def _layer_cam_weights(gradients, activations):
  del activations
  return tf.nn.relu(gradients)


def _grad_cam_pp_weights(gradients, activations):
  """Grad-CAM++ weights, without the library's factor exp(score) per image.

  tf-keras-vis' GradcamPlusPlus cannot be used inside TFF. It keeps 0/0 away by adding
  `tf.cast(second_derivative == 0.0, ...)` to the denominator, but in a `tf.Graph`, where TFF
  builds computations, `==` between a tensor and a number compares objects as in TensorFlow 1 and
  is False: every image with one zero gradient behind the layer, which a ReLU gives, becomes NaN
  as a whole. It is no matter of denormals. Here the comparison is `tf.not_equal`.

  With g the gradient, A the activations and s = exp(score), the library has
  alpha = s g² / (2 s g² + s g³ sum(A)) and weights relu(s g) alpha. So s cancels but for a factor
  per image, which scaling the map removes again; without it scores above 88 do not overflow and
  g² does not underflow.
  """
  total = tf.reduce_sum(activations, axis=[1, 2], keepdims=True)
  alphas = tf.where(
    tf.not_equal(gradients, 0.0), tf.math.divide_no_nan(1.0, 2.0 + gradients * total), 0.0
  )
  alphas = tf.math.divide_no_nan(alphas, tf.reduce_sum(alphas, axis=[1, 2], keepdims=True))
  return tf.reduce_sum(tf.nn.relu(gradients) * alphas, axis=[1, 2], keepdims=True)


_CAM_WEIGHTS = {
  'gradcam_pp': _grad_cam_pp_weights,
  'gradcam': _grad_cam_weights,
  'layercam': _layer_cam_weights,
}
