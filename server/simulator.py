"""The simulator: a run in virtual time. Same strategy, same book, a heap instead of a clock.

    print(simulate(FedAvg(steps=50), clients={"a100": 0.05, "laptop": 0.9}, until=3600))

It keeps a driver's promises (`protocols/events.py`), merges at once, and is deterministic: the same
seed gives the same hash over all that was heard and decided.
"""

import heapq
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from atoll.aggregation.strategy import Strategy
from atoll.protocols.errors import AtollError
from atoll.protocols.events import (
    Action,
    Evaluated,
    Event,
    Merged,
    Stopping,
    TimerFired,
    UpdateReceived,
)
from atoll.server.digest import Digest
from atoll.server.learning import Learning, NoLearning
from atoll.server.rows import Recorder
from atoll.server.rules import Rules
from atoll.server.run import (
    Arm,
    Deliver,
    Disarm,
    Effect,
    Interrupt,
    Merge,
    Order,
    Run,
    Stop,
    Tell,
    failed,
)
from atoll.server.simclients import TIMER, Clients
from atoll.server.simulation import Simulation
from atoll.server.totals import Row
from atoll.server.world import ClientModel, at_paces

logger = logging.getLogger(__name__)

Paces = Mapping[str, float] | Sequence[ClientModel]
Listen = Callable[[float, Event, list[Action]], None]


def simulate(
    strategy: Strategy,
    clients: Paces,
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
    who is away has left. ServerError FL-S204 where the strategy raises. UsageError FL-S104 where
    it cannot go with the parts of `learning`; what may go wrong is logged. Without `until` and
    `rules` the strategy must finish by itself.
    """
    models = at_paces(clients) if isinstance(clients, Mapping) else clients
    if learning is not None:
        for warning in learning.check(strategy, len(models)):
            logger.warning("%s", warning)
    simulator = Simulator(
        strategy, models, seed, learning or NoLearning(), rules or Rules(),
        evaluate_every=evaluate_every, lease=lease, update_bytes=update_bytes,
        model_bytes=model_bytes, history=history, listen=listen,
    )  # fmt: skip
    simulator.until(until)
    return simulator.result()


class Simulator:
    """The heap, the clients, and the book: the `Host` of its clients."""

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
        self.events = 0
        self.digest = Digest()
        self.history: list[Row] = []
        self.epsilon: float | None = None  # what privacy has cost, where there is any
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
        self.clients = Clients(self, clients, seed, lease, update_bytes, model_bytes)

    def until(self, end: float) -> None:
        """Let everything up to `end`, included, happen; then the run is told that it is over."""
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
            self.hear(Stopping(f"{self.now:g} seconds done" if heap else "nothing more will come"))

    # ---- the book ----------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        """One event, and all that follows from it at the same instant."""
        events = [event]
        for event in events:
            heard, actions, effects = self._handle(event)
            self.events += 1
            self.digest.feed(self.now, heard, actions)
            if self._listen is not None:
                self._listen(self.now, heard, actions)
            if self._recorder is not None:
                self.history += self._recorder.rows(
                    self.run,
                    self.now,
                    heard,
                    actions,
                    effects,
                    self.clients.arrived,
                    self._down_size,
                )
            if isinstance(heard, UpdateReceived):
                self._bases[heard.update.id] = heard.update.base
            for effect in effects:
                self._perform(effect, events)
            if isinstance(event, (Merged, Evaluated)):
                events.extend(self._look(event))

    def _handle(self, event: Event) -> tuple[Event, list[Action], list[Effect]]:
        try:
            return self.run.handle(event, self.now)
        except AtollError:
            raise
        except Exception as error:  # a strategy may raise anything
            heard = f"{type(event).__name__} at {self.now:g} s"
            remedy = "mend it: -v shows where; `check_strategy` tries it on 200 histories"
            raise failed(heard, error, remedy) from error

    def _down_size(self, order: Order) -> int:
        size = self.learning.download(order)
        return self._sizes[1] if size is None else size

    def _perform(self, effect: Effect, events: list[Event]) -> None:
        if isinstance(effect, Tell):  # the most frequent two come first
            update = effect.outcome.update
            self.run.acknowledge(effect.client, update)
            self.learning.forget(update, effect.outcome.fate)
            self._bases.pop(update, None)
        elif isinstance(effect, Deliver):
            self.learning.given(effect.order)
            self.clients.deliver(effect.order)
        elif isinstance(effect, Merge):
            events.append(self._merge(effect))
        elif isinstance(effect, Arm):
            at = max(effect.at, self.now)
            self._timers[effect.timer] = self.push(at, TIMER, self._fire, effect.timer)
        elif isinstance(effect, Disarm):
            del self._timers[effect.timer]
        elif isinstance(effect, Interrupt):
            self.clients.interrupt(effect.order, effect.then)
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
        else:
            self.rules.merged(event.stats)
            self.epsilon = event.stats.get("epsilon", self.epsilon)
            due = self._evaluate_every and event.version % self._evaluate_every == 0
            if due and (metrics := self.learning.evaluate(event.version)):
                return [Evaluated(event.version, metrics)]
        reason = self.rules.reason(run.published, run.updates_used, run.steps_used, self.now)
        return [] if reason is None or run.finished is not None else [Stopping(reason)]

    def _fire(self, timer: str, ticket: int) -> None:
        if self._timers.get(timer) == ticket:
            del self._timers[timer]
            self.hear(TimerFired(timer))

    def push(self, at: float, rank: int, act: Callable[..., None], what: object) -> int:
        self._tickets = ticket = self._tickets + 1
        heapq.heappush(self._heap, (at, rank, ticket, act, what))
        return ticket

    # ---- in the end ----------------------------------------------------------------------------

    def result(self) -> Simulation:
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
            clients=self.clients.summaries(),
            history=self.history,
            hash=self.digest.hex(),
            rules=self.rules,
            accuracy=self.accuracy,
            epsilon=self.epsilon,
        )
