"""How much an audit attacks: stated beforehand, and printed with what came of it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Budget:
  """What every client of a round is attacked with.

  Attributes:
    presets: Attacks that do not know the defence; of `attacks.presets`. 'best' stands for
      'best_batch', 'best_public' and 'best_public_strong' too where clients trained on several
      images; for the latter two there must be enough public images to fit a prior to.
    iterations: Optimiser steps per restart of each attack.
    calibration_clients: Clients that the adaptive attacker plays itself; 0 for no such attacker.
    denoiser_steps: Of the training of its denoiser; 0 for none.
    inversion_clients: That it simulates to learn the way back from updates; 0 for none.
  """

  presets: tuple[str, ...]
  iterations: int
  calibration_clients: int
  denoiser_steps: int
  inversion_clients: int

  def less_than(self, other: 'Budget') -> list[str]:
    """What the attacker who knows the defence has less of, as flags."""
    names = ('calibration_clients', 'denoiser_steps', 'inversion_clients', 'iterations')
    return [
      f'--{name}={getattr(self, name)}'
      for name in names
      if getattr(self, name) < getattr(other, name)
    ]

  def includes(self, other: 'Budget') -> bool:
    """Whether it has as much of everything, and all of the attacks."""
    return not self.less_than(other) and set(other.presets) <= set(self.presets)


BUDGETS = {
  'quick': Budget(('best',), 150, 0, 0, 0),
  'default': Budget(('best',), 300, 8, 600, 2000),
  'thorough': Budget(('best', 'inverting_gradients', 'deep_image_prior'), 500, 16, 2000, 4000),
}
