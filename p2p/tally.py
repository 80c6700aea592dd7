"""Tally: what a peer has seen of its run, for whoever watches it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Trained(Protocol):
    """Local work, as `work.Trained`."""

    @property
    def delta(self) -> Tensor: ...
    @property
    def factor(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def loss(self) -> float: ...


@dataclass
class Tally:
    round: int = 0
    rounds_joined: int = 0  # whose mean this peer's work is in
    aborts: int = 0
    downloads: int = 0
    healed: int = 0  # models with other bits than the group's, that were replaced
    loss_first: float | None = None
    loss: float | None = None
    digest: str = ""  # of the model; empty where it is not known yet
    digested: int = 0  # the round whose model that was: `round` is counted before it is applied
    group: tuple[str, ...] = ()  # of the last commit
    weights: tuple[float, ...] = ()
    steps: int = 0  # local ones, in all
    tokens: int = 0
    state: str = "starting"
    why: str = ""  # the last round that was put off
    missing: tuple[str, ...] = ()  # members without some of whom nothing can be decided

    def count(self, done: Trained) -> None:
        self.steps += done.steps
        self.tokens += done.tokens
        if done.factor > 0:
            self.loss = done.loss
            if self.loss_first is None:
                self.loss_first = done.loss
