"""The simulator: a run in virtual time. Same strategy, same book, a heap instead of a clock.

    print(simulate(FedAvg(steps=50), clients={"a100": 0.05, "laptop": 0.9}, until=3600))

It keeps a driver's promises (`protocols/events.py`), merges at once, and is deterministic: the same
seed gives the same hash over all that was heard and decided.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from atoll.aggregation.strategy import Strategy
from atoll.protocols.events import (
    Action,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Evaluated,
    Event,
    Merged,
    Stopping,
    Then,
    TimerFired,
    Update,
    UpdateReceived,
)
from atoll.protocols.membership import Back, Left, Membership
from atoll.server.digest import Digest
from atoll.server.history import Row
from atoll.server.learning import Learning, NoLearning
from atoll.server.rows import Recorder
from atoll.server.rules import Rules
from atoll.server.run import Arm, Deliver, Disarm, Effect, Interrupt, Merge, Order, Run, Stop, Tell
from atoll.server.simulation import ClientSummary, Simulation
from atoll.server.world import Absence, ClientModel, Pace, at_paces

LEAVE, JOIN, UPDATE, TIMER = range(4)  # what comes first at one instant

Clients = Mapping[str, float] | Sequence[ClientModel]
Listen = Callable[[float, Event, list[Action]], None]


@dataclass(slots=True)
class Work:
    """An order on its client, or its finished result on the way."""

    order: Order
    steps: int  # to run
    pace: float  # seconds per step
    given: float  # from when on it occupies its client
    begin: float  # of training
    end: float  # of training
    ticket: int = 0  # of its arrival in the heap; another number there: that event is void
    snapshot: int = 0  # counts from 1 those of one order; 0: the final result


@dataclass(slots=True)
class Client:
    model: ClientModel
    pace: Pace
    down: float  # seconds until an order and its model are there
    up: float  # seconds a result takes
    fence: int = 0
    here: bool = False  # connected
    work: Work | None = None  # downloading, training, or uploading with nothing newer to do
    outbox: list[Work] = field(default_factory=list)  # other finished results, not yet received
    snapshots: int = 0
    busy: float = 0.0  # seconds with work
    since: float = 0.0  # connected since
    connected: float = 0.0  # seconds, before `since`
    updates: int = 0
    steps: int = 0


def simulate(
    strategy: Strategy,
    clients: Clients,
    until: float = math.inf,
    seed: int = 0,
    *,
    learning: Learning | None = None,
    evaluate_every: int | None = 1,
    rules: Rules | None = None,
    lease: float = 20.0,
    update_bytes: int = 0,
    model_bytes: int = 0,
    history: bool = True,
    listen: Listen | None = None,
) -> Simulation:
    """Run `strategy` on `clients` ({name: seconds per step}, or models) until so many seconds.

    `learning` None trains nothing and evaluates nothing; `atoll.server.training.Training` trains
    for real. A version is evaluated if `evaluate_every` divides its number, in no virtual time.
    `rules` may end the run earlier; `listen` hears of every decision. `lease`: seconds until one
    who is away has left. Whatever the strategy raises comes through. Without `until` and `rules`
    the strategy must finish by itself.
    """
    models = at_paces(clients) if isinstance(clients, Mapping) else clients
    simulator = Simulator(
        strategy, models, seed, learning or NoLearning(), rules or Rules(),
        evaluate_every=evaluate_every, lease=lease, update_bytes=update_bytes,
        model_bytes=model_bytes, history=history, listen=listen,
    )  # fmt: skip
    simulator.until(until)
    return simulator.result()


class Simulator:
    """The heap, the clients, and the book. `until(t)` may be called again to go on."""

    def __init__(
        self,
        strategy: Strategy,
        clients: Sequence[ClientModel],
        seed: int,
        learning: Learning,
        rules: Rules,
        *,
        evaluate_every: int | None,
        lease: float,
        update_bytes: int,
        model_bytes: int,
        history: bool,
        listen: Listen | None,
    ) -> None:
        self.run = Run(strategy)
        self.now = 0.0
        self.learning, self.rules = learning, rules
        self.clients = {
            m.name: Client(
                m, Pace(m, seed), m.latency + model_bytes / m.down, m.latency + update_bytes / m.up
            )
            for m in clients
        }
        assert len(self.clients) == len(clients), "two clients of one name"
        self.members = Membership(lease)
        self.events = 0
        self.digest = Digest()
        self.history: list[Row] = []
        self.staleness = 0  # versions, summed over the updates used
        self.accuracy: list[tuple[float, float]] = []
        self._listen = listen
        self._recorder = Recorder() if history else None
        self._sizes = (update_bytes, model_bytes)
        self._evaluate_every = evaluate_every
        self._bases: dict[str, int] = {}  # undecided update -> its base
        self._timers: dict[str, int] = {}  # timer -> ticket
        self._heap: list[tuple[float, int, int, Callable[..., None], object]] = []
        self._tickets = 0
        for client in self.clients.values():
            self._push(client.model.joins, JOIN, self._arrive, client)

    def until(self, end: float) -> None:
        """Let everything up to `end` happen; the run is then told that it is over."""
        heap = self._heap
        limit = min(end, math.inf if self.rules.seconds is None else self.rules.seconds)
        while heap and self.run.finished is None:
            at, _, ticket, act, what = heap[0]
            if at > limit:
                break
            heapq.heappop(heap)
            self.now = at
            act(what, ticket)
        if self.run.finished is None:
            self.now = max(self.now, limit if limit < math.inf else self.now)
            self._hear(Stopping(f"{self.now:g} seconds done" if heap else "nothing more will come"))

    # ---- clients come and go -----------------------------------------------------------------

    def _arrive(self, client: Client, ticket: int) -> None:
        """It connects, for the first time or again, and sends what it has finished meanwhile."""
        name, now = client.model.name, self.now
        self._put_away(client)
        finished = list(client.outbox)
        if client.work is not None:
            client.work.given = now
            self._send(client, client.work)
        known = self.members.members.get(name)
        came = self.members.hello(name, name, now)
        client.here, client.since, client.fence = True, now, came.fence
        if isinstance(came, Back):
            self._resume(client)
        else:
            said = client.model.seconds_per_step if client.model.benchmark else None
            pace = said or (known.seconds_per_step if known else None)
            examples = self.learning.examples(name)
            held = client.model.examples if examples is None else examples
            self._hear(ClientJoined(name, ClientInfo(held, pace)))
        for work in finished:
            work.given = now
            self._send(client, work)
        away = client.pace.next_absence(now)
        if away is not None:
            self._push(away.at, LEAVE, self._vanish, (client, away))

    def _resume(self, client: Client) -> None:
        """Back within its lease: an order it lost is sent again, and the run hears nothing."""
        order = self.run.open.get(client.model.name)
        held = [work.order for work in (*client.outbox, client.work) if work is not None]
        if order is not None and order.started is not None and order not in held:
            self._deliver(order)

    def _vanish(self, gone: tuple[Client, Absence], ticket: int) -> None:
        client, away = gone
        name, now = client.model.name, self.now
        client.here = False
        client.connected += now - client.since
        self._put_away(client)
        work = client.work
        if work is not None:
            client.busy += now - work.given
            work.ticket = 0
            if away.how != "offline" or work.begin > now:
                client.work = None  # died with its process, or before the model was there
        for sent in client.outbox:
            sent.ticket = 0
        if away.how == "goodbye":
            self.members.goodbye(name, client.fence, now)
            self._hear(ClientLeft(name, self.members.members[name].reason))
        else:
            self.members.heard(name, client.fence, now)
            self.members.broken(name, client.fence, now)
            self._push(now + self.members.lease, LEAVE, self._end_leases, None)
        if away.until < math.inf:
            self._push(away.until, JOIN, self._arrive, client)

    def _put_away(self, client: Client) -> None:
        """A result whose training has ended lies in the outbox, whatever becomes of its client."""
        work = client.work
        if work is not None and work.end <= self.now:
            client.outbox.append(work)
            client.work = None

    def _end_leases(self, _: None, ticket: int) -> None:
        for name in self.members.alive():
            client = self.clients[name]
            if client.here:  # it has sent its heartbeats, which are no events here
                self.members.heard(name, client.fence, self.now)
        for decision in self.members.tick(self.now):
            if isinstance(decision, Left):
                self._hear(ClientLeft(decision.name, decision.reason))

    # ---- work --------------------------------------------------------------------------------

    def _deliver(self, order: Order) -> None:
        client = self.clients[order.client]
        if not client.here:
            return  # it waits for the next hello
        self._put_away(client)
        self._abandon(client)
        now, pace = self.now, client.pace.next_order()
        begin = now + client.down
        client.work = Work(order, order.steps, pace, now, begin, begin + order.steps * pace)
        client.snapshots = 0
        self._send(client, client.work)

    def _send(self, client: Client, work: Work) -> None:
        """The result leaves its client when its training has ended, or now."""
        leaves = work.end if work.end > self.now else self.now
        work.ticket = self._push(leaves + client.up, UPDATE, self._received, (client, work))

    def _received(self, sent: tuple[Client, Work], ticket: int) -> None:
        client, work = sent
        if work.ticket != ticket:
            return
        if work is client.work:
            client.work = None
        elif not work.snapshot:
            client.outbox.remove(work)
        if not work.snapshot:
            client.busy += self.now - work.given
            client.updates += 1
            client.steps += work.steps
        self._result(client.model.name, work)

    def _result(self, client: str, work: Work) -> None:
        order = work.order
        if self.run.order(client, order.id) is None:
            return  # older than what the run remembers: it is refused
        update = f"{order.id}.0" + (f"s{work.snapshot}" if work.snapshot else "")
        worked = self.learning.train(client, order, work.steps, update, not work.snapshot)
        seconds = work.steps * work.pace
        self._hear(
            UpdateReceived(
                Update(
                    update, order.id, client, order.version, work.steps, worked.examples, 0.0,
                    seconds, worked.metrics, final=not work.snapshot,
                )
            )
        )  # fmt: skip

    def _asked(self, ask: tuple[Client, Order, Then], ticket: int) -> None:
        """An ask has reached its client, which looks for one after each local step."""
        client, order, then = ask
        work, now = client.work, self.now
        if work is None or work.order is not order or work.end <= now or not client.here:
            return
        if then == "drop":
            self._abandon(client)
            return
        done = max(1, math.ceil((now - work.begin) / work.pace - 1e-9))
        end = max(now, work.begin + done * work.pace)
        if then == "send":
            work.steps, work.end = done, end
            self._send(client, work)
        else:
            client.snapshots += 1
            part = Work(order, done, work.pace, now, work.begin, end, snapshot=client.snapshots)
            self._send(client, part)

    def _abandon(self, client: Client) -> None:
        """Whatever it was at comes to nothing."""
        if client.work is not None:
            client.work.ticket = 0
            client.busy += self.now - client.work.given
            client.work = None

    # ---- the book ----------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        """One event, and all that follows from it at the same instant."""
        events = [event]
        for event in events:
            heard, actions, effects = self.run.handle(event, self.now)
            self.events += 1
            self.digest.feed(self.now, heard, actions)
            if self._listen is not None:
                self._listen(self.now, heard, actions)
            if self._recorder is not None:
                self.history.extend(
                    self._recorder.rows(self.run, self.now, heard, actions, effects, self._sizes)
                )
            if isinstance(heard, UpdateReceived):
                self._bases[heard.update.id] = heard.update.base
            for effect in effects:
                self._perform(effect, events)
            if isinstance(event, (Merged, Evaluated)):
                events.extend(self._look(event))

    def _perform(self, effect: Effect, events: list[Event]) -> None:
        if isinstance(effect, Tell):  # the most frequent two come first
            update = effect.outcome.update
            self.run.acknowledge(effect.client, update)
            self.learning.forget(update)
            self._bases.pop(update, None)
        elif isinstance(effect, Deliver):
            self.learning.given(effect.order)
            self._deliver(effect.order)
        elif isinstance(effect, Merge):
            events.append(self._merge(effect))
        elif isinstance(effect, Arm):
            at = max(effect.at, self.now)
            self._timers[effect.timer] = self._push(at, TIMER, self._fire, effect.timer)
        elif isinstance(effect, Disarm):
            del self._timers[effect.timer]
        elif isinstance(effect, Interrupt):
            client = self.clients[effect.order.client]
            heard = self.now + client.model.latency
            self._push(heard, UPDATE, self._asked, (client, effect.order, effect.then))
        else:
            assert isinstance(effect, Stop)  # the loop looks itself

    def _merge(self, merge: Merge) -> Merged:
        merged = self.learning.merge(merge)
        for update in merged.used:
            self.staleness += merge.version - 1 - self._bases[update]
        return merged

    def _look(self, event: Merged | Evaluated) -> list[Event]:
        """Evaluate what was made, and end the run where a rule says so."""
        run = self.run
        if isinstance(event, Evaluated):
            self.rules.evaluated(event.version, event.metrics, self.now)
            if "accuracy" in event.metrics:
                self.accuracy.append((self.now, event.metrics["accuracy"]))
        elif self._evaluate_every and event.version % self._evaluate_every == 0:
            metrics = self.learning.evaluate(event.version)
            if metrics:
                return [Evaluated(event.version, metrics)]
        reason = self.rules.reason(run.published, run.updates_used, run.steps_used, self.now)
        return [] if reason is None or run.finished is not None else [Stopping(reason)]

    def _fire(self, timer: str, ticket: int) -> None:
        if self._timers.get(timer) == ticket:
            del self._timers[timer]
            self._hear(TimerFired(timer))

    def _push(self, at: float, rank: int, act: Callable[..., None], what: object) -> int:
        self._tickets = ticket = self._tickets + 1
        heapq.heappush(self._heap, (at, rank, ticket, act, what))
        return ticket

    # ---- in the end ----------------------------------------------------------------------------

    def result(self) -> Simulation:
        for client in self.clients.values():
            if client.here:
                client.connected += self.now - client.since
                client.since = self.now
            if client.here and client.work is not None:
                client.busy += self.now - client.work.given
                client.work.given = self.now
        used = self.run.updates_used
        return Simulation(
            strategy=type(self.run.strategy).__name__,
            seconds=self.now,
            reason=self.run.finished or "",
            events=self.events,
            versions=self.run.published,
            updates_used=used,
            steps_used=self.run.steps_used,
            mean_staleness=self.staleness / used if used else 0.0,
            clients={
                name: ClientSummary(c.updates, c.steps, c.busy, c.connected)
                for name, c in self.clients.items()
            },
            history=self.history,
            hash=self.digest.hex(),
            rules=self.rules,
            accuracy=self.accuracy,
        )
