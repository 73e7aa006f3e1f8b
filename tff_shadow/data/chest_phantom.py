"""TFDS builder: procedural chest films, with or without a lesion."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from tff_shadow.data import chest_render, images

# Streams of the seed.
_TRAIN, _VALIDATION, _TEST, _PUBLIC = range(4)


@dataclasses.dataclass
class ChestPhantomConfig(tfds.core.BuilderConfig):
  """How many films of which size, from which seed."""

  image_size: int = 32
  num_train: int = 1600
  num_validation: int = 300
  num_test: int = 300
  seed: int = 0


def draw_public_films(count: int, *, image_size: int, seed: int) -> np.ndarray:
  """Draws films that are in no split of the set of any size, uint8 [count, H, W, 1].

  They are what public images of the modality are to a federation: to train a shadow on.
  """
  films = [_draw(image_size, index, [seed, _PUBLIC, index]) for index in range(count)]
  return _eight_bit(np.stack([film.image for film in films]))


class ChestPhantom(tfds.core.GeneratorBasedBuilder):
  """Drawn chest films: is there a lesion in a lung or not.

  Every film is a body of its own: size, position, rotation, asymmetry, exposure and noise vary.
  Half of each split shows a soft-edged opacity of varying size, outline and contrast somewhere
  in a lung. Region: the lesion's exact outline; a film without a lesion has an outline from the
  same distribution of place, size and shape, so a region tells nothing of the label.

  It is a phantom: good for measuring reconstruction and learning, not for clinical claims.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    ChestPhantomConfig(name=f'{size}px', description=f'{size} px', image_size=size)
    for size in (32, 64, 96, 128, 224)
  ]

  def _info(self):
    size = self.builder_config.image_size
    return tfds.core.DatasetInfo(
      builder=self,
      description='Procedural frontal chest films, half of them with a lesion in a lung.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(size, size, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=['no_lesion', 'lesion']),
          'region': tfds.features.Image(shape=(size, size, 1), encoding_format='png'),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    config = self.builder_config
    return {
      'train': self._generate_examples(_TRAIN, config.num_train),
      'validation': self._generate_examples(_VALIDATION, config.num_validation),
      'test': self._generate_examples(_TEST, config.num_test),
    }

  def _generate_examples(self, split, count):
    for index in range(count):
      # A film depends on nothing but its own key, so a larger set begins with the smaller one.
      config = self.builder_config
      film = _draw(config.image_size, index, [config.seed, split, index])
      yield (
        index,
        {
          'image': images.png_bytes(_eight_bit(film.image)),
          'label': index % 2,
          'region': images.png_bytes(_eight_bit(film.lesion)),
        },
      )


def _draw(image_size, index, key):
  return chest_render.render(image_size, bool(index % 2), np.random.default_rng(key))


def _eight_bit(image):
  return np.round(image * 255).astype(np.uint8)[..., None]
