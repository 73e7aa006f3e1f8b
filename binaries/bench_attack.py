"""Prints what an attack's iteration costs beside a training step, one BENCH line a number."""

from attacks.benchmark import bench_lines
from binaries import command


def main() -> None:
  """Measures and prints."""
  for line in bench_lines():
    print(line, flush=True)


if __name__ == '__main__':
  command.run(main)
