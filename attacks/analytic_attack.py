"""The analytic recovery as an attack on a logged round: results as those of the search."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from attacks.analytic import recover_from_first_dense
from attacks.config import AttackConfig
from attacks.results import TargetResult
from attacks.targets import Target, TargetFailed, Targets
from tff_shadow.observations import Observation


def recover_observation(
  observation: Observation,
  targets: Sequence[str] | None = None,
  *,
  labels: Mapping[str, Sequence[int]] | None = None,
) -> list[TargetResult]:
  """Recovers the images of clients from the layer that sees them first, without a search.

  Args:
    observation: What the server saw.
    targets: Client ids, or `observations.AGGREGATE`; all clients by default.
    labels: The labels of each target if the attacker was told them; inferred by default. The images
      do not depend on them.

  Returns:
    One result per target, with at most as many images as it has. Its loss is 0, for nothing was
    minimised, and 'prior_only' is the public mean image too.

  Raises:
    UserError: If a target is unknown or the model's first trainable layer is not dense.
  """
  known = Targets([observation], AttackConfig())
  names = list(targets) if targets else known.default_names
  found = [known.find(name, None if labels is None else labels[name]) for name in names]
  return [_recover(known, observation, target) for target in found]


def _recover(known: Targets, observation: Observation, target: Target) -> TargetResult:
  started = time.monotonic()
  mean = np.repeat(known.public_mean_image[None].astype(np.float32), target.num_images, axis=0)
  reconstructions = {'prior_only': mean, 'mean_image': mean}
  labels, reason = None, None
  try:
    known.check(target)
    labels = known.labels(target)
    images = recover_from_first_dense(
      known.simulators[0].model,
      known.gradients(target)[0],
      target.num_images,
      tuple(observation.image_shape),
    ).images
    if not len(images):
      raise TargetFailed('no unit of the first layer shows one image alone')
    reconstructions = {'attack': images, **reconstructions}
  except TargetFailed as failure:
    reason = str(failure)
  return TargetResult(
    target=target.name,
    images=target.num_images,
    labels=tuple(int(value) for value in labels.values) if labels else (),
    labels_source=labels.source if labels else None,
    status='failed' if reason else 'ok',
    reason=reason,
    loss=None if reason else 0.0,
    restart_losses=() if reason else (0.0,),
    chosen_restart=None if reason else 0,
    iterations=0,
    seconds=round(time.monotonic() - started, 3),
    reconstructions=reconstructions,
  )
