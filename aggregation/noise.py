"""Noise: Gaussian values that nobody can guess without the key, and that come again with it.

ChaCha20 (https://www.rfc-editor.org/rfc/rfc8439) gives uniform bits, Box and Muller's method makes
them normal, in float64, so that the tails reach 8.5 standard deviations. Each block of CHUNK values
is a function of (key, label, block) alone: any tile can be drawn by any thread, in any order, with
the same bits, and a version made again after a crash gets the noise it had.

A generator made for simulation (torch's, numpy's) would not do: who sees a part of its output can
compute the rest, and subtract it. What this does not cure: values are rounded to float32, and how
often each float can come up tells a little more than the mathematics of real numbers allows
(Mironov 2012, https://doi.org/10.1145/2382196.2382264).
"""

import hashlib
import hmac
import math
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

CHUNK = 1 << 14  # values of a block; 128 kB of key stream
KEY = 32  # bytes
_ZEROS = bytes(8 * CHUNK)
_SCALE = 2.0**-53


def derived(key: bytes, *label: object) -> bytes:
    """A key for one purpose: equal labels give equal keys, and none tells of another. 32 bytes."""
    text = "/".join(map(str, label)).encode()
    return hmac.new(key, text, hashlib.sha256).digest()


def normal(key: bytes, lo: int, hi: int) -> Tensor:
    """Elements [lo, hi) of an endless vector of standard normal values. (hi - lo,) float32.

    Never use a key for two vectors that are both shown to somebody: `derived` makes keys.
    """
    first, last = lo // CHUNK, max(lo // CHUNK + 1, -(-hi // CHUNK))
    blocks = [_block(key, at) for at in range(first, last)]
    whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return torch.from_numpy(whole[lo - first * CHUNK : hi - first * CHUNK])


def one(key: bytes) -> float:
    """A single standard normal value."""
    return float(normal(key, 0, 1)[0])


def add_(values: Tensor, key: bytes, std: float, lo: int = 0) -> Tensor:
    """Add noise of `std` to a flat float32 vector, in place: its elements are [lo, lo + len)."""
    for at in range(0, values.numel(), CHUNK * 16):
        tile = values[at : at + CHUNK * 16]
        tile.add_(normal(key, lo + at, lo + at + tile.numel()), alpha=std)
    return values


def ids(items: Sequence[tuple[str, float]]) -> str:
    """A label for what is summed, so that another sum never gets the same noise."""
    return hashlib.sha256(repr([(i, float(w)) for i, w in items]).encode()).hexdigest()


def _block(key: bytes, at: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Values [at * CHUNK, (at + 1) * CHUNK): always the same calls on arrays of the same size, as
    vectors and what is left over of them need not have the same last bit."""
    nonce = bytes(8) + at.to_bytes(8, "little")  # block counter from 0, then the number of ours
    stream = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(_ZEROS)
    bits = np.frombuffer(stream, np.uint64) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * _SCALE  # in (0, 1), never 0
    radius = np.sqrt(-2.0 * np.log(uniform[: CHUNK // 2]))
    angle = (2.0 * math.pi) * uniform[CHUNK // 2 :]
    values = np.empty(CHUNK, np.float32)
    values[: CHUNK // 2] = radius * np.cos(angle)
    values[CHUNK // 2 :] = radius * np.sin(angle)
    return values
