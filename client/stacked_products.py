"""Whether a batch of matrix products has the bits of its products one at a time, found by trying.

The library under torch chooses its kernel by processor and by the matrices' sizes, and for some
small ones of uneven sizes it takes another kernel in a batch than alone.
"""

from functools import cache

import torch

LEAST = 400  # multiplications in a product: torch does a smaller one of a batch by another kernel
TRIED = 3  # matrices in the batch


def same_bits(rows: int, inputs: int, outputs: int) -> bool:
    """Whether a linear layer's three products, of a batch of `rows`, can be stacked.

    With several threads True for all but the smallest: then the last bits differ anyway.
    """
    if rows * inputs * outputs < LEAST:
        return False
    return torch.get_num_threads() > 1 or _tried(rows, inputs, outputs)


@cache
def _tried(rows: int, inputs: int, outputs: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, g = (
        torch.randn(TRIED, *shape, generator=generator)
        for shape in ((rows, inputs), (outputs, inputs), (1, outputs), (rows, outputs))
    )
    stacked = (
        torch.bmm(x, weight.mT),
        torch.baddbmm(bias, x, weight.mT),
        torch.bmm(g.mT, x),
        torch.bmm(g, weight),
    )
    alone = (
        [torch.mm(a, w.mT) for a, w in zip(x, weight, strict=True)],
        [torch.addmm(b[0], a, w.mT) for b, a, w in zip(bias, x, weight, strict=True)],
        [torch.mm(d.mT, a) for d, a in zip(g, x, strict=True)],
        [torch.mm(d, w) for d, w in zip(g, weight, strict=True)],
    )
    return all(torch.equal(s, torch.stack(a)) for s, a in zip(stacked, alone, strict=True))
