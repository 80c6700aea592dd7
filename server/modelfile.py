"""Model files: safetensors whose data region is exactly what travels, so it is served as it lies.

The format is https://github.com/huggingface/safetensors: eight bytes of header length, a JSON
header, the tensors end to end. Ours keeps the manifest's order, starts its data at a multiple of 64
bytes and holds all floats as float32, all else as int64; any safetensors reader can load it.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atoll.protocols.codecs import as_tensor
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import TRAVELLING, Manifest

ALIGN = 64  # bytes
NAMES = {torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a file lie."""

    head: bytes  # length, header and padding: all that stands before the data
    size: int  # bytes of data
    offsets: Mapping[str, tuple[int, torch.dtype, int]]  # name: first byte, dtype, elements

    @property
    def start(self) -> int:
        return len(self.head)

    def tensors(self, data: memoryview) -> dict[str, Tensor]:
        """Flat tensors over `data`, which is not copied."""
        return {
            name: as_tensor(data[at : at + count * dtype.itemsize], dtype)
            for name, (at, dtype, count) in self.offsets.items()
        }


def layout(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Layout:
    """Lay tensors end to end in the order given."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, tuple[int, torch.dtype, int]] = {}
    at = 0
    for name, dtype, shape in tensors:
        count = math.prod(shape)
        end = at + count * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        offsets[name] = (at, dtype, count)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return Layout(struct.pack("<Q", len(text)) + text, at, offsets)


def model_layout(manifest: Manifest) -> Layout:
    """The file of a version: the travelling groups one after the other."""
    return layout(
        (spec.name, torch.int64 if group == "buffers_other" else torch.float32, spec.shape)
        for group in TRAVELLING
        for spec, _, _ in manifest.spans(group)
    )


def read_header(head: bytes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a header we wrote. Raises ValueError where it is none."""
    header = json.loads(head[8:])
    return {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}


def read_init(path: str, manifest: Manifest) -> dict[str, Tensor]:
    """The travelling tensors of a user's safetensors file. FL-S106 naming what does not fit."""
    wanted = {t.name: t for t in manifest.tensors if t.group != "frozen"}
    frozen = {t.name for t in manifest.tensors if t.group == "frozen"}
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # of a pipe nobody could end the waiting
            raise _unfit(f"{path} is no regular file")
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
            for name, spec in wanted.items():
                if found.get(name) != spec.shape:
                    seen = f"is {found[name]}" if name in found else "is missing"
                    raise _unfit(f"{path}: tensor {name!r} {seen}, the run expects {spec.shape}")
            for name in found:
                if name not in wanted and name not in frozen:
                    raise _unfit(f"{path}: tensor {name!r} {found[name]} is not in the run's model")
            return {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise _unfit(f"{path} cannot be read: {error}") from error


def _unfit(what: str) -> UsageError:
    return UsageError("FL-S106", what, "give a file of this run's model, or drop --init")
