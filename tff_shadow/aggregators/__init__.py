"""`tff.aggregators` factories."""

from tff_shadow.aggregators.observation_tap import (
  ObservationTapFactory,
  build_collect_from_clients,
)

__all__ = ['ObservationTapFactory', 'build_collect_from_clients']
