"""Chains: a model that comes down as differences, the same bits for all who follow.

x^(a) = x(a); x^(v) = x^(v-1) + D(C(x(v) - x^(v-1))). What a codec leaves out of one difference
stands in the next, so the error does not grow with the versions, and both ends hold x^ exactly: the
server's half is `server/chain.py`, the client's `client/holding.py`, and both add with `step`.
"""

import torch

from atoll.protocols.blobs import Section
from atoll.protocols.codecs import FP32, TILE, as_bytes, as_tensor
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.payload import Payload
from atoll.protocols.tensors import sections_of


def whole(manifest: Manifest) -> tuple[Section, ...]:
    """The sections of x^: every group, exactly."""
    return sections_of(manifest, FP32)


def step(
    manifest: Manifest, held: memoryview, difference: Payload, into: memoryview | None = None
) -> None:
    """x^ of a version from x^ of the one before: `held` plus what `difference` decodes to.

    Both are the bytes of `whole` sections; `into` None overwrites `held`. No model-sized scratch.
    """
    into = held if into is None else into
    scratch = torch.empty(min(TILE, max(manifest.counts[g] for g in TRAVELLING)))
    at = 0
    for section in whole(manifest):
        old, new = held[at : at + section.length], into[at : at + section.length]
        at += section.length
        if section.group == "trainable":
            decode = difference.decoder("trainable")
            before, after = as_tensor(old, torch.float32), as_tensor(new, torch.float32)
            for lo in range(0, section.count, TILE):
                hi = min(lo + TILE, section.count)
                torch.add(before[lo:hi], decode(lo, hi, scratch), out=after[lo:hi])
        elif difference.has(section.group):
            new[:] = as_bytes(difference.read(section.group))  # perhaps not aligned
        elif into is not held:
            new[:] = old


def spoken(label: str, version: int) -> str:
    """What a client says that it holds."""
    return f"{label}@{version}"


def heard(base: str) -> tuple[str, int] | None:
    """(label, version) of `spoken`; None where nothing is held."""
    label, at, version = base.partition("@")
    return (label, int(version)) if at else None
