"""What public images of a modality say of its images: a Gaussian that is fitted to them."""

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from attacks.priors import GaussianImages
from tff_shadow.privacy import fit_gaussian_prior
from tff_shadow.shadow.augmentation import augment

# Without varied images the covariance of a hundred is mostly shrinkage.
_DRAWS = 2000


def fitted_prior(
  images: np.ndarray, augmentations: Sequence[str], seed: int, *, value_weight: float | None = None
) -> GaussianImages | None:
  """A prior fitted to images and variations of them.

  Args:
    images: [N, H, W, C] in [0, 1], of no attacked client.
    augmentations: Of `tff_shadow.shadow.augmentation.AUGMENTATIONS`, that leave an image of the
      modality one.
    seed: Decides the variations.
    value_weight: Its weight times the number of values of an image; by default its weight is 1.

  Returns:
    None where there are too few images to fit it to, or they are all the same.
  """
  if len(np.unique(images, axis=0)) < 3:
    return None
  if augmentations:
    drawn = np.random.default_rng(seed).integers(0, len(images), _DRAWS)
    images = augment(tf.constant(images[drawn]), augmentations, tf.constant([seed, 0])).numpy()
  source = hashlib.sha256(images.tobytes()).hexdigest()[:16]
  weight = 1.0 if value_weight is None else value_weight / images[0].size
  return GaussianImages(fit_gaussian_prior(images), weight=weight, source=source)
