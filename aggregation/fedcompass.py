"""FedCompass: fast and slow clients arrive together, each having run as many steps as it could.

Li et al., ICLR 2024, https://arxiv.org/abs/2309.14675, with the repairs that a real network needs.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from atoll.aggregation import compass_groups as compass
from atoll.aggregation.checks import at_least, at_most, finite, one_of, positive
from atoll.aggregation.compass_groups import Group, Member, Record
from atoll.aggregation.staleness import polynomial
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols.events import (
    Aggregate,
    CancelTimer,
    ClientInfo,
    Discard,
    Merged,
    SetTimer,
    Train,
    Update,
)


class GroupView(NamedTuple):
    """An arrival group for a dashboard, times on the run clock in seconds."""

    name: str
    members: list[str]  # all of it, sorted
    arrived: list[str]  # of these, who waits for the others, in order of arrival
    expected: float
    latest: float


@dataclass
class FedCompass(Strategy):
    """Semi-asynchronous training: arrival groups of clients with different numbers of steps.

    A client of unknown speed first runs `min_steps`, and that first result is merged alone. From
    then on it joins the open group it can meet with the most steps, or opens one whose time lets
    another group join it later. A group is merged when all its members are there, at the latest
    when `slack` times its length has passed; who comes later is merged with the next group. An
    item's raw weight is share * alpha * (u + 1)^-staleness_exponent, u being versions elapsed: a
    group with half of the data makes half a step.

    The variants of the paper: +M is `singles_plain=True` with an outer optimizer that has momentum
    (results merged alone go past it); +N is `normalised=True`, by which each delta counts per step.

    A client that leaves keeps its speed; its open order's result is still merged if it comes before
    the client has done newer work. One that is silent `dead_after` its group was made counts as
    absent until it is heard again.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"stale"})

    min_steps: int = 20  # Q_min, local steps
    max_steps: int = 100  # Q_max
    slack: float = 1.2  # lambda: a group waits so many times its expected length
    smoothing: float = 0.9  # beta: weight of the newest observation of a client's pace
    alpha: float = 0.9  # server step size; the weights of all clients, fresh, sum to it
    staleness_exponent: float = 0.5  # a
    staleness_at: Literal["aggregation", "arrival"] = "aggregation"  # "arrival" is the paper's
    client_weight: Literal["samples", "equal"] = "samples"
    time_model: Literal["plain", "two_part"] = "plain"  # "two_part": transfer apart from steps
    singles_plain: bool = False  # a result merged alone goes past the outer optimizer
    normalised: bool = False  # deltas per step, times the group's mean number of steps
    dead_after: float | None = None  # seconds; None: 60 or three times the group's span, if longer
    min_clients: int = 1  # wait for so many before the first order
    flush_on_stop: bool = False  # make one last version of all that waits

    version: int = field(default=0, init=False)
    begun: bool = field(default=False, init=False)
    made: int = field(default=0, init=False)  # groups so far
    present: int = field(default=0, init=False)  # shares of the clients that are present, summed
    members: dict[str, Member] = field(default_factory=dict, init=False)  # all ever seen
    open: dict[str, Group] = field(default_factory=dict, init=False)  # oldest first
    closed: dict[str, Group] = field(default_factory=dict, init=False)  # merged without some
    general: list[Record] = field(default_factory=list, init=False)  # late, for the next merge

    def __post_init__(self) -> None:
        at_least(1, min_steps=self.min_steps, slack=self.slack, min_clients=self.min_clients)
        at_least(self.min_steps, max_steps=self.max_steps)
        positive(smoothing=self.smoothing, alpha=self.alpha, dead_after=self.dead_after)
        at_most(1, smoothing=self.smoothing)
        finite(slack=self.slack, alpha=self.alpha, dead_after=self.dead_after)
        polynomial(self.staleness_exponent)
        one_of(("aggregation", "arrival"), staleness_at=self.staleness_at)
        one_of(("samples", "equal"), client_weight=self.client_weight)
        one_of(("plain", "two_part"), time_model=self.time_model)

    # ---- clients come and go

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        member = self.members.setdefault(client, Member(0, present=False))
        self.count(member, False)
        member.examples = info.examples
        self.count(member, info.examples > 0)
        hint = info.seconds_per_step
        if not member.pace and hint is not None and 0.0 < hint < math.inf:
            member.pace = max(hint, compass.INSTANT)
        if self.begun:
            yield from self.first_order(client, now)
        else:
            yield from self.begin(now)

    def begin(self, now: float) -> Actions:
        """Once enough are there, everyone's first order, the fastest first."""
        ready = [c for c, m in self.members.items() if m.present]
        if len(ready) >= self.min_clients:
            self.begun = True
            for client in sorted(ready, key=self.by_pace):
                yield from self.first_order(client, now)

    def first_order(self, client: str, now: float) -> Actions:
        member = self.members[client]
        if not member.present or member.busy:
            return
        if member.pace:
            yield from self.assign(client, now)
        else:
            yield self.order(member, client, None, self.min_steps, now)

    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        member = self.members[client]
        self.count(member, False)
        name, busy = member.group, member.busy
        member.owed = member.given if busy else None
        member.busy, member.group = False, None
        group = self.open.get(name) if name is not None else None
        if name is None:
            return
        if group is None:
            yield from self.forget(name, client)
            return
        group.turn = 0.0
        if not busy:
            group.arrived.remove(client)  # its result stays
            return
        group.pending.remove(client)
        if not group.pending:
            yield from self.close(name, now, early=True)

    def count(self, member: Member, present: bool) -> None:
        """Note whether a member is present, in itself and in the sum of the shares."""
        if member.present != present:
            self.present += self.share(member) if present else -self.share(member)
            member.present = present

    # ---- results

    def on_update(self, update: Update, now: float) -> Actions:
        member = self.members[update.client]
        self.learn(member, update, now)
        member.busy, member.owed = False, None
        if not member.present:  # it was taken for dead
            self.count(member, True)
        name = member.group
        if name is None:
            yield self.aggregate([self.record(update)], outer=not self.singles_plain)
            yield from self.assign(update.client, now)
            return
        group = self.open.get(name)
        if group is not None and now > group.latest:
            yield from self.close(name, now, early=True)
            group = None
        if group is None:
            self.general.append(self.record(update))
            yield from self.forget(name, update.client)
            yield from self.assign(update.client, now)
            return
        group.pending.remove(update.client)
        group.arrived.append(update.client)
        group.buffer.append(self.record(update))
        group.turn = 0.0
        if not group.pending:
            yield from self.close(name, now, early=True)

    def on_late(self, update: Update, now: float) -> Actions:
        """What a client brings back that was away: merged, unless it has done newer work."""
        member = self.members[update.client]
        if member.owed is not None and update.started >= member.owed:
            member.owed = None
            self.general.append(self.record(update))
        else:
            yield Discard(update.id, "its client has had a newer order")

    def learn(self, member: Member, update: Update, now: float) -> None:
        """Its pace from this order; merging before the order could be fetched does not count."""
        took = now - update.started
        if self.time_model == "plain":
            compass.observe(member, took, update.steps, self.smoothing)
        else:
            compass.observe_two_part(
                member, took, update.train_seconds, update.steps, self.smoothing
            )

    def record(self, update: Update) -> Record:
        if update.base > self.version:  # a run may begin at a later version than 0
            self.version = update.base
        return Record(update.id, update.client, update.base, self.version, update.steps)

    # ---- groups

    def on_timer(self, timer: str, now: float) -> Actions:
        group = self.open.get(timer)
        if group is not None and now >= group.latest:
            yield from self.close(timer, now, early=False)
        name = timer.removesuffix(" silent")
        if name != timer and name in self.closed and now >= self.closed[name].silent_at:
            for client in sorted(self.closed.pop(name).pending):
                self.count(self.members[client], False)

    def on_merged(self, merged: Merged, now: float) -> Actions:
        """Groups whose orders waited for this version are due so much later."""
        for name, group in self.open.items():
            waited = now - group.created
            if group.version == merged.version and waited > 0.01 * (group.latest - group.created):
                group.expected += waited
                group.latest += waited
                group.created = now
                yield SetTimer(name, group.latest)

    def assign(self, client: str, now: float) -> Actions:
        """Join the open group that can be met with the most steps, else open one."""
        member = self.members[client]
        least, most = self.min_steps, self.max_steps
        found = compass.joinable(self.open, member, now, least, most)
        if found is not None:
            name, steps = found
            group = self.open[name]
        else:
            steps = compass.steps_of_new_group(
                self.open.values(), self.members, member, now, least, most
            )
            span = member.overhead + steps * member.pace
            group = Group(now + span, now + self.slack * span, now, self.version)
            name = f"g{self.made}"
            self.made += 1
            self.open[name] = group
            yield SetTimer(name, group.latest)
        group.pending.add(client)
        group.turn = 0.0
        yield self.order(member, client, name, steps, now)

    def order(
        self, member: Member, client: str, group: str | None, steps: int, now: float
    ) -> Train:
        member.busy, member.group, member.given = True, group, now
        return Train(client, steps)

    def close(self, name: str, now: float, early: bool) -> Actions:
        """Merge what a group has, late work of others first; its arrived members go on."""
        group = self.open.pop(name)
        if early:
            yield CancelTimer(name)
        if group.buffer or (self.general and (group.pending or group.arrived)):
            items, self.general = self.general + group.buffer, []
            group.buffer = []
            yield self.aggregate(items, outer=True)
        if group.pending:
            patience = max(60.0, 3.0 * (group.latest - group.created))
            group.silent_at = max(now, group.created + (self.dead_after or patience))
            self.closed[name] = group
            yield SetTimer(f"{name} silent", group.silent_at)
        arrived, group.arrived = sorted(group.arrived, key=self.by_pace), []
        for client in arrived:
            yield from self.assign(client, now)

    def forget(self, name: str, client: str) -> Actions:
        """A missing member of a closed group is back, or gone for good."""
        group = self.closed.get(name)
        if group is not None:
            group.pending.remove(client)
            if not group.pending:
                del self.closed[name]
                yield CancelTimer(f"{name} silent")

    def on_stop(self, reason: str, now: float) -> Actions:
        if self.flush_on_stop:
            items, self.general = self.general, []
            for group in self.open.values():
                items, group.buffer = items + group.buffer, []
            if items:
                yield self.aggregate(items, outer=True)

    # ---- weights

    def aggregate(self, items: list[Record], outer: bool) -> Aggregate:
        """Make a version of `items`. Shares are of all clients present or in it."""
        shares = [self.share(self.members[r.client]) for r in items]
        absent = {r.client for r in items if not self.members[r.client].present}
        total = self.present + sum(self.share(self.members[c]) for c in absent)
        steps = [float(max(r.steps, 1)) if self.normalised else 1.0 for r in items]
        mean = sum(s * q for s, q in zip(shares, steps, strict=True)) / (sum(shares) or 1)
        fresh = polynomial(self.staleness_exponent)
        at_arrival = self.staleness_at == "arrival"
        weights = []
        for record, share, own in zip(items, shares, steps, strict=True):
            stale = (record.seen if at_arrival else self.version) - record.base
            weights.append(
                (record.id, self.alpha * share / (total or 1) * fresh(stale) * mean / own)
            )
        self.version += 1
        return Aggregate(tuple(weights), outer=outer)

    def share(self, member: Member) -> int:
        return member.examples if self.client_weight == "samples" else 1

    def by_pace(self, client: str) -> tuple[float, str]:
        return self.members[client].pace, client

    # ---- for a dashboard

    def groups(self, now: float) -> list[GroupView]:
        """The groups open at `now`, oldest first. Reads only."""
        return [
            GroupView(n, sorted([*g.pending, *g.arrived]), list(g.arrived), g.expected, g.latest)
            for n, g in self.open.items()
            if now <= g.latest
        ]
