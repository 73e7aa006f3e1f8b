"""TFDS builder: patches of an immunohistochemistry section, stained for an antigen or not."""

import numpy as np
import scipy.ndimage
import skimage.color
import skimage.data
import tensorflow_datasets as tfds

from tff_shadow.data import patches, photograph_builder


class HistologyPatches(photograph_builder.PhotographBuilder):
  """Patches of tissue: do they express the antigen (brown DAB stain) or not.

  Source: `skimage.data.immunohistochemistry()`, colonic glands, DAB against FHL2 with
  haematoxylin counterstain (512 px). Blocks of 128 px belong to one split each, and patches are
  cut inside a block, so no pixel is in two splits; within a split they overlap heavily. It is
  one section of one patient: no clinical claim.

  Label: the mean DAB density by colour deconvolution (Ruifrok and Johnston 2001). Class 1 is
  above the 60 % quantile of all train patches, class 0 below the 40 % quantile; patches between
  are ambiguous and left out, as are those of which more than half is empty glass. Region: the
  quarter of the patch with the highest smoothed DAB density, in both classes, so its area does
  not tell the label; its shape still hints at it (a small convolutional net on regions alone is
  right for about 0.6). The label itself is nearly a matter of colour, and so is easy.

  Patches are 48 to 96 px of the section, as near to the image's size as that allows; larger
  images are enlarged and so smooth.
  """

  VERSION = tfds.core.Version('2.0.0')
  RELEASE_NOTES = photograph_builder.RELEASE_NOTES
  BUILDER_CONFIGS = photograph_builder.patch_configs()
  ZONES = patches.Zones(('ttvt', 'sttt', 'vtst', 'tvts'), 128)
  QUANTILES = (0.4, 0.6)

  def patch_size(self, image_size):
    """Returns 48 to 96 px: a few cells at least, and room to move inside a block at most."""
    return min(max(48, image_size), 96)

  def photograph(self):
    """Separates the stains."""
    pixels = skimage.data.immunohistochemistry()
    dab = skimage.color.rgb2hed(pixels)[..., 2]
    # Glass is bright in every channel.
    tissue = scipy.ndimage.gaussian_filter(pixels.min(axis=-1).astype(np.float64), 2) < 224
    return photograph_builder.Photograph(
      pixels=pixels,
      score=dab,
      saliency=scipy.ndimage.gaussian_filter(dab, 1.5),
      usable=tissue,
      min_usable=0.5,
    )

  def _info(self):
    return self.dataset_info_of(
      'Patches of one immunohistochemistry section, labelled by the density of the DAB stain.',
      ['dab_low', 'dab_high'],
      '',
    )
