"""The most memory that a process has held."""


def peak_memory_gib(pid: int | str = 'self') -> float:
  """High-water mark of a process's resident memory in GiB, by its id; of this one by default.

  Raises:
    RuntimeError: If the system does not tell.
  """
  with open(f'/proc/{pid}/status') as file:
    for line in file:
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) / 2**20
  raise RuntimeError(f'/proc/{pid}/status has no VmHWM')


def reset_peak_memory(pid: int | str = 'self') -> None:
  """Lets the high-water mark begin again at what the process holds now (Linux 4.0 and later)."""
  with open(f'/proc/{pid}/clear_refs', 'w') as file:
    file.write('5')
