"""FedAvg: rounds. Pick a cohort, train it from the newest version, take the mean of what arrives.

McMahan et al. 2017, https://arxiv.org/abs/1602.05629; over-selection after Bonawitz et al. 2019,
https://arxiv.org/abs/1902.01046.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from atoll.aggregation.checks import at_least, at_most, finite, one_of, positive
from atoll.aggregation.staleness import discount
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Aggregate,
    Ask,
    CancelTimer,
    ClientInfo,
    Discard,
    Finish,
    Merged,
    SetTimer,
    Train,
    Update,
)


@dataclass
class FedAvg(Strategy):
    """Synchronous rounds with a sampled cohort, over-selection and a deadline.

    A round asks `ceil(m * over_select)` clients, m being `cohort`, or `fraction` of the clients
    present, or all of them, and merges as soon as m results are in, or all that can still come. At
    `deadline` it merges what is there, if that is `min_results`; else it waits one more deadline
    and then fails: no version, and the next round begins. Weights sum to 1 over what was received.

    `late` is the fate of all work that missed its merge, also of a failed round's: "discard" tells
    stragglers to drop their order, so they are free for the next round; "stale" lets them finish,
    and what they bring joins the next merge with its share multiplied by `staleness`. Work of a
    client that left and came back while its round is open is in time. Clients that join in mid
    round are eligible for the next; one without examples is never asked. A round that is open when
    the run is stopped makes no version.
    """

    steps: int = 50  # local steps of every order
    cohort: int | None = None  # at most so many results a round; None: see `fraction`
    fraction: float | None = None  # of the clients present; None: all
    over_select: float = 1.0  # ask so many times more than wanted
    deadline: float | None = None  # seconds from when the cohort can fetch its version; None: never
    min_results: int = 1  # fewer make no version
    min_clients: int = 1  # wait for so many before the first round
    rounds: int | None = None  # finish after so many merges; None: never
    late: Literal["discard", "stale"] = "discard"
    staleness: str = "polynomial:0.5"  # for late="stale"
    weighting: Literal["examples", "seen", "equal"] = "examples"  # held, or seen in the round
    seed: int = 0  # round r is drawn from (seed, r) alone

    round: int = field(default=0, init=False)  # rounds begun
    merges: int = field(default=0, init=False)  # rounds that made a version
    open: bool = field(default=False, init=False)  # a round is running
    began: float = field(default=0.0, init=False)  # when it began
    due: float = field(default=0.0, init=False)  # its deadline, run clock
    extended: bool = field(default=False, init=False)  # its deadline has passed once
    finished: bool = field(default=False, init=False)
    wanted: int = field(default=0, init=False)  # results that complete the round
    examples: dict[str, int] = field(default_factory=dict, init=False)  # of all ever seen
    present: set[str] = field(default_factory=set, init=False)
    awaited: set[str] = field(default_factory=set, init=False)  # training for this round
    gone: set[str] = field(default_factory=set, init=False)  # left this round in mid-order
    straggling: set[str] = field(default_factory=set, init=False)  # training for a former round
    arrived: list[Update] = field(default_factory=list, init=False)  # in time
    carried: list[Update] = field(default_factory=list, init=False)  # late, for the next merge

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, min_results=self.min_results, over_select=self.over_select)
        at_least(1, rounds=self.rounds, min_clients=self.min_clients)
        at_least(self.min_results, cohort=self.cohort)
        positive(deadline=self.deadline, fraction=self.fraction)
        at_most(1, fraction=self.fraction)
        finite(over_select=self.over_select, deadline=self.deadline)
        one_of(("discard", "stale"), late=self.late)
        one_of(("examples", "seen", "equal"), weighting=self.weighting)
        discount(self.staleness)
        if self.cohort is not None and self.fraction is not None:
            raise UsageError(
                "FL-S102", f"cohort={self.cohort} and fraction={self.fraction}", "give one of them"
            )

    def merge_sizes(self, clients: int | None = None) -> tuple[int, int | None]:
        """With late="stale" there is no most: any number of stragglers may join a merge."""
        most = [n for n in (self.cohort, clients) if n is not None]
        return self.min_results, None if self.late == "stale" else min(most, default=None)

    @property
    def gives(self) -> frozenset[str]:
        """See `atoll.protocols.facts`."""
        return frozenset({"stale" if self.late == "stale" else "rounds"})

    # ---- events

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        self.examples[client] = info.examples
        self.present.add(client)
        yield from self.begin(now)

    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        self.present.discard(client)
        self.straggling.discard(client)
        if client in self.awaited:
            self.awaited.remove(client)
            self.gone.add(client)
            yield from self.close_if_complete(now)

    def on_update(self, update: Update, now: float) -> Actions:
        if update.client in self.awaited:
            self.awaited.remove(update.client)
            self.arrived.append(update)
            yield from self.close_if_complete(now)
        else:
            self.straggling.discard(update.client)
            yield from self.take_late(update)
            yield from self.begin(now)

    def on_late(self, update: Update, now: float) -> Actions:
        if self.open and update.client in self.gone and update.started >= self.began:
            self.gone.remove(update.client)
            self.arrived.append(update)
            yield from self.close_if_complete(now)
        else:
            yield from self.take_late(update)

    def on_timer(self, timer: str, now: float) -> Actions:
        if not self.open or self.deadline is None or timer != self.timer or now < self.due:
            return
        if len(self.arrived) < self.min_results and not self.extended:
            self.extended = True
            yield self.wait(now + self.deadline)
        else:
            yield from self.close(now)

    def on_merged(self, merged: Merged, now: float) -> Actions:
        """A round that began behind a merge has its whole deadline once the version is there."""
        if self.open and self.deadline is not None and now > self.began:
            self.extended = False
            yield self.wait(now + self.deadline)

    def wait(self, until: float) -> SetTimer:
        self.due = until
        return SetTimer(self.timer, until)

    # ---- a round

    @property
    def timer(self) -> str:
        return f"round-{self.round}"

    def begin(self, now: float) -> Actions:
        """Begin the next round, if none is open and there are clients enough for one."""
        if self.open or self.finished:
            return
        able = {c for c in self.present if self.examples[c] > 0}
        free = sorted(able - self.straggling)
        waiting = self.round == 0 and len(able) < self.min_clients
        if waiting or len(free) < self.min_results:
            return
        self.round += 1
        self.wanted = self.size(len(able), len(free))
        asked = min(math.ceil(self.wanted * self.over_select - 1e-9), len(free))
        cohort = free if asked == len(free) else self.draw(free, asked)
        self.open, self.extended, self.began = True, False, now
        self.awaited, self.gone = set(cohort), set()
        for client in cohort:
            yield self.order(client)
        if self.deadline is not None:
            yield self.wait(now + self.deadline)

    def order(self, client: str) -> Train:
        return Train(client, self.steps)

    def draw(self, free: list[str], asked: int) -> list[str]:
        return sorted(random.Random(f"{self.seed}/{self.round}").sample(free, asked))

    def size(self, able: int, free: int) -> int:
        """How many results the next round wants."""
        if self.cohort is not None:
            return min(self.cohort, free)
        if self.fraction is not None:
            return min(max(round(self.fraction * able), self.min_results), free)
        return free

    def close_if_complete(self, now: float) -> Actions:
        if len(self.arrived) >= self.wanted or not self.awaited:
            if self.deadline is not None:
                yield CancelTimer(self.timer)
            yield from self.close(now)

    def close(self, now: float) -> Actions:
        """End the round with what has arrived, release the stragglers, and begin the next."""
        stragglers, self.awaited, self.open = sorted(self.awaited), set(), False
        if self.late == "stale":
            self.straggling.update(stragglers)
        else:
            for client in stragglers:
                yield Ask(client, "drop")
        arrived, self.arrived = self.arrived, []
        if len(arrived) >= self.min_results:
            yield from self.merge(arrived)
        else:
            for update in arrived:
                yield from self.take_late(update, f"round {self.round} failed: too few results")
        if self.merges == self.rounds:
            yield from self.finish()
        yield from self.begin(now)

    def merge(self, arrived: list[Update]) -> Actions:
        items = sorted([*self.carried, *arrived], key=lambda u: (u.client, u.id))
        self.carried = []
        newest = max(u.base for u in arrived)  # the version these were made from is the present one
        shares = [self.held(u) * discount(self.staleness)(newest - u.base) for u in items]
        total = math.fsum(shares) or 1.0
        yield Aggregate(tuple((u.id, s / total) for u, s in zip(items, shares, strict=True)))
        self.merges += 1

    def held(self, update: Update) -> int:
        if self.weighting == "seen":
            return update.examples
        return self.examples[update.client] if self.weighting == "examples" else 1

    def take_late(self, update: Update, why: str = "its round is closed") -> Actions:
        if self.late == "stale" and not self.finished:
            self.carried.append(update)
        else:
            yield Discard(update.id, why)

    def finish(self) -> Actions:
        self.finished = True
        for client in sorted(self.straggling):
            yield Ask(client, "drop")
        self.straggling.clear()
        yield Finish(f"{self.rounds} rounds done")
