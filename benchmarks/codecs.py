"""Codecs: int8 packs 25 M float32 at 1/4 of memcpy's speed and adds at 1/3, top-k packs at 1/20.

The floor is one copy of the 25 M values by torch, taken in turn with everything else, all on one
thread. The value is what int8 needs to pack them; its limit is 4 floors. Beside it, each held to a
limit of its own: `int8_add`, decoding and adding to a sum (3 floors), `topk_pack` at 1 % (20). The
others are reported only: pack, add, and how many times smaller than float32. The rival is int8 of
whole numpy arrays, the textbook way.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from harness import Result, interleaved, main, medians, say
from torch import Tensor

from atoll.protocols.codecs import TILE, Codec, accumulate, codec

COUNT = 25_000_000
LIMITS = {"int8_pack": 4.0, "int8_add": 3.0, "topk_pack": 20.0}
HELD = {"int8": "int8", "topk": "topk:0.01"}
OTHERS = {
    "bf16": "bf16", "int4": "int4", "e3m0": "e3m0", "ternary": "ternary", "sign": "sign",
    "topk_2_bits": "topk:0.015625,bits=2", "randomk": "randomk:0.01", "powersgd": "powersgd:4",
    "int8_zstd": "int8+zstd",
}  # fmt: skip


def run(quick: bool) -> Result:
    torch.set_num_threads(1)
    values = torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    copy, total, spare = torch.empty(COUNT), torch.zeros(COUNT), torch.empty(TILE)
    cases: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(values)}
    smaller: dict[str, float] = {}
    for name, spec in HELD.items():
        cases |= work(name, codec(spec), values, total, spare, smaller)
    taken = interleaved(cases, 5 if quick else 15)
    others: dict[str, Callable[[], object]] = {"numpy": lambda: textbook(values.numpy())}
    for name, spec in OTHERS.items():
        others |= work(name, codec(spec), values, total, spare, smaller)
    ms = {k: 1000 * s for k, s in medians(taken).items()}
    ms |= {k: 1000 * s for k, s in medians(interleaved(others, 1 if quick else 3)).items()}
    floors = {k: round(ms[k] / ms["copy"], 2) for k in ms if k not in ("copy", "numpy")}
    for name in smaller:
        add = floors[f"{name}_add"]
        say(f"{name:12} {smaller[name]:6.1f} x smaller, pack {floors[f'{name}_pack']:6.2f} copies, "
            f"add {add:5.2f}")  # fmt: skip
    ok = all(floors[name] <= limit for name, limit in LIMITS.items())
    more = {"floors": floors, "limits": LIMITS, "times_smaller": smaller}
    return Result(
        "codecs", ms["int8_pack"], "ms", LIMITS["int8_pack"], ms["copy"], ms["numpy"], ok=ok,
        more=more,
    )  # fmt: skip


def work(
    name: str, one: Codec, values: Tensor, total: Tensor, spare: Tensor, smaller: dict[str, float]
) -> dict[str, Callable[[], object]]:
    """Pack into bytes that are there, and add what was packed, tile by tile."""
    out = memoryview(bytearray(one.size(COUNT)))
    payload = one.encode(values, out)
    smaller[name] = round(4 * COUNT / len(payload), 2)
    check(one, payload, values)
    return {
        f"{name}_pack": functools.partial(one.encode, values, out),
        f"{name}_add": lambda: add(one, payload, total, spare),
    }


def add(one: Codec, payload: memoryview, total: Tensor, spare: Tensor) -> None:
    decode = one.decoder(payload, COUNT)
    for lo in range(0, COUNT, TILE):
        hi = min(lo + TILE, COUNT)
        accumulate(decode, lo, hi, total[lo:hi], 0.5, spare)


def check(one: Codec, payload: memoryview, values: Tensor) -> None:
    """What is measured is a codec: what it reads is nearer to the values than nothing is."""
    tile = one.decoder(payload, COUNT)(0, TILE, torch.empty(TILE))
    if not one.name.startswith("randomk"):  # right on the average only
        assert float((tile - values[:TILE]).norm()) < 1.01 * float(values[:TILE].norm())
    assert bool(tile.isfinite().all())


def textbook(values: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> object:
    blocks = values[: COUNT // 256 * 256].reshape(-1, 256)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return np.round(blocks / scales).astype(np.int8), scales


if __name__ == "__main__":
    main(run)
