"""Stacked batches: the examples of many clients' next steps, put together a few steps at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from atoll.client.batches import TensorBatches
from atoll.client.trainer import Task

ROOM = 4 << 20  # bytes of batches that are put together at a time


class StackedBatches:
    """Of K clients with batches of B examples of D numbers; who has most steps comes first."""

    def __init__(self, sources: Sequence[TensorBatches], tasks: Sequence[Task]) -> None:
        runs = [b.order.run(task.done, task.steps) for b, task in zip(sources, tasks, strict=True)]
        most, rows = runs[0].shape
        self._x = [source.x.flatten(1) for source in sources]
        width = self._x[0].shape[1]
        self._few = min(max(1, most), max(1, ROOM // (4 * len(runs) * rows * width)))
        self._rows = [torch.split(run.view(-1), self._few * rows) for run in runs]
        self._labels = torch.zeros(most, len(runs), rows, dtype=torch.int64)
        for k, (source, run) in enumerate(zip(sources, runs, strict=True)):
            self._labels[: len(run), k] = source.y[run]
        self._room = torch.empty(len(runs), self._few, rows, width)
        self._place = self._room.flatten(1, 2).unbind(0)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A few steps each: x (K, steps, B, D), which holds until the next, labels (steps, K, B).

        Where a client has no such step there is anything.
        """
        for piece, labels in enumerate(torch.split(self._labels, self._few)):
            for x, rows, place in zip(self._x, self._rows, self._place, strict=True):
                if piece < len(rows):
                    torch.index_select(x, 0, rows[piece], out=place[: len(rows[piece])])
            yield self._room, labels
