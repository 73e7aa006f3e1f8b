"""Keys of the noise: what makes it each client's own, and frozen or fresh.

A key is two int32. Whoever has it can draw the noise again and subtract it, so by default keys come
from a secret that the client draws from its operating system and never sends. Keys are given to the
client's work with its data, one per image: the same key every round makes the noise frozen, another
one every round makes it fresh.
"""

import collections
import hashlib
import secrets

import numpy as np
import tensorflow as tf

from tff_shadow.shadow.region_maps import REGION

NOISE_KEY = 'noise_key'
_SECRET_BYTES = 32


def draw_secret() -> bytes:
  """A new secret of 32 bytes from the operating system's entropy."""
  return secrets.token_bytes(_SECRET_BYTES)


def experiment_secret(seed: int, client_id: str) -> bytes:
  """A secret that anyone who knows the seed can compute: for reproducible experiments only.

  A server that can compute it can subtract the noise, so nothing is protected.
  """
  return hashlib.sha256(f'experiment/{seed}/{client_id}'.encode()).digest()


def image_keys(secret: bytes, image_indices: np.ndarray, round_num: int | None) -> np.ndarray:
  """Keys of a client's images.

  Args:
    secret: The client's.
    image_indices: int [N], which of the client's images; an image keeps its index for good.
    round_num: None for frozen noise; the round for fresh noise.

  Returns:
    int32 [N, 2].
  """
  freshness = _freshness(round_num)
  digests = (
    hashlib.blake2b(b'%s/%d' % (freshness, index), key=secret, digest_size=8).digest()
    for index in np.asarray(image_indices, np.int64)
  )
  return np.frombuffer(b''.join(digests), '<i4').reshape(-1, 2).astype(np.int32)


def _freshness(round_num: int | None) -> bytes:
  return b'frozen' if round_num is None else b'round %d' % round_num


def add_noise_keys(
  dataset: tf.data.Dataset, secret: bytes, *, round_num: int | None = None
) -> tf.data.Dataset:
  """Adds 'noise_key' to every example of a data set of your own.

  Args:
    dataset: Single examples (not batched) as OrderedDict(x, y, ...), in an order that is the same
      each time: shuffle and batch afterwards.
    secret: The client's.
    round_num: See `image_keys`.

  Returns:
    The data set with int32 [2] 'noise_key' in each element, before 'region' if that is there.
  """
  digest = hashlib.blake2b(_freshness(round_num), key=secret, digest_size=16).digest()
  hash_key = [int(half) for half in np.frombuffer(digest, '<i8')]

  def add(index, example):
    # SipHash, keyed: one example's key tells nothing of the others'.
    text = tf.strings.as_string(index)
    halves = [
      tf.strings.to_hash_bucket_strong(text + suffix, 2**32, hash_key) for suffix in ('/0', '/1')
    ]
    key = tf.cast(tf.stack(halves) - 2**31, tf.int32)
    keyed = collections.OrderedDict({**example, NOISE_KEY: key})
    if REGION in keyed:
      keyed.move_to_end(REGION)  # TFF compares names in order, and a process takes the region last.
    return keyed

  return dataset.enumerate().map(add)
