"""The absl programs. TensorFlow's notices would bury the messages that matter.

Level 3 hides its C++ log, where a CPU machine reads three "errors" about CUDA at every start; what
fails still raises. What happens to BatchNorm's statistics is a setting here, of which TFF does not
know when it warns. Garbage is looked for less often than by default, as the imports and each trace
make millions of objects that stay: a start takes a tenth less time.
"""

import gc
import os
import warnings

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
warnings.filterwarnings('ignore', message='Batch Normalization contains non-trainable')
gc.set_threshold(100_000, 20, 20)
