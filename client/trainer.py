"""Trainer: how local training is done. Three methods; ours for torch is `client/local.py`.

The client keeps one trainer for its whole life: model, data and device stay warm between orders.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from atoll.protocols.events import Then

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Trained:
    tensors: Tensors  # the model after training, all groups that travel; may alias the model
    steps: int  # really run: fewer than asked only where `asked` said to stop
    examples: int  # examples seen
    metrics: Mapping[str, float]  # e.g. {"loss": mean over the steps}
    # What the order makes of the client's private state, kind -> tensors, if its result is used:
    # pending until then (see `client/keep.py`).
    state: Mapping[str, Tensors] = field(default_factory=dict)
    extras: Tensors = field(default_factory=dict)  # sent beside the delta, flat float32
    said: Mapping[str, float] = field(default_factory=dict)  # numbers for the server's half


def _no_state(kind: str) -> Tensors:
    return {}


def _nothing_asked() -> Then | None:
    return None


def _no_report(step: int) -> None:
    return None


def _no_snapshot(work: Trained) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Task:
    """One order as the trainer sees it.

    Where `asked` gives "send" or "drop", stop after that step and return what there is; where it
    gives "continue", hand a `Trained` to `snapshot`, which copies what it needs, and go on.
    """

    steps: int  # exactly so many local steps; 0: give back the model as it is
    done: int = 0  # local steps this client has run in its life: where its data order stands
    extra: Mapping[str, float] = field(default_factory=dict)  # from the strategy
    asked: Callable[[], Then | None] = _nothing_asked  # look after each step, each ask comes once
    report: Callable[[int], None] = _no_report  # call after each step with the steps done
    snapshot: Callable[[Trained], None] = _no_snapshot  # asked to "continue": call, then go on
    extras: Tensors = field(default_factory=dict)  # vectors that came with the model, flat float32
    state: Callable[[str], Tensors] = _no_state  # private state of a kind, as the order found it
    latest: Callable[[str], Tensors] = _no_state  # the same, as it is when the order ends
    life: int = 0  # of that state: another number after every loss

    def vector(self, name: str) -> Tensor:
        """One of `extras`; a single 0 where none came, as when a client only measures its speed."""
        return self.extras.get(name, torch.zeros(1))


class Trainer(Protocol):
    """What a client needs of a training loop.

    One that keeps private state has `rules` too: each kind's name and its `keep.Rule`. One with
    `reads_only = True` never writes to what `load` gave it, and is spared a copy of the model.
    """

    def load(self, tensors: Tensors) -> None:
        """Take these values into the model; raise ValueError where names or shapes do not fit.
        They may be kept, and trained in place."""

    def train(self, task: Task) -> Trained:
        """Run exactly `task.steps` local steps from what was loaded."""

    def evaluate(self) -> Mapping[str, float]:
        """Metrics of the loaded values on held-out data, e.g. {"accuracy", "loss"}; an accuracy is
        a share, from 0 to 1. "examples": how many these data are, the weight of a client's word
        where clients judge; without it, the client's weight in an average."""
