"""What the builders that cut patches from one photograph have in common."""

import abc
import dataclasses

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tff_shadow.data import images, patches

# What a version holds never changes: a directory that was prepared once is read for good.
RELEASE_NOTES = {
  '1.0.0': 'Withdrawn: other patches were made under this version at different times.',
  '2.0.0': 'Labels above the 60 % and below the 40 % quantile.',
}
_SPLIT_SIZES = {'train': 800, 'validation': 200, 'test': 200}
_REGION_FRACTION = 0.25


@dataclasses.dataclass
class PatchConfig(tfds.core.BuilderConfig):
  """Side of the images in pixels."""

  image_size: int = 32


@dataclasses.dataclass(frozen=True)
class Photograph:
  """A photograph and what is measured on it.

  Attributes:
    pixels: uint8 [H, W, 3].
    score: float [H, W]; its patch mean decides the label.
    saliency: float [H, W]; the highest quarter of it within a patch is the region.
    usable: bool [H, W], true where there is tissue.
    min_usable: a patch with a smaller usable fraction is not cut.
  """

  pixels: np.ndarray
  score: np.ndarray
  saliency: np.ndarray
  usable: np.ndarray
  min_usable: float


def patch_configs() -> list[PatchConfig]:
  """Returns the ready configurations; any other size can be passed as a config of its own."""
  return [
    PatchConfig(name=f'{size}px', description=f'{size} px', image_size=size)
    for size in (32, 64, 128, 224)
  ]


class PhotographBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):
  """Cuts labelled patches from disjoint zones of one photograph."""

  ZONES: patches.Zones
  # Quantiles of the train scores: below the first is label 0, above the second label 1.
  QUANTILES: tuple[float, float]

  @abc.abstractmethod
  def photograph(self) -> Photograph:
    """Measures the photograph."""

  @abc.abstractmethod
  def patch_size(self, image_size: int) -> int:
    """Returns the side of a patch before resizing, in pixels of the photograph."""

  def _split_generators(self, dl_manager):
    del dl_manager  # The photograph is installed with scikit-image.
    photograph = self.photograph()
    return {split: self._generate_examples(photograph, split) for split in _SPLIT_SIZES}

  def candidates(self, photograph: Photograph, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns corners int64 [N, 2] and scores [N] of all patches with enough tissue."""
    patch = self.patch_size(self.builder_config.image_size)
    corners = patches.patch_corners(self.ZONES, split, patch, stride=2)
    usable = patches.patch_means(photograph.usable, corners, patch)
    corners = corners[usable >= photograph.min_usable - 1e-9]
    return corners, patches.patch_means(photograph.score, corners, patch)

  def _generate_examples(self, photograph, split):
    size = self.builder_config.image_size
    patch = self.patch_size(size)
    thresholds = np.quantile(self.candidates(photograph, 'train')[1], self.QUANTILES)
    corners, scores = self.candidates(photograph, split)
    rng = np.random.default_rng([0, sorted(_SPLIT_SIZES).index(split)])
    chosen, labels = patches.balanced_choice(scores, tuple(thresholds), _SPLIT_SIZES[split], rng)
    for (y, x), label in zip(corners[chosen], labels, strict=True):
      window = (slice(y, y + patch), slice(x, x + patch))
      saliency = Image.fromarray(photograph.saliency[window].astype(np.float32))
      saliency = np.asarray(saliency.resize((size, size), Image.Resampling.BILINEAR))
      pixels = Image.fromarray(photograph.pixels[window])
      yield (
        f'{y:04d}_{x:04d}',
        {
          # Pillow's filters widen when they shrink an image, so this is antialiased.
          'image': images.png_bytes(
            np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC))
          ),
          'label': int(label),
          'region': images.png_bytes(patches.top_fraction(saliency, _REGION_FRACTION)[..., None]),
        },
      )

  def dataset_info_of(self, description: str, class_names: list[str], citation: str):
    """Returns the DatasetInfo shared by these builders."""
    size = self.builder_config.image_size
    return tfds.core.DatasetInfo(
      builder=self,
      description=description,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(size, size, 3), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=class_names),
          'region': tfds.features.Image(shape=(size, size, 1), encoding_format='png'),
        }
      ),
      supervised_keys=('image', 'label'),
      citation=citation,
    )
