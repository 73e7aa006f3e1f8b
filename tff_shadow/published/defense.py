"""The published defence as a setting of a run."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from tff_shadow.published.settings import PublishedSettings


@dataclasses.dataclass(frozen=True)
class PublishedDefense:
  """The published defence in a run.

  Attributes:
    settings: Its constants.
    generator: Latents [N, ...] -> images [N, H, W, C] in [0, 1]: the shadow as pretrained.
    pixel_mean: Of each channel of public images; the method works on standardised pixels.
    pixel_std: Their standard deviations.
    seed: Decides the start of the latents.
    secrets: Each client's secret, from which the ablation 'white' draws its noise; not needed
      otherwise, for the published noise is a function of image, shadow and round.
    known_latents: A directory `client_state` of another run with the same generator, whose latents
      are taken over for images that are the same; None to fit all.
  """

  settings: PublishedSettings
  generator: tf.keras.Model
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  seed: int = 0
  secrets: dict[str, bytes] | None = None
  known_latents: pathlib.Path | None = None

  def public_settings(self) -> dict[str, Any]:
    """What an attacker may know: the method and its constants, not the shadow."""
    return {'name': 'published', **dataclasses.asdict(self.settings)}


def standardization(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel of public images [N, H, W, C] in [0, 1]."""
  mean, std = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))
  return tuple(map(float, mean)), tuple(map(float, np.maximum(std, 1e-3)))
