"""The constants of the published defence."""

import dataclasses
import math
from typing import Literal, get_args

from tff_shadow.published.exposure import EQUALIZATIONS, Equalization
from tff_shadow.shadow.latents import LatentFit

MapKind = Literal['exposure', 'white']
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)


@dataclasses.dataclass(frozen=True)
class PublishedSettings:
  """Constants of Jiang, Ma and Yang 2025, by the steps of their method; defaults are theirs.

  Attributes:
    latents: Step 1, how a latent is fitted to each image.
    update_shadow: Step 3 as a whole; without it the shadow stays as it was pretrained.
    shadow_rounds: Rounds, from the first, in which shadow and maps are updated.
    shadow_steps: Steps of Adam on the shadow per batch.
    shadow_learning_rate: Of these; None for the paper's 1e-4 at batch size 1, 1e-3 up to 4 and 2e-3
      above.
    gradient_weight: Of the distance between the shadow's gradient and the client's.
    batch_norm_weight: Of the distance between their BatchNorm statistics.
    total_variation_weight: Of the reconstruction's total variation.
    norm_weight: Of the reconstruction's norm.
    reconstruction_weight: Of the squared error between reconstruction and image.
    shadow_average: Share of the updated shadow in the one that is kept.
    equalization: Step 4, see `exposure.equalize_histogram`; 'released' is what the authors' code
      does.
    temperature: Of all softmaxes, steps 4 and 6.
    map_kind: 'exposure', or, as an ablation, 'white': independent noise of the same energy in every
      pixel instead of the map.
    map_momentum: Step 5, share of the old map.
    subtract_cam: Step 6 as a whole.
    cam_class: Class that Grad-CAM++ explains.
    cam_top_fraction: Of its pixels that are kept.
    cam_weights: Bounds of alpha.
    amplitude: Step 7, of the noise in the first round over the image's maximum.
  """

  latents: LatentFit = dataclasses.field(default_factory=LatentFit)
  update_shadow: bool = True
  shadow_rounds: int = 20
  shadow_steps: int = 5
  shadow_learning_rate: float | None = None
  gradient_weight: float = 1e-2
  batch_norm_weight: float = 1e-2
  total_variation_weight: float = 1e-5
  norm_weight: float = 1e2
  reconstruction_weight: float = 1.0
  shadow_average: float = 0.5
  equalization: Equalization = 'luminance'
  temperature: float = 20.0
  map_kind: MapKind = 'exposure'
  map_momentum: float = 0.1
  subtract_cam: bool = True
  cam_class: int = 1
  cam_top_fraction: float = 0.3
  cam_weights: tuple[float, float] = (0.1, 0.5)
  amplitude: float = 0.19

  def __post_init__(self):
    """Raises ValueError naming the field that is out of range."""
    for name, known in (('equalization', EQUALIZATIONS), ('map_kind', MAP_KINDS)):
      if getattr(self, name) not in known:
        raise ValueError(f'{name} must be one of {known}, found {getattr(self, name)!r}')
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f'{field.name} must be finite and at least 0, found {value}')
    for name in ('shadow_average', 'map_momentum', 'cam_top_fraction'):
      if getattr(self, name) > 1:
        raise ValueError(f'{name} must be at most 1, found {getattr(self, name)}')
    if self.shadow_rounds < 0 or self.shadow_steps < 1 or self.cam_class < 0:
      raise ValueError('shadow_rounds and cam_class must be at least 0 and shadow_steps at least 1')
    if self.temperature <= 0:
      raise ValueError('temperature must be above 0')
    low, high = self.cam_weights
    if not 0 <= low <= high < math.inf:
      raise ValueError(f'cam_weights must be two rising numbers, found {self.cam_weights}')

  def shadow_rate(self, batch_size: int) -> float:
    """The learning rate of the shadow's steps for a client with this batch size."""
    if self.shadow_learning_rate is not None:
      return self.shadow_learning_rate
    if batch_size == 1:
      return 1e-4
    return 1e-3 if batch_size <= 4 else 2e-3
