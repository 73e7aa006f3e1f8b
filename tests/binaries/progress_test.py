from binaries import progress as progress_lib
from binaries.progress import Progress


def test_plain_lines_tell_rate_and_time_left(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: now[0])
  with Progress('round', 100, 'rounds', done=20) as progress:
    for done, seconds in ((21, 1.0), (22, 2.0), (40, 20.0), (100, 100.0)):
      now[0] = seconds
      progress.update(done, f'loss {done}')
  lines = capsys.readouterr().out.splitlines()
  # The first, then none for ten seconds, and always the last; what was done before does not count.
  assert lines == [
    'round 21/100  1 rounds/s, 1:19 left  loss 21',
    'round 40/100  1 rounds/s, 1:00 left  loss 40',
    'round 100/100  0.8 rounds/s, 0:00 left  loss 100',
  ]
