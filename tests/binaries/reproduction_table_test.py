import numpy as np

from attacks.scoring.results import AttackResult, Target
from binaries import reproduction_table
from binaries.published_protocol import Plan, load_data
from tff_shadow.models import build_model

_PLAN = Plan('histology_patches', None, 16, model='conv_small', scale=0.01)


def test_regions_come_from_the_trained_model_where_a_set_has_none(tmp_path):
  data = load_data(_PLAN)
  model = build_model('conv_small', image_shape=(16, 16, 3), num_classes=2, norm='batch', seed=0)
  model.save(tmp_path / 'model.keras')
  images = data.test.float_images()[:3]
  record = {'target': 'a', 'images': 3, 'labels': [], 'status': 'ok'}
  whole = np.ones((3, 16, 16, 1), np.float32)
  target = Target('a', record, {}, images, np.zeros(3, np.int32), whole)
  found = AttackResult(tmp_path, 'x', {}, (target,))
  regions = reproduction_table._with_regions(found, tmp_path, data).targets[0].regions
  assert regions.shape == whole.shape
  assert 0.2 < regions.mean() < 0.4
