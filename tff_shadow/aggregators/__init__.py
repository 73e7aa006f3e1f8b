"""`tff.aggregators` factories."""

from tff_shadow.aggregators.observation_tap import (
  build_collect_from_clients,
  observation_tap_factory,
)

__all__ = ['build_collect_from_clients', 'observation_tap_factory']
