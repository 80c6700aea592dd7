"""Driver: a run in real time. One task owns the machines; everyone else posts to its queue.

An input is stamped with the run's clock when it is posted, written to the journal with whatever
else has come meanwhile, and only then handled. Merging, disk and network happen elsewhere (`World`)
and come back as inputs, so they never delay a decision.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from atoll.protocols.errors import AtollError, ServerError
from atoll.protocols.events import (
    Action,
    ClientJoined,
    ClientLeft,
    Evaluated,
    Event,
    Merged,
    Stopping,
    Then,
    TimerFired,
    UpdateReceived,
)
from atoll.server.journal import Journal, Payload
from atoll.server.recover import failed
from atoll.server.rules import Rules
from atoll.server.run import (
    Arm,
    Deliver,
    Disarm,
    Effect,
    Interrupt,
    Merge,
    Order,
    Outcome,
    Run,
    Stop,
    Tell,
)

logger = logging.getLogger(__name__)

BEHIND = 0.2  # seconds what was derived may wait for an input to be written with

RANK: dict[type[Event], int] = {  # of inputs at the same instant
    ClientLeft: 0,
    ClientJoined: 1,
    UpdateReceived: 2,
    Merged: 2,
    Evaluated: 2,
    TimerFired: 3,
    Stopping: 4,
}


class World(Protocol):
    """What a driver does not do itself. Nothing here may block or raise."""

    def deliver(self, order: Order) -> None: ...

    def interrupt(self, order: Order, then: Then) -> None: ...

    def merge(self, merge: Merge) -> None:
        """Make the version in the background, then post Merged."""

    def tell(self, client: str, outcome: Outcome) -> None: ...

    def heard(self, now: float, event: Event, actions: list[Action], effects: list[Effect]) -> None:
        """For the history and the log: what came and what was decided."""

    def spent(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Payloads no longer needed, and meta rows, to be written with the next batch."""

    def busy(self) -> bool:
        """Whether something will still be posted that a finished run should hear."""


class Clock:
    """The run's clock, seconds: stands still while the server is down or the run is paused."""

    def __init__(self, start: float = 0.0) -> None:
        self._base = start
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.monotonic()

    def now(self) -> float:
        return self._base + (time.monotonic() - self._since if self._since is not None else 0.0)

    def wall(self, at: float) -> float:
        """Seconds from now until the run clock shows `at`."""
        return max(0.0, at - self.now())


@dataclass(slots=True)
class _Input:
    now: float
    event: Event
    payload: Payload | None
    then: Callable[[], None] | None


class Driver:
    """Runs one `Run`. `serve()` returns when it has finished; `error` says whether it failed."""

    def __init__(
        self, run: Run, journal: Journal, world: World, rules: Rules, clock: Clock
    ) -> None:
        self.run = run
        self.journal = journal
        self.world = world
        self.rules = rules
        self.clock = clock
        self.error: AtollError | None = None
        self.snapshot: Callable[[], str | None] | None = None  # to write every `snapshot_every`
        self.snapshot_every = 2000  # inputs
        self._since_snapshot = 0
        self._last = clock.now()
        self._handling = self._serving = False
        self._derived: deque[Event] = deque()
        self._queue: asyncio.Queue[_Input | None] = asyncio.Queue()  # None: look at `error`
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._limit: asyncio.TimerHandle | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    def post(
        self,
        event: Event,
        payload: Payload | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Hand an input over, in the loop's thread. `then` runs once it is durable and handled."""
        self._put(self.clock.now(), event, payload, then)

    def _put(
        self,
        now: float,
        event: Event,
        payload: Payload | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        self._last = max(self._last, now)  # a timer may come a hair early, time never goes back
        self._queue.put_nowait(_Input(self._last, event, payload, then))

    def post_threadsafe(self, event: Event) -> None:
        """The same from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.post, event)

    def derive(self, event: Event) -> None:
        """Hear of something that follows from inputs already written, in the loop's thread.

        It is handled after those that brought it about and at their time, and needs no wait for
        the disk. Where it was lost with the process it comes again before anything new, still at
        that time: so whatever it led to is decided again as it was.
        """
        if self._handling:
            self._derived.append(event)
        elif self._serving:
            self.post(event)
        else:
            self._put(self._last, event)

    def attach(self) -> None:
        """Belong to the running loop: from now on inputs may be posted."""
        self._loop = asyncio.get_running_loop()

    async def serve(self) -> None:
        """Handle inputs until the run has finished and its last merge is done.

        Raises what ended it otherwise, an AtollError that `error` holds too.
        """
        self.attach()
        assert self._loop is not None
        self._serving = True
        for timer, at in sorted(self.run.timers.items()):
            self._arm(timer, at)
        self._arm_limit()
        self._check_rules(self.clock.now())  # it may have ended just before a restart
        try:
            while not self._over():
                await self._handle(await self._batch())
        except AtollError as error:
            self.fail(error)
        except Exception as error:  # whatever it is, it is no good end
            logger.exception("run=%s failed", self.journal.run)
            self.fail(ServerError("FL-S100", f"unexpected error: {error!r}", "report it"))
        finally:
            await self._close()
        if self.error is not None:
            raise self.error

    async def _close(self) -> None:
        for handle in (*self._timers.values(), self._limit):
            if handle is not None:
                handle.cancel()
        assert self._loop is not None
        try:
            await self._loop.run_in_executor(self._disk, self.journal.flush)
        except AtollError as error:
            self.fail(error)
        self._disk.shutdown()

    def stop(self, reason: str) -> None:
        """End the run from outside: a rule, the user."""
        if not self._stopping and self.run.finished is None:
            self._stopping = True
            self.post(Stopping(reason))

    def _over(self) -> bool:
        if self.error is not None:
            return True
        return self.run.finished is not None and not self.run.merging and not self.world.busy()

    def wake(self) -> None:
        """Look again whether all is over; from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._queue.put_nowait, None)

    async def _batch(self) -> list[_Input]:
        batch = [await self._queue.get()]
        while not self._queue.empty():
            batch.append(self._queue.get_nowait())
        inputs = [one for one in batch if one is not None]
        return in_order(inputs)

    async def _handle(self, batch: list[_Input]) -> None:
        assert self._loop is not None
        if not batch and not self.journal.behind:
            return
        forget, meta = self.world.spent()
        first = await self._loop.run_in_executor(self._disk, self._write, batch, forget, meta)
        self._handling = True
        try:
            for i, one in enumerate(batch):
                if not self._one(first + i, one):
                    return
            while self._derived:
                one = _Input(batch[-1].now, self._derived.popleft(), None, None)
                if not self._one(self.journal.derive(one.now, one.event), one):
                    return
                self._loop.call_later(BEHIND, self.wake)
        finally:
            self._handling = False
        self._since_snapshot += len(batch)
        if self.snapshot is not None and self._since_snapshot >= self.snapshot_every:
            self._since_snapshot = 0
            text, now = self.snapshot(), batch[-1].now
            if text is not None:
                await self._loop.run_in_executor(self._disk, self.journal.snapshot, now, text)

    def _write(self, batch: list[_Input], forget: list[str], meta: list[tuple[str, str]]) -> int:
        payloads = [i.payload for i in batch if i.payload is not None]
        return self.journal.append([(i.now, i.event) for i in batch], payloads, forget, meta)

    def _one(self, seq: int, one: _Input) -> bool:
        try:
            heard, actions, effects = self.run.handle(one.event, one.now)
        except Exception as error:  # a strategy may raise anything; the run ends with it
            logger.exception("run=%s the strategy failed", self.journal.run)
            self.journal.fail(seq, repr(error))
            self.fail(failed(type(one.event).__name__, error))
            return False
        self.journal.decide(seq, actions)
        if isinstance(one.event, Evaluated):
            self.rules.evaluated(one.event.version, one.event.metrics, one.now)
        self.world.heard(one.now, heard, actions, effects)
        for effect in effects:
            self._perform(effect)
        if one.then is not None:
            one.then()
        if isinstance(one.event, Merged | Evaluated | TimerFired):
            self._check_rules(one.now)
        return True

    def _check_rules(self, now: float) -> None:
        run = self.run
        reason = self.rules.reason(run.published, run.updates_used, run.steps_used, now)
        if reason is not None:
            self.stop(reason)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Deliver(order):
                self.world.deliver(order)
            case Interrupt(order, then):
                self.world.interrupt(order, then)
            case Merge():
                self.world.merge(effect)
            case Tell(client, outcome):
                self.world.tell(client, outcome)
            case Arm(timer, at):
                self._arm(timer, at)
            case Disarm(timer):
                self._disarm(timer)
            case Stop(reason):  # pragma: no branch
                logger.info("run=%s finished: %s", self.journal.run, reason)

    def _arm(self, timer: str, at: float) -> None:
        assert self._loop is not None
        self._disarm(timer)
        self._timers[timer] = self._loop.call_later(self.clock.wall(at), self._fire, timer, at)

    def _fire(self, timer: str, at: float) -> None:
        self._put(max(at, self.clock.now()), TimerFired(timer))

    def _disarm(self, timer: str) -> None:
        handle = self._timers.pop(timer, None)
        if handle is not None:
            handle.cancel()

    def _arm_limit(self) -> None:
        if self.rules.seconds is not None:
            assert self._loop is not None
            reason = f"{self.rules.seconds:g} seconds done"
            wait = self.clock.wall(self.rules.seconds)
            self._limit = self._loop.call_later(wait, self.stop, reason)

    def fail_threadsafe(self, error: AtollError) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.fail, error)

    def fail(self, error: AtollError) -> None:
        """The run cannot go on: `serve` returns, and what is durable stays."""
        self.error = self.error or error
        self._queue.put_nowait(None)


def in_order(inputs: list[_Input]) -> list[_Input]:
    """As a strategy hears them: by time, then leave, join, update, timer, then by arrival.

    A client that joins and leaves at one instant has done so in this order.
    """
    joined: set[tuple[float, str]] = set()
    keys: list[tuple[float, int]] = []
    for one in inputs:
        rank = RANK[type(one.event)]
        if isinstance(one.event, ClientJoined):
            joined.add((one.now, one.event.client))
        elif isinstance(one.event, ClientLeft) and (one.now, one.event.client) in joined:
            rank = RANK[ClientJoined]
        keys.append((one.now, rank))
    return [inputs[i] for i in sorted(range(len(inputs)), key=keys.__getitem__)]
