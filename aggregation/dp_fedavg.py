"""DP-FedAvg: rounds of clients drawn each by itself and in secret, so that chance hides who is in.

McMahan et al. 2018, https://arxiv.org/abs/1710.06963. FedAvg's cohort has a fixed size, and whoever
knows its seed knows the cohort: that hides nothing. Here each client takes part in a round with
probability `fraction`, whatever the others do, so a round may be empty, and an empty one makes a
version too. The sum is divided by how many are expected, not by how many came: else each would move
the others' weights. For use with `--dp` (`server/privacy.py`), which makes the draws a secret of
the run.
"""

import random
from dataclasses import dataclass, field

from atoll.aggregation.checks import at_least, at_most, finite, positive
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols.events import (
    Aggregate,
    Ask,
    CancelTimer,
    ClientInfo,
    Finish,
    SetTimer,
    Train,
    Update,
)


@dataclass
class DpFedAvg(Strategy):
    """Rounds of clients drawn independently with probability `fraction`.

    A round ends when all who were drawn have answered or left, at the latest at `deadline`; who has
    not answered is told to drop its order, and its part of the sum is 0. Clients that are away
    cannot take part, and count as drawn in vain. Each item's weight is 1 / (fraction * population).
    """

    gives = frozenset({"rounds"})

    population: int = 100  # clients that take part in the run, here or away
    fraction: float = 0.1  # q, of each client, in each round
    steps: int = 50  # local steps of every order
    deadline: float | None = None  # seconds; None: wait for all who were drawn
    min_clients: int = 1  # wait for so many before the first round
    rounds: int | None = None  # finish after so many merges; None: never
    secret: str = "dp-fedavg"  # round r is drawn from (secret, r) alone; --dp makes it one

    round: int = field(default=0, init=False)  # rounds begun
    open: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    due: float = field(default=0.0, init=False)  # when the round's timer is to fire
    present: set[str] = field(default_factory=set, init=False)
    awaited: set[str] = field(default_factory=set, init=False)
    arrived: list[Update] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        at_least(1, population=self.population, steps=self.steps, rounds=self.rounds)
        at_least(1, min_clients=self.min_clients)
        positive(fraction=self.fraction, deadline=self.deadline)
        at_most(1, fraction=self.fraction)
        finite(deadline=self.deadline)

    @property
    def sampling(self) -> tuple[float, int]:
        """(probability, clients), for the accountant."""
        return self.fraction, self.population

    def merge_sizes(self, clients: int | None = None) -> tuple[int, int | None]:
        return 0, clients

    # ---- events

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        if info.examples > 0:
            self.present.add(client)
        yield from self.begin(now)

    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        self.present.discard(client)
        if client in self.awaited:
            self.awaited.remove(client)
            yield from self.close_if_complete(now)

    def on_update(self, update: Update, now: float) -> Actions:
        self.awaited.remove(update.client)
        self.arrived.append(update)
        yield from self.close_if_complete(now)

    def on_timer(self, timer: str, now: float) -> Actions:
        if self.open and timer == self.timer and now >= self.due:
            for client in sorted(self.awaited):
                yield Ask(client, "drop")
            self.awaited.clear()
            yield from self.close_if_complete(now)

    # ---- a round

    @property
    def timer(self) -> str:
        return f"round-{self.round}"

    def begin(self, now: float) -> Actions:
        """Draw each client for itself, once there are clients."""
        least = self.min_clients if self.round == 0 else 1
        if self.open or self.finished or len(self.present) < least:
            return
        self.round += 1
        self.open = True
        drawn = [c for c in sorted(self.present) if self.draws(c)]
        self.awaited = set(drawn)
        for client in drawn:
            yield Train(client, self.steps)
        if self.deadline is not None or not drawn:  # an empty round ends at once, but not in here
            self.due = now + self.deadline if drawn and self.deadline is not None else now
            yield SetTimer(self.timer, self.due)

    def draws(self, client: str) -> bool:
        """A function of secret, round and client: who else is there changes nothing."""
        return random.Random(f"{self.secret}/{self.round}/{client}").random() < self.fraction

    def close_if_complete(self, now: float) -> Actions:
        if self.awaited:
            return
        if self.deadline is not None and now < self.due:
            yield CancelTimer(self.timer)
        self.open = False
        arrived, self.arrived = sorted(self.arrived, key=lambda u: u.client), []
        share = 1 / (self.fraction * self.population)
        yield Aggregate(tuple((u.id, share) for u in arrived))
        if self.round == self.rounds:
            self.finished = True
            yield Finish(f"{self.rounds} rounds done")
        yield from self.begin(now)
