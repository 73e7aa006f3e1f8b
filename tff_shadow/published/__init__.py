"""The published shadow defence (Jiang, Ma and Yang 2025), step by step."""

from tff_shadow.published.client_shadows import ClientShadows
from tff_shadow.published.defense import PublishedDefense, standardization
from tff_shadow.published.exposure import EQUALIZATIONS
from tff_shadow.published.settings import MAP_KINDS, PublishedSettings

__all__ = [
  'EQUALIZATIONS',
  'MAP_KINDS',
  'ClientShadows',
  'PublishedDefense',
  'PublishedSettings',
  'standardization',
]
