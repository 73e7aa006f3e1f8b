"""The error that means: the user can mend this, and here is how."""


class UserError(Exception):
  """Bad input from outside the program: a flag, a file, a row of a manifest.

  The message is one line that names what is wrong and what would be right. Binaries print it
  without a traceback and exit with code 1; every other exception is a bug of ours.
  """

  def __init__(self, message: str):
    super().__init__(' '.join(str(message).split()))
