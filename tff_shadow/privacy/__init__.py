"""What an attacker cannot do: bounds of its error, and (epsilon, delta) where it may be stated."""

from tff_shadow.privacy.accounting import (
  UNPROVEN,
  Guarantee,
  dp_fed_avg_guarantee,
  dp_sgd_guarantee,
  no_guarantee,
  public_shape_guarantee,
)

__all__ = [
  'UNPROVEN',
  'Guarantee',
  'dp_fed_avg_guarantee',
  'dp_sgd_guarantee',
  'no_guarantee',
  'public_shape_guarantee',
]
