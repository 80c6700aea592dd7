"""A model on a GPU: its update has the bytes of the same model on the CPU, whatever packs it."""

import itertools

import pytest
import torch
from torch import Tensor

from atoll.client.packing import Made, Packed, pack
from atoll.protocols import tensors
from atoll.protocols.codecs import codec
from atoll.protocols.codecspec import ErrorFeedback
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import parse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
MANIFEST = Manifest(
    (
        TensorSpec("w", (1001, 999), "float32", "trainable"),
        TensorSpec("half", (333,), "bfloat16", "trainable"),
        TensorSpec("mean", (17,), "float32", "buffers_float"),
        TensorSpec("count", (), "int64", "buffers_other"),
    )
)
SPECS = ("fp32", "fp16", "bf16", "int8", "int4", "e3m0", "ternary", "sign", "topk:0.01")
MORE = ("topk:0.05,bits=2", "randomk:0.1", "powersgd:4", "int8+zstd", "topk:0.01+zstd")


def model(kind: str, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = {s.name: torch.randn(s.shape, generator=draw) for s in MANIFEST.tensors}
    if kind == "ties":
        values = {name: (v * 4).round() / 4 for name, v in values.items()}
    return {s.name: values[s.name].to(getattr(torch, s.dtype)) for s in MANIFEST.tensors}


def packed(base: dict[str, Tensor], local: dict[str, Tensor], spec: str, feedback: bool) -> Packed:
    fp32 = codec("fp32")
    flats = {s.group: tensors.flatten(MANIFEST, base, s.group) for s in MANIFEST.tensors}
    sections, view = tensors.pack(MANIFEST, flats, fp32)
    sizes = {"dc": local["w"].numel()}
    extras = tensors.extra_groups(sizes, {"dc": local["w"].reshape(-1)}, {}, ())
    extra = tensors.extra_sections(sizes)
    made = Made(parse(MANIFEST, sections, view, fp32, "model"), local, extras)
    rule = ErrorFeedback() if feedback else None
    up = tensors.fit_to(MANIFEST, codec(spec))
    return pack(MANIFEST, made, extra, up, rule, {}, lambda size: memoryview(bytearray(size)))


@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_where_a_model_lies_changes_no_bit(spec: str) -> None:
    for kind, feedback in itertools.product(("normal", "ties"), (False, True)):
        base, local = model(kind, 0), model(kind, 1)
        here = packed(base, local, spec, feedback)
        there = packed(base, {name: t.cuda() for name, t in local.items()}, spec, feedback)
        assert bytes(here.view) == bytes(there.view)
        assert here.after.keys() == there.after.keys()
        assert all(torch.equal(here.after[key], there.after[key]) for key in here.after)
