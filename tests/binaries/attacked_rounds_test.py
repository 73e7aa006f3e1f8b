import numpy as np
import pytest

from attacks.adaptive.simulated_updates import flat
from binaries.attacked_rounds import UNDEFENDED, AttackedRounds


@pytest.mark.usefixtures('tff_worker')
def test_kept_rounds_are_of_the_same_images_under_fresh_noise():
  rounds = AttackedRounds('histology_patches', 0, images=2, rounds=2)
  assert {len(own) for own in rounds.data.clients.values()} == {2}
  clean = rounds.observations(*UNDEFENDED)
  noised = rounds.observations('isotropic', 'image_ratio:30.0')
  assert [own.round_num for own in clean] == [own.round_num for own in noised] == [1, 2]
  noises = []
  for before, after in zip(clean, noised, strict=True):
    assert {own.num_images for own in after.clients} == {2}
    client = after.clients[0].client_id
    own, other = flat(before.client(client).update)[0], flat(after.client(client).update)[0]
    noises.append(other - own)
    # 30 times what one of two images adds.
    assert 5 < np.linalg.norm(noises[-1]) / np.linalg.norm(own) < 100
  assert abs(np.corrcoef(*noises)[0, 1]) < 0.1
