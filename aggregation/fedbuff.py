"""FedBuff: nobody waits. Every client trains on at once; a version is made of every K results.

Nguyen et al. 2022, https://arxiv.org/abs/2106.06639. With `size=1` it is FedAsync
(https://arxiv.org/abs/1903.03934) in its delta form.
"""

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from atoll.aggregation.checks import at_least, finite, one_of, positive
from atoll.aggregation.staleness import discount
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols.events import (
    Aggregate,
    CancelTimer,
    ClientInfo,
    Discard,
    SetTimer,
    Train,
    Update,
)

TIMER = "buffer"


@dataclass
class FedBuff(Strategy):
    """Asynchronous training with a buffer of `size` (K) results: w <- w - lr * sum s(u) delta / K.

    An item's raw weight is lr * s(u) / K, u being the versions between its base and the merge; so
    stale work makes a smaller step, and a buffer merged before it is full a smaller one still. By
    "examples" the shares of a buffer are as its clients' examples, with the same sum. APPFL's
    variant, which does not divide by K, is `lr = alpha * K / clients`.

    FedAsync as first printed mixes models, (1 - a) w + a w_i, which also pulls the server back
    towards the client's old base. No weight of a delta can say that, so it is not offered:
    `size=1` steps by a * delta_i. Say which one is meant wherever the two are compared.

    Work of an order that was closed while the client was away is used like any other, if it is not
    too stale. A buffer is merged before it is full when no result came for `max_age`, or when
    nobody is left training.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"stale"})

    size: int = 10  # K, results a version
    steps: int = 50  # local steps of every order
    lr: float = 1.0  # server step size
    staleness: str = "polynomial:0.5"  # s(u), see `atoll.aggregation.staleness`
    max_staleness: int | None = None  # versions; what is staler is discarded; None: nothing is
    max_age: float | None = None  # seconds without a result after which what is there is merged
    unique_per_buffer: bool = False  # a client waits for the merge its result goes into
    weighting: Literal["examples", "equal"] = "equal"
    concurrency: int | None = None  # clients that train at once, drawn uniformly; None: all
    flush_on_stop: bool = False  # make one last version of what is in the buffer
    seed: int = 0  # draw n is made from (seed, n) alone

    version: int = field(default=0, init=False)
    draws: int = field(default=0, init=False)
    due: float = field(default=0.0, init=False)  # when the buffer's timer is to fire
    examples: dict[str, int] = field(default_factory=dict, init=False)  # of all ever seen
    training: set[str] = field(default_factory=set, init=False)
    idle: set[str] = field(default_factory=set, init=False)  # may be given an order
    parked: set[str] = field(default_factory=set, init=False)  # wait for their result's merge
    buffer: list[Update] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        at_least(1, size=self.size, steps=self.steps, concurrency=self.concurrency)
        at_least(0, max_staleness=self.max_staleness)
        positive(lr=self.lr, max_age=self.max_age)
        finite(lr=self.lr, max_age=self.max_age)
        one_of(("examples", "equal"), weighting=self.weighting)
        discount(self.staleness)

    def merge_sizes(self, clients: int | None = None) -> tuple[int, int | None]:
        """A buffer is merged before it is full when nobody is left to fill it."""
        return 1, self.size

    # ---- events

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        self.examples[client] = info.examples
        if info.examples > 0:
            self.idle.add(client)
        yield from self.go_on()

    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        for former in (self.training, self.idle, self.parked):
            former.discard(client)
        yield from self.go_on()

    def on_update(self, update: Update, now: float) -> Actions:
        self.training.discard(update.client)
        self.idle.add(update.client)
        yield from self.take(update, now)
        yield from self.go_on()

    def on_late(self, update: Update, now: float) -> Actions:
        yield from self.take(update, now)
        yield from self.go_on()

    def on_timer(self, timer: str, now: float) -> Actions:
        if timer == TIMER and self.buffer and now >= self.due:
            yield from self.merge()
            yield from self.go_on()

    def on_stop(self, reason: str, now: float) -> Actions:
        if self.flush_on_stop and self.buffer:
            yield from self.merge()

    # ---- the buffer

    def take(self, update: Update, now: float) -> Actions:
        self.version = max(self.version, update.base)  # a run may begin at a later version than 0
        stale = self.version - update.base
        if self.max_staleness is not None and stale > self.max_staleness:
            yield Discard(update.id, f"{stale} versions stale, {self.max_staleness} allowed")
            return
        if self.unique_per_buffer:
            if any(u.client == update.client for u in self.buffer):
                yield Discard(update.id, "its client is in this buffer already")
                return
            if update.client in self.idle:
                self.idle.remove(update.client)
                self.parked.add(update.client)
        self.buffer.append(update)
        if len(self.buffer) >= self.size:
            yield from self.merge()
        elif self.max_age is not None:
            self.due = now + self.max_age
            yield SetTimer(TIMER, self.due)

    def go_on(self) -> Actions:
        """Give the idle their orders; with nobody training, do not keep what is in the buffer."""
        yield from self.train_idle()
        if self.buffer and not self.training:
            yield from self.merge()
            yield from self.train_idle()

    def train_idle(self) -> Actions:
        chosen = sorted(self.idle)
        if self.concurrency is not None:
            room = max(0, self.concurrency - len(self.training))
            if room < len(chosen):
                self.draws += 1
                chosen = sorted(random.Random(f"{self.seed}/{self.draws}").sample(chosen, room))
        for client in chosen:
            self.idle.remove(client)
            self.training.add(client)
            yield Train(client, self.steps)

    def merge(self) -> Actions:
        if self.max_age is not None:
            yield CancelTimer(TIMER)
        buffer, self.buffer = self.buffer, []
        held = [self.examples[u.client] if self.weighting == "examples" else 1 for u in buffer]
        step = self.lr * len(buffer) / (self.size * (sum(held) or 1))
        fresh = discount(self.staleness)
        yield Aggregate(
            tuple(
                (u.id, step * n * fresh(self.version - u.base))
                for u, n in zip(buffer, held, strict=True)
            )
        )
        self.version += 1
        self.idle |= self.parked
        self.parked.clear()


def fedasync(
    alpha: float = 0.6,  # server step size; the other parameters are FedBuff's
    **parameters: Any,
) -> FedBuff:
    """FedAsync in delta form: FedBuff with a buffer of one and the step size `alpha`."""
    return FedBuff(size=1, lr=alpha, **parameters)
