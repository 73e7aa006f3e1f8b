"""Audits of attacks that reconstruct what they are told to."""

import numpy as np

from attacks.audit.strongest import score_attacked
from attacks.audit.suite import Attacked
from attacks.audit.summary import RoundEvidence, summarise, summarise_round
from attacks.results import TargetResult
from attacks.scoring.identification import Identification
from tests.attacks.synthetic_run import ellipse_regions, noisy, photographs
from tff_shadow.observations import Truth

COUNT = 16
IMAGES = photographs(COUNT, 16, 3)
TRUTH = {
  f'client_{k:02d}': Truth(IMAGES[k : k + 1], np.array([k % 2], np.int32), ellipse_regions(1, 16))
  for k in range(COUNT)
}
MEAN = np.broadcast_to(IMAGES.mean(axis=0), IMAGES.shape).astype(np.float32)
CLASS_MEANS = {label: IMAGES[label::2].mean(axis=0) for label in (0, 1)}
NOBODY = Identification(correct=0, of=COUNT, choices=COUNT, control_correct=0, p_value=1.0)


def attack_with(images, name='best', failed=(), early=(), other_update=None, class_means=None):
  """An attack whose reconstructions are `images`, one a client."""
  found = []
  for k, client in enumerate(TRUTH):
    ok = client not in failed
    made = {'prior_only': MEAN[k : k + 1], 'mean_image': MEAN[k : k + 1]}
    made |= {'attack': images[k : k + 1]} if ok else {}
    made |= {} if other_update is None else {'other_update': other_update[k : k + 1]}
    found.append(
      TargetResult(
        target=client,
        images=1,
        labels=(k % 2,),
        labels_source='inferred',
        status='ok' if ok else 'failed',
        reason=None if ok and client not in early else 'it diverged',
        loss=0.1 if ok else None,
        restart_losses=(0.1,) if ok else (),
        chosen_restart=0 if ok else None,
        iterations=1,
        seconds=1.0,
        reconstructions=made,
      )
    )
  attacked = Attacked(name, tuple(found), ('It knows a thing.',))
  return score_attacked(attacked, TRUTH, (), class_means or {})


def close(deviation=0.02, seed=0):
  return noisy(IMAGES, np.full(COUNT, deviation), seed)


def audited(
  attacks, undefended=(), failed=(), control=None, bounds=(), recognized=None, **document
):
  evidence = RoundEvidence(
    (1,),
    attacks,
    failed,
    undefended,
    control or attacks[0],
    bounds=bounds,
    clean=[undefended or attacks],
    recognized=recognized,
  )
  entry = summarise_round(evidence)
  return entry, summarise(
    [entry],
    title='An audit',
    defended=bool(undefended),
    adaptive=True,
    scope={'Model': 'small <b>'},
    seed=0,
    budget={
      'name': 'quick',
      'presets': ['best'],
      'iterations': 1,
      'calibration_clients': 0,
      'denoiser_steps': 0,
      'inversion_clients': 0,
    },
    tolerated={'psnr': 1.0, 'region_psnr': 1.0, 'ssim': 0.05, 'region_ssim': 0.05},
    guarantee='no formal guarantee: none',
    utility={'test': {'f1': document.pop('f1', 0.9)}, 'undefended': None},
    command='tff-shadow-audit',
    versions={'numpy': '1'},
    **document,
  )
