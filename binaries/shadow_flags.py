"""The flags of shadow noise (--defense=shadow)."""

from absl import flags

from binaries import command
from tff_shadow.aggregators import NOISE_SHAPES, STRENGTH_KINDS, NoiseStrength
from tff_shadow.aggregators.shadow_noise import DECOY_FLOOR, DEFAULT_FLOOR, floor_of
from tff_shadow.data import Examples
from tff_shadow.errors import UserError
from tff_shadow.learning import PROPAGATIONS, ShadowDefense, ShadowNoise
from tff_shadow.learning.decoys import decoy_pool
from tff_shadow.shadow import KINDS, SaliencyConfig
from tff_shadow.shadow.augmentation import AUGMENTATIONS

_NOISE_SHAPE = flags.DEFINE_enum(
  'noise_shape',
  'correlated',
  NOISE_SHAPES,
  'isotropic: the same for every weight. diagonal: more on weights that carry the region.'
  ' correlated: as the update moves when the region does. decoy: as the updates of public images,'
  ' those of the validation split, differ.',
)
_NOISE_STRENGTH_KIND = flags.DEFINE_enum(
  'noise_strength_kind',
  'region_psnr',
  STRENGTH_KINDS,
  "ratio: norm of the noise over the update's. image_ratio: over the norm of what one image adds to"
  ' the update. scale: absolute. region_psnr: the PSNR in dB that no unbiased attacker exceeds over'
  ' the region. The ratios follow the updates from round to round.',
)
_NOISE_STRENGTH = flags.DEFINE_float('noise_strength', 20.0, 'See --noise_strength_kind.')
_NOISE_FRESHNESS = flags.DEFINE_enum(
  'noise_freshness',
  None,
  ['frozen', 'fresh'],
  'frozen: an image keeps its noise. fresh: new in every round, which averages out over rounds. By'
  ' default frozen where that protects over many: correlated noise of an absolute strength in'
  ' regions that stay the same (--saliency=given or uniform).',
)
_PROPAGATION = flags.DEFINE_enum(
  'propagation',
  None,
  PROPAGATIONS,
  'How far the shadow follows the region: into each local step, or through the whole local training'
  ' (trains two more copies). Or images: correlated noise of an absolute strength is put into the'
  ' images themselves. By default images where it can be, else per_step.',
)
_NOISE_FLOOR = flags.DEFINE_float(
  'noise_floor',
  None,
  "Share of the noise's energy that is the same for every weight, whatever the shape, in (0, 1); by"
  f' default {DEFAULT_FLOOR}, of decoy noise {DECOY_FLOOR}.',
)
_DECOYS = flags.DEFINE_integer(
  'decoys', 32, 'Images in each of the two batches that make decoy noise.', lower_bound=1
)
_DECOY_AUGMENT = flags.DEFINE_list(
  'decoy_augment',
  ['shifts', 'brightness'],
  'How they are varied: ' + ', '.join(AUGMENTATIONS) + '.',
)
_PROBES = flags.DEFINE_integer('probes', 8, 'Draws for the diagonal shape.', lower_bound=1)
_SALIENCY = flags.DEFINE_enum(
  'saliency',
  'gradcam_pp',
  KINDS,
  "Where the sensitive region is: a map of the shadow model, the data set's own (given), or the"
  ' whole image (uniform).',
)
_SALIENCY_LAYER = flags.DEFINE_string(
  'saliency_layer', None, 'Convolutional layer of the map; the last one by default.'
)
_SALIENCY_TOP_FRACTION = flags.DEFINE_float(
  'saliency_top_fraction', None, 'Keep this fraction of the pixels; by default the whole map.'
)


def shadow_noise(local_epochs: int) -> ShadowNoise:
  """The noise that the flags say.

  Args:
    local_epochs: How often a client's data repeats each image.

  Raises:
    UserError: If a flag is out of range, or they do not go together.
  """
  try:
    floor = floor_of(_NOISE_SHAPE.value, _NOISE_FLOOR.value)
  except ValueError as error:
    raise UserError(f'--noise_floor: {error}') from error
  command.check_choices('decoy_augment', _DECOY_AUGMENT.value, AUGMENTATIONS)
  try:
    strength = NoiseStrength(_NOISE_STRENGTH_KIND.value, _NOISE_STRENGTH.value)
  except ValueError as error:
    raise UserError(f'--noise_strength={_NOISE_STRENGTH.value}: {error}') from error
  in_images = _NOISE_SHAPE.value == 'correlated' and not strength.is_relative
  try:
    noise = ShadowNoise(
      shape=_NOISE_SHAPE.value,
      strength=strength,
      saliency=SaliencyConfig(
        kind=_SALIENCY.value,
        layer=_SALIENCY_LAYER.value,
        top_fraction=_SALIENCY_TOP_FRACTION.value,
      ),
      propagation=_PROPAGATION.value or ('images' if in_images else 'per_step'),
      probes=_PROBES.value,
      floor=floor,
      decoys=_DECOYS.value,
      decoy_augmentations=tuple(_DECOY_AUGMENT.value),
      local_epochs=local_epochs,
    )
  except ValueError as error:
    raise UserError(f'--defense=shadow: {error}') from error
  if _NOISE_FRESHNESS.value == 'frozen' and noise.why_not_frozen:
    raise UserError(f'--noise_freshness=frozen: {noise.why_not_frozen}; use fresh')
  return noise


def shadow_defense(
  noise: ShadowNoise, secrets: dict[str, bytes], public: Examples
) -> ShadowDefense:
  """The defence that the flags say.

  Args:
    noise: `shadow_noise(...)`.
    secrets: Each client's, of which its noise keys are made.
    public: Images, of which decoy noise is made.
  """
  frozen = _NOISE_FRESHNESS.value != 'fresh' and noise.why_not_frozen is None
  return ShadowDefense(noise, frozen, secrets, decoy_pool(public))
