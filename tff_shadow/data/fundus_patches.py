"""TFDS builder: patches of a colour fundus photograph, with or without notable vessels."""

import numpy as np
import scipy.ndimage
import skimage.data
import skimage.filters
import tensorflow_datasets as tfds

from tff_shadow.data import patches, photograph_builder


class FundusPatches(photograph_builder.PhotographBuilder):
  """Patches of a retina: rich in vessels or not.

  Source: `skimage.data.retina()`, one fundus photograph of a healthy eye (1411 px, public
  domain). Blocks of 352 px belong to one split each, and patches are cut inside a block, so no
  pixel is in two splits. It is one eye of one patient: the sets measure privacy and learning on
  real texture, they support no clinical claim.

  Label: the fraction of the patch covered by vessels, found by a ridge filter (Sato et al. 1998)
  on the green channel. Class 1 is above the 60 % quantile of all train patches, class 0 below
  the 40 % quantile; patches between are ambiguous and left out. It is a classical filter's
  opinion, not a grader's. Region: the quarter of the patch with the highest smoothed ridge
  response, in both classes, so its area does not tell the label;
  its shape still hints at it (a small convolutional net on regions alone is right for about 0.7).

  Patches are 96 to 128 px of the photograph, as near to the image's size as that allows; larger
  images are enlarged and so smooth.
  """

  VERSION = tfds.core.Version('2.0.0')
  RELEASE_NOTES = photograph_builder.RELEASE_NOTES
  BUILDER_CONFIGS = photograph_builder.patch_configs()
  ZONES = patches.Zones(('tvts', 'ttst', 'vttt', 'stvt'), 352)
  QUANTILES = (0.4, 0.6)

  def patch_size(self, image_size):
    """Returns 96 to 128 px: a few vessels wide, and room to move inside a block."""
    return min(max(96, image_size), 128)

  def photograph(self):
    """Finds the vessels and the retinal disc."""
    pixels = skimage.data.retina()
    green = pixels[..., 1] / 255
    ridges = skimage.filters.sato(green, sigmas=(2, 4, 6), black_ridges=True)
    # The dark surround and the notch at its rim are not retina; nor is the rim's own ridge.
    disc = scipy.ndimage.binary_opening(pixels[..., 0] > 60, iterations=3)
    disc = scipy.ndimage.binary_erosion(disc, iterations=24)
    ridges = ridges * disc
    vessels = skimage.filters.apply_hysteresis_threshold(
      ridges, *np.quantile(ridges[disc], (0.86, 0.95))
    )
    return photograph_builder.Photograph(
      pixels=pixels,
      score=vessels.astype(np.float64),
      saliency=scipy.ndimage.gaussian_filter(ridges, 3),
      usable=disc,
      min_usable=1.0,
    )

  def _info(self):
    return self.dataset_info_of(
      'Patches of one colour fundus photograph, labelled by how much of them is vessel.',
      ['few_vessels', 'many_vessels'],
      '',
    )
