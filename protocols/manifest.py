"""Manifest: the names, shapes, dtypes and groups of a model's tensors, and where each lies.

A model travels as sections, one per group and in manifest order, each section the tensors of that
group laid end to end: `trainable` and `buffers_float` as float32 values (a codec may pack them),
`buffers_other` as int64. `frozen` tensors never travel. Two sides that agree on the schema hash
agree on every offset.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from atoll.protocols.blobs import Section
from atoll.protocols.errors import RemoteError

Group = Literal["trainable", "buffers_float", "buffers_other", "frozen"]
GROUPS: tuple[Group, ...] = get_args(Group)
TRAVELLING: tuple[Group, ...] = ("trainable", "buffers_float", "buffers_other")

MAX_TENSORS = 100_000
MAX_NUMEL = 1 << 40
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,254}")
DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model, as it lies in its group's flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the model's own, e.g. "bfloat16"; on the wire all floats are float32 values
    group: Group

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The tensors of one model, in an order that both sides share."""

    tensors: tuple[TensorSpec, ...]

    @functools.cached_property
    def schema(self) -> str:
        """SHA-256 over names, shapes, dtypes and groups, hex."""
        text = json.dumps([[t.name, list(t.shape), t.dtype, t.group] for t in self.tensors])
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def counts(self) -> Mapping[Group, int]:
        """Elements per group."""
        return {g: sum(t.numel for t in self.tensors if t.group == g) for g in GROUPS}

    @functools.cached_property
    def plans(self) -> dict[str, tuple[Section, ...]]:
        """Sections of a whole blob by the codec's name, once `tensors.sections_of` made them."""
        return {}

    def spans(self, group: Group) -> Sequence[tuple[TensorSpec, int, int]]:
        """Each tensor of `group` with its first and last-plus-one element in the flat vector."""
        return self._spans[group]

    @functools.cached_property
    def _spans(self) -> Mapping[Group, Sequence[tuple[TensorSpec, int, int]]]:
        found: dict[Group, list[tuple[TensorSpec, int, int]]] = {group: [] for group in GROUPS}
        for spec in self.tensors:
            spans = found[spec.group]
            at = spans[-1][2] if spans else 0
            spans.append((spec, at, at + spec.numel))
        return found

    def to_json(self) -> list[dict[str, object]]:
        return [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "group": t.group}
            for t in self.tensors
        ]

    @classmethod
    def from_json(cls, data: object) -> "Manifest":
        """Read strictly: anything not exactly a manifest is RemoteError FL-W101."""
        if not isinstance(data, list) or len(data) > MAX_TENSORS:
            raise _malformed(f"a manifest is a list of at most {MAX_TENSORS} tensors")
        made = cls(tuple(_spec(item) for item in data))
        names = [t.name for t in made.tensors]
        if len(set(names)) != len(names):
            raise _malformed(
                f"tensor {next(n for n in names if names.count(n) > 1)!r} stands twice"
            )
        if sum(t.numel for t in made.tensors) > MAX_NUMEL:
            raise _malformed(f"more than {MAX_NUMEL} elements")
        return made

    def difference(self, other: "Manifest") -> str:
        """The first way in which `other` does not fit this manifest; empty where it fits."""
        ours = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        for name, spec in ours.items():
            if name not in theirs:
                return f"tensor {name!r} {spec.shape} is missing"
            if theirs[name] != spec:
                seen = theirs[name]
                return (
                    f"tensor {name!r} is {seen.shape} {seen.dtype} {seen.group}, "
                    f"the run expects {spec.shape} {spec.dtype} {spec.group}"
                )
        for name, spec in theirs.items():
            if name not in ours:
                return f"tensor {name!r} {spec.shape} is not in the run's model"
        if self.tensors != other.tensors:
            return "the same tensors stand in another order"
        return ""


def _malformed(what: str) -> RemoteError:
    return RemoteError("FL-W101", f"malformed manifest: {what}", "send the manifest of your model")


def _spec(item: object) -> TensorSpec:
    if not isinstance(item, dict) or set(item) != {"name", "shape", "dtype", "group"}:
        raise _malformed("a tensor has name, shape, dtype and group")
    name, shape, dtype, group = item["name"], item["shape"], item["dtype"], item["group"]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _malformed(f"tensor name {name!r}")
    if not isinstance(shape, list) or len(shape) > 16:
        raise _malformed(f"shape {shape!r} of {name!r}")
    if any(type(n) is not int or not 0 <= n <= MAX_NUMEL for n in shape):
        raise _malformed(f"shape {shape!r} of {name!r}")
    if dtype not in DTYPES:
        raise _malformed(f"dtype {dtype!r} of {name!r}")
    if group not in GROUPS:
        raise _malformed(f"group {group!r} of {name!r}")
    return TensorSpec(name, tuple(shape), dtype, group)
