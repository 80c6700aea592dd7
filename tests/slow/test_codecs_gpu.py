"""Codecs on a GPU: the bytes of the same values are the CPU's."""

import pytest
import torch

from atoll.protocols.codecs import codec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
SAME = ("int8", "int4", "e3m0", "ternary", "sign", "topk:0.01", "topk:0.05,bits=2", "randomk:0.1")


@pytest.mark.parametrize("spec", [*SAME, "int8+zstd", "topk:0.01+zstd"])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_values_on_a_gpu_are_packed_into_the_same_bytes(spec: str, kind: str) -> None:
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        values = (values * 4).round() / 4
    one = codec(spec)
    assert bytes(one.encode(values.cuda())) == bytes(one.encode(values))


def test_a_low_rank_on_a_gpu_is_nearly_the_same() -> None:
    """Products differ in their last bits; what is read of one payload does not."""
    values, one = (
        torch.randn(250_000, generator=torch.Generator().manual_seed(0)),
        codec("powersgd"),
    )
    read = [
        one.decoder(one.encode(v), 250_000)(0, 250_000, torch.empty(250_000)).clone()
        for v in (values, values.cuda())
    ]
    assert (read[0] - read[1]).norm() < 0.02 * read[0].norm()
