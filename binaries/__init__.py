"""The absl programs. TensorFlow's start-up notices would bury the messages that matter."""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
