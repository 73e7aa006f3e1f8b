"""What an attacker cannot do: bounds of its error, and (epsilon, delta) where it may be stated."""

from tff_shadow.privacy.accounting import (
  UNPROVEN,
  Guarantee,
  dp_fed_avg_guarantee,
  dp_sgd_guarantee,
  example_uses,
  no_guarantee,
  public_shape_guarantee,
)
from tff_shadow.privacy.gradients import gradient_information, gradient_jacobian, image_gradients
from tff_shadow.privacy.information import (
  image_noise_variances,
  information_after_rounds,
  spread_information,
  through_image_noise,
  update_information,
)
from tff_shadow.privacy.mmse_floor import (
  GalleryFloor,
  MmseFloor,
  gallery_floor,
  gaussian_floor,
  mmse_floor,
  unbiased_floor,
)
from tff_shadow.privacy.prior import GaussianPrior, fit_gaussian_prior
from tff_shadow.privacy.probed_bounds import ProbedBound, probed_trace_bound, solved_bound
from tff_shadow.privacy.region_bounds import (
  cramer_rao_bound,
  mean_squared_error,
  pixel_weights,
  region_psnr,
  trace_bound,
  van_trees_bound,
)
from tff_shadow.privacy.statement import Participation, guarantee_of

__all__ = [
  'UNPROVEN',
  'GalleryFloor',
  'GaussianPrior',
  'Guarantee',
  'MmseFloor',
  'Participation',
  'ProbedBound',
  'cramer_rao_bound',
  'dp_fed_avg_guarantee',
  'dp_sgd_guarantee',
  'example_uses',
  'fit_gaussian_prior',
  'gallery_floor',
  'gaussian_floor',
  'gradient_information',
  'gradient_jacobian',
  'guarantee_of',
  'image_gradients',
  'image_noise_variances',
  'information_after_rounds',
  'mean_squared_error',
  'mmse_floor',
  'no_guarantee',
  'pixel_weights',
  'probed_trace_bound',
  'public_shape_guarantee',
  'region_psnr',
  'solved_bound',
  'spread_information',
  'through_image_noise',
  'trace_bound',
  'unbiased_floor',
  'update_information',
  'van_trees_bound',
]
