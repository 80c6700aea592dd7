"""Batches as a pure function of (seed, client, cumulative local step).

Each pass over a client's examples is one shuffle, drawn from (seed, client, number of the pass);
what does not fill a last batch waits for a later pass. So a client that restarts, or that another
process stands in for, goes on in the same order of data without anything stored.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atoll.client.data import Examples, Split, size
from atoll.protocols.errors import DataError

Batch = Any  # (x, y) tensors; whatever the user's own items collate to


class Order:
    """Which examples stand in the batch of a step."""

    def __init__(self, n: int, batch: int, seed: int, client: str) -> None:
        if n < 1:
            raise DataError(
                "FL-D105", f"client {client!r} has no examples", "use fewer clients or more data"
            )
        self.n = n
        self.batch = min(batch, n)
        self.steps_per_pass = n // self.batch
        self._key = (seed, client)
        self._at = -1
        self._shuffled = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """(batch,) int64, the examples of cumulative local step `step` (from 0)."""
        number, within = divmod(step, self.steps_per_pass)
        if number != self._at:
            generator = torch.Generator().manual_seed(mixed(*self._key, number))
            self._shuffled, self._at = torch.randperm(self.n, generator=generator), number
        return self._shuffled[within * self.batch : (within + 1) * self.batch]

    def run(self, first: int, steps: int) -> Tensor:
        """(steps, batch) int64: the batches of that many steps from `first` on."""
        parts, end = [], first + steps
        while first < end:
            self.indices(first)  # draws the pass
            within = first % self.steps_per_pass
            some = min(end - first, self.steps_per_pass - within)
            rows = self._shuffled[within * self.batch : (within + some) * self.batch]
            parts.append(rows.view(some, self.batch))
            first += some
        return torch.cat(parts) if parts else torch.empty(0, self.batch, dtype=torch.int64)


class Batches(Protocol):
    order: Order

    def stream(self, first: int, steps: int) -> Iterator[Batch]:
        """The batches of steps `first` to `first + steps - 1`, on the device."""


class TensorBatches:
    """Examples that lie on the device from the start; a batch is one gather for each tensor."""

    def __init__(self, examples: Split, order: Order, device: torch.device) -> None:
        self.order = order
        self.x, self.y = examples.x.to(device), examples.y.to(device)

    def stream(self, first: int, steps: int) -> Iterator[Batch]:
        for step in range(first, first + steps):
            at = self.order.indices(step).to(self.x.device)
            yield self.x.index_select(0, at), self.y.index_select(0, at)


class LoaderBatches:
    """Any map-style Dataset through torch's DataLoader, in the same order; `workers` read ahead.

    The items are put together by the dataset's own `collate_fn` where it has one.
    """

    def __init__(
        self, dataset: Dataset[Any], order: Order, device: torch.device, workers: int = 0
    ) -> None:
        self.order = order
        self._dataset, self._device, self._workers = dataset, device, workers

    def stream(self, first: int, steps: int) -> Iterator[Batch]:
        sampler = [self.order.indices(step).tolist() for step in range(first, first + steps)]
        for batch in _loader(self._dataset, sampler, self._workers):
            yield moved(batch, self._device)


def batches(
    examples: Examples, batch: int, seed: int, client: str, device: torch.device, workers: int = 0
) -> Batches:
    """Batches of `batch` examples, or of all of them where there are fewer."""
    order = Order(size(examples), batch, seed, client)
    if isinstance(examples, Split):
        return TensorBatches(examples, order, device)
    return LoaderBatches(examples, order, device, workers)


def in_order(examples: Examples, batch: int, device: torch.device) -> Iterator[Batch]:
    """All examples once, in their own order, for evaluation."""
    if isinstance(examples, Split):
        for start in range(0, len(examples), batch):
            part = replace(
                examples,
                raw=examples.raw[start : start + batch],
                y=examples.y[start : start + batch],
            )
            yield part.x.to(device), part.y.to(device)
        return
    n = size(examples)
    sampler = [list(range(start, min(start + batch, n))) for start in range(0, n, batch)]
    for item in _loader(examples, sampler, 0):
        yield moved(item, device)


def moved(batch: Batch, device: torch.device) -> Batch:
    """`batch` with the tensors in it on `device`, whatever lists, tuples and dicts hold them."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [moved(value, device) for value in batch]
    return batch


def mixed(*parts: object) -> int:
    """A seed from any parts, the same in every process (Python's hash of a str is not)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _loader(dataset: Dataset[Any], sampler: list[list[int]], workers: int) -> "DataLoader[Any]":
    base = dataset
    while hasattr(base, "dataset"):  # a shard is a Subset of the user's dataset
        base = base.dataset
    collate: Callable[[list[Any]], Any] | None = getattr(base, "collate_fn", None)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # or it would draw from the process's random state
    )
