from tests.binaries.programs import assert_one_error_line, run_all


def test_bad_flags():
  wrong = {
    '--datasets=mnist': '--datasets=mnist: use some of',
    '--defenses=uniform/1.0': '--defenses=uniform: use some of isotropic, diagonal, correlated',
    '--defenses=isotropic': '--defenses=isotropic: the strength',
    '--defenses=diagonal/images:0.1': 'images is no strength of diagonal noise',
    '--defenses=correlated/scale:0.1': 'scale:0.1: the strength must be a ratio or images:S',
    '--defenses=decoy/scale:3+floor:0.5': 'floor:0.5 is not known to the bounds',
    '--defenses=isotropic/0.1+floor:0.5': 'ratio is no strength of isotropic noise',
    '--images=0': '--images=0',
  }
  for ended, why in zip(
    run_all('bounds_table', [[flag] for flag in wrong]), wrong.values(), strict=True
  ):
    assert_one_error_line(ended, why)
