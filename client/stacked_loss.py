"""Stacked loss: the mean cross-entropy of many clients' batches and its gradient, bit for bit.

torch takes the softmax of short rows number by number, and that of columns a vector at a time. So
the logits of all clients are put in columns, a row for each class, which saves nine tenths of it.
Both give the same bits where there are fewer classes than lanes in a vector; that is tried first.
"""

from functools import cache

import torch
from torch import Tensor

MOST_ROWS = 256  # in a batch: up to there a mean loss is summed as `mean_losses` does it
WIDTH = 64  # columns come in multiples: what does not fill a vector is computed otherwise


class StackedLoss:
    """Of some steps of K clients with batches of B examples, labels (steps, K, B) int64."""

    def __init__(self, labels: Tensor, classes: int) -> None:
        steps, many, rows = labels.shape
        self._shape, self._used = labels.shape, many * rows
        wide = -(-self._used // WIDTH) * WIDTH
        right = torch.zeros(steps, wide, dtype=torch.int64)
        right[:, : self._used] = labels.view(steps, self._used)
        in_columns = columns_agree(classes)
        self._dim = 0 if in_columns else 1
        self._right = right.unsqueeze(self._dim + 1)
        one = (classes, wide) if in_columns else (wide, classes)
        self._log_p = torch.zeros(steps, *one)
        self._by_log_p = torch.zeros(steps, *one)
        self._by_log_p.scatter_(self._dim + 1, self._right, -1.0 / rows)
        self._z, self._g = torch.zeros(one), torch.zeros(one)

    def gradient(self, step: int, logits: Tensor) -> Tensor:
        """Of each mean loss at the first n clients' `logits` (n, B, classes), in that shape."""
        some, classes = logits.shape[0] * logits.shape[1], logits.shape[2]
        z, g = (t if self._dim else t.t() for t in (self._z, self._g))  # (wide, classes)
        z[:some].copy_(logits.view(some, classes))
        log_p = self._log_p[step]
        torch.ops.aten._log_softmax.out(self._z, self._dim, False, out=log_p)
        torch.ops.aten._log_softmax_backward_data.out(
            self._by_log_p[step], log_p, self._dim, torch.float32, out=self._g
        )
        return g[:some].contiguous().view(logits.shape)

    def means(self) -> Tensor:
        """(steps, K): the losses; anything where a client had no gradient taken."""
        picked = self._log_p.gather(self._dim + 1, self._right).squeeze(self._dim + 1)
        return mean_losses(picked[:, : self._used].view(self._shape))


def mean_losses(picked: Tensor) -> Tensor:
    """(...): of log-probabilities (..., B) of the right classes, summed in torch's own order.

    `nll_loss` puts the first row aside, adds up the others in runs of 16, then what is left of
    them, the runs and the first, in this order.
    """
    rows = picked.unbind(-1)
    level = torch.zeros_like(rows[0])
    runs = torch.zeros_like(level)
    for at, row in enumerate(rows[1:], 1):
        level = level - row
        if at % 16 == 0:
            runs, level = runs + level, torch.zeros_like(level)
    return ((level + runs) - rows[0]) / len(rows)


@cache
def columns_agree(classes: int) -> bool:
    """Whether the softmax of columns, and its gradient, has the bits of that of rows."""
    generator = torch.Generator().manual_seed(0)
    z, g = 4 * torch.randn(2, 16 * WIDTH, classes, generator=generator)
    backward = torch.ops.aten._log_softmax_backward_data
    by_row = torch.log_softmax(z, 1)
    by_column = torch.log_softmax(z.t().contiguous(), 0)
    if not torch.equal(by_row.t(), by_column):
        return False
    turned = backward(g.t().contiguous(), by_column, 0, torch.float32)
    return torch.equal(backward(g, by_row, 1, torch.float32).t(), turned)
