import dataclasses
import re

import numpy as np
import pytest

from attacks.scoring import gate
from attacks.scoring.metrics import Quality
from attacks.scoring.scores import ImageScore
from attacks.scoring.statistics import mean_interval


def _row(attack, prior_only, mean_image=None, region=True, other_update=None):
  values = {
    'attack': attack,
    'prior_only': prior_only,
    'mean_image': mean_image,
    'other_update': other_update,
  }
  quality = {
    name: Quality(0.1, psnr, 0.5, *((0.1, psnr + 1, 0.5) if region else (None, None, None)))
    for name, psnr in values.items()
    if psnr is not None
  }
  status = 'failed' if attack is None else 'ok'
  return ImageScore('client_00', 0, status, '', 0, None, {}, quality)


def _of_clients(rows, images=1):
  """As many images each; see `ImageScore.target`."""
  return [
    dataclasses.replace(row, target=f'client_{k // images:02d}') for k, row in enumerate(rows)
  ]


def test_line():
  rows = _of_clients([_row(20.0, 10.0, 11.0), _row(22.0, 12.0, 11.5), _row(24.0, 11.0, 12.0)])
  margin = mean_interval([9.0, 10.5, 12.0])
  assert gate.gate_line('retina', rows) == (
    f'GATE retina attack=22.00 control=11.50 margin=10.50 '
    f'ci95={margin.low:.2f},{margin.high:.2f} n=3'
  )


def test_line_without_an_interval():
  assert gate.gate_line('chest', [_row(20.0, 10.0)]) == (
    'GATE chest attack=20.00 control=10.00 margin=10.00 ci95=nan,nan n=1'
  )


def test_better_control_is_one_for_the_whole_data_set():
  rows = [_row(20.0, 18.0, 11.0), _row(20.0, 2.0, 11.0)]
  assert gate.better_control(rows) == 'mean_image'
  assert gate.margins(rows) == [9.0, 9.0]
  assert gate.margins(rows, per_image=True) == [2.0, 9.0]


def test_what_an_attack_makes_of_another_update_is_a_guess_too():
  rows = [_row(20.0, 10.0, 11.0, other_update=15.0), _row(22.0, 12.0, 11.5, other_update=18.0)]
  assert gate.better_control(rows) == 'other_update'
  assert gate.margins(rows) == [5.0, 4.0]


def test_failed_images_count_as_no_margin_and_are_never_dropped():
  rows = _of_clients([_row(20.0, 10.0), _row(None, 12.0), _row(None, None)])
  assert gate.margins(rows) == [10.0, 0.0, 0.0]
  line = gate.gate_line('chest', rows)
  # The second image's attack is its control; the third has neither.
  assert re.search(r'attack=16\.00 control=11\.00 margin=3\.33 .* n=3$', line)


def test_an_image_without_the_common_control_has_its_own_best():
  rows = [_row(20.0, 10.0, 11.0, other_update=18.0), _row(20.0, 10.0, 11.0)]
  assert gate.better_control(rows) == 'other_update'
  assert gate.margins(rows) == [2.0, 9.0]


def test_a_clients_images_are_no_more_than_one_draw():
  rows = [_row(10.0 + margin, 10.0) for margin in (1.0, 3.0, 5.0, 7.0)]
  assert gate.margin_interval(_of_clients(rows)) == mean_interval([1.0, 3.0, 5.0, 7.0])
  assert gate.margin_interval(_of_clients(rows, images=2)) == mean_interval([2.0, 6.0])
  assert gate.margin_interval(_of_clients(rows, images=4)).low is None
  assert not gate.gate_passed(_of_clients([_row(30.0, 10.0)] * 16, images=16))


def test_no_control_gives_no_margin():
  rows = _of_clients([_row(20.0, None)] * 16)
  assert gate.margins(rows) == [0.0] * 16
  assert not gate.gate_passed(rows)


def test_empty_regions_are_left_out_of_region_margins_only():
  rows = [_row(20.0, 10.0, region=False), _row(30.0, 10.0)]
  assert gate.margins(rows, 'region_psnr') == [20.0]
  assert gate.margins(rows) == [10.0, 20.0]


@pytest.mark.parametrize(
  ('margins', 'passed'),
  [
    (np.full(16, 6.0), True),
    (np.full(15, 20.0), False),
    (np.full(16, 5.99), False),
    # Mean 7 dB, but an interval from about 3.5 dB.
    (np.array([0.0, 14.0] * 8), False),
    (np.array([5.0, 9.0] * 8), True),
  ],
)
def test_thresholds(margins, passed):
  rows = _of_clients([_row(10.0 + margin, 10.0) for margin in margins])
  assert gate.gate_passed(rows) == passed


def test_failures_can_fail_the_gate():
  good, bad = [_row(18.0, 10.0)] * 16, [_row(None, 10.0)] * 16
  assert gate.gate_passed(_of_clients(good))
  assert not gate.gate_passed(_of_clients(good + bad))
