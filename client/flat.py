"""Flat: a module over one flat vector, and its loss on a few examples: what a rule learns by.

The parameters are views of `vector` and their gradients views of another, so that a model of any
size is there twice and is never copied. Dropout is off, for a merge made again must give the same
bits; BatchNorm takes the statistics of the batch, as in training, and its own stay as they are, or,
where `batch_statistics` is False, those it was given.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from atoll.client.batches import Batch, in_order
from atoll.client.data import Examples, Kind, size
from atoll.client.models import manifest_of, named_tensors
from atoll.client.objective import loss_of
from atoll.protocols.manifest import Group
from atoll.protocols.tensors import flatten, unflatten

PIECE = 256  # examples in one forward pass


class FlatModel:
    """A `Proxy` (see `atoll.aggregation.proxy`). Takes `module` over: it is nobody else's then."""

    def __init__(
        self,
        module: nn.Module,
        examples: Examples,
        kind: Kind = "classification",
        *,
        batch_statistics: bool = True,
        limit: int | None = None,
    ) -> None:
        self.limit = limit
        self.manifest = manifest_of(module)
        self._module, self._kind = module.cpu().eval(), kind
        self.use(examples)
        self.vector = torch.empty(self.manifest.counts["trainable"])
        self._gradient = torch.zeros_like(self.vector)
        self._named = dict(named_tensors(module))
        self._params = [
            (self._named[spec.name], lo, hi) for spec, lo, hi in self.manifest.spans("trainable")
        ]
        for param, lo, hi in self._params:
            if param.dtype == torch.float32:
                param.data = self.vector[lo:hi].view(param.shape)
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self.normalise(batch_statistics)

    def use(self, examples: Examples) -> None:
        """Judge by these from now on."""
        self.of, self.examples = examples, size(examples)
        self._all: Batch = next(in_order(examples, self.examples, torch.device("cpu")))

    def normalise(self, batch_statistics: bool) -> None:
        """BatchNorm takes the statistics of the batch, or those it was given."""
        for norm in self._norms:
            norm.train(batch_statistics)
            norm.track_running_stats = not batch_statistics

    def begin(self, buffers: Mapping[str, Tensor]) -> None:
        groups: tuple[Group, ...] = ("buffers_float", "buffers_other")
        for group in groups:
            for name, value in unflatten(self.manifest, group, buffers[group]).items():
                self._named[name].data.copy_(value)

    def loss(self) -> float:
        self._take()
        total, n = 0.0, self.examples
        with torch.no_grad():
            for at in pieces(n):
                batch = picked(self._all, at, n)
                total += loss_of(self._module, batch, self._kind).item() * len(at)
        return total / n

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        return self._sloped([at], len(at))

    def whole(self) -> tuple[float, Tensor]:
        """The same of all examples, a few at a time."""
        return self._sloped(pieces(self.examples), self.examples)

    def _sloped(self, parts: Sequence[Tensor], n: int) -> tuple[float, Tensor]:
        """Loss and gradient over the `n` examples of these parts."""
        self._take()
        self._gradient.zero_()
        for param, lo, hi in self._params:
            param.grad = None
            if param.dtype == torch.float32:
                param.grad = self._gradient[lo:hi].view(param.shape)
        total = 0.0
        for at in parts:
            loss = loss_of(self._module, picked(self._all, at, self.examples), self._kind)
            part = loss if len(parts) == 1 else loss * (len(at) / n)
            torch.autograd.backward(part)
            total += part.item()
        for param, lo, hi in self._params:
            if param.dtype != torch.float32 and param.grad is not None:
                self._gradient[lo:hi] = param.grad.reshape(-1)
        return total, self._gradient

    def gain(self, before: float, after: float) -> float:
        return before - after

    def told(self) -> Mapping[str, float]:
        return {}

    def interrupt(self) -> None:
        """It waits for nobody."""

    def settle(self) -> Tensor:
        self._take()
        with self._counting(), torch.no_grad():
            for at in pieces(self.examples):
                loss_of(self._module, picked(self._all, at, self.examples), self._kind)
        return flatten(self.manifest, self._named, "buffers_float")

    def _take(self) -> None:
        """What is no view of the vector is copied from it."""
        for param, lo, hi in self._params:
            if param.dtype != torch.float32:
                param.data.copy_(self.vector[lo:hi].view(param.shape))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """BatchNorm starts its statistics anew, as the plain mean over what it will see."""
        before = [(n, n.training, n.track_running_stats, n.momentum) for n in self._norms]
        for norm in self._norms:
            norm.train()
            norm.track_running_stats, norm.momentum = True, None
            norm.reset_running_stats()
        try:
            yield
        finally:
            for norm, training, tracks, momentum in before:
                norm.train(training)
                norm.track_running_stats, norm.momentum = tracks, momentum


def pieces(n: int) -> list[Tensor]:
    """0 to n - 1 in nearly equal parts: no part of one example, which has no statistics."""
    return list(torch.arange(n).chunk(-(-n // PIECE)))


def picked(batch: Any, at: Tensor, n: int) -> Batch:
    """The examples `at` of a batch of `n`, whatever lists, tuples and dicts hold its tensors."""
    if isinstance(batch, Tensor):
        return batch.index_select(0, at) if batch.dim() and len(batch) == n else batch
    if isinstance(batch, dict):
        return {key: picked(value, at, n) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [picked(value, at, n) for value in batch]
    return batch
