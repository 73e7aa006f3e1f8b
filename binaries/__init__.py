"""The absl programs. TensorFlow's start-up notices would bury the messages that matter."""

import os
import warnings

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
