"""Driver: a run in real time. One task owns the machines; everyone else posts to its queue.

An input is stamped with the run's clock when it is posted, and decided about at once. Nothing of a
decision shows outside before the input is in the journal: it is written when something urgent waits
for it, with whatever else has come meanwhile, so a round of many results is one write. Merging,
disk and network happen elsewhere (`World`) and come back as inputs: they never delay a decision.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from atoll.protocols.errors import AtollError, ServerError
from atoll.protocols.events import (
    Evaluated,
    Event,
    Merged,
    Stopping,
    TimerFired,
)
from atoll.protocols.hand import Hand
from atoll.protocols.inbox import Inbox
from atoll.protocols.later import Later
from atoll.server.clock import Clock
from atoll.server.inputs import Input, in_order
from atoll.server.journal import Journal
from atoll.server.outside import World
from atoll.server.payloads import Payload
from atoll.server.rules import Rules
from atoll.server.run import (
    Arm,
    Deliver,
    Disarm,
    Effect,
    Interrupt,
    Merge,
    Run,
    Stop,
    Tell,
    failed,
)
from atoll.server.timers import Timers

logger = logging.getLogger(__name__)

LAZY = 0.005  # seconds an input may wait for others when all that waits for it is a receipt
AT_ONCE = 2 << 20  # bytes of payloads that are described without another thread
BEHIND = 0.2  # seconds what was derived, and SQLite, may wait for another input


@dataclass(slots=True)
class _Decided:
    """An input of which nothing has been said yet."""

    input: Input
    effects: list[Effect]
    heard: Callable[[], None] | None  # None: the strategy failed on it


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
        self._serving = self._settling = self._failed = False
        self._unsaid: list[_Decided] = []  # not written yet
        self._urgent = False  # somebody waits for what was decided about one of them
        self._derived: deque[Event] = deque()
        # A callable is called when all before it has been said; None: look again what is to do.
        self._queue: Inbox[Input | Callable[[], None] | None] = Inbox()
        self._timers = Timers(clock, self._fire)
        self._limit: asyncio.TimerHandle | None = None
        self._late = Later(self._waited)  # to write what waits for no input
        self._due = False  # it has waited long enough
        self._disk = Hand("journal")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = self._halted = False

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
        self._queue.put(Input(self._last, event, payload, then))

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
        if self._settling:
            self._derived.append(event)
        elif self._serving:
            self.post(event)
        else:
            self._put(self._last, event)

    def after(self, then: Callable[[], None]) -> None:
        """Call `then`, in the loop's thread, once all that was posted before has been said."""
        if self._serving:
            self._queue.put(then)
        else:
            then()

    def attach(self) -> None:
        """Belong to the running loop: from now on inputs may be posted."""
        self._loop = asyncio.get_running_loop()

    async def serve(self) -> None:
        """Handle inputs until the run has finished and its last merge is done, or `halt`.

        Raises what ended it otherwise, an AtollError that `error` holds too.
        """
        self.attach()
        assert self._loop is not None
        self._serving = True
        for timer, at in sorted(self.run.timers.items()):
            self._timers.arm(timer, at)
        self._arm_limit()
        self._check_rules(self.clock.now())  # it may have ended just before a restart
        try:
            while not self._over():
                await self._take(await self._queue.all())
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
        try:
            await self._disk.do(lambda: None)  # behind what a cancelled `serve` was writing
            await self._settle()
            await self._disk.do(self.journal.flush)
        except AtollError as error:
            self.fail(error)
        finally:
            self._disk.close()
            self._timers.close()
            self._late.close()
            if self._limit is not None:
                self._limit.cancel()
            self._serving = False
        for last in self._queue.rest():
            if callable(last):
                last()

    def stop(self, reason: str) -> None:
        """End the run from outside: a rule, the user."""
        if not self._stopping and self.run.finished is None:
            self._stopping = True
            self.post(Stopping(reason))

    def halt(self) -> None:
        """Stop for now: what is being written is said, what comes from now on is not handled; it
        will be sent again."""
        self._halted = True
        self._queue.put(None)

    def _over(self) -> bool:
        if self.error is not None or self._halted:
            return True
        return self.run.finished is not None and not self.run.merging and not self.world.busy()

    def wake(self) -> None:
        """Look again whether all is over; from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._queue.put, None)

    async def _take(self, batch: list[Input | Callable[[], None] | None]) -> None:
        """Decide about what has come, and say what was decided unless that can wait; then call
        what is to be called after it."""
        inputs = [one for one in batch if isinstance(one, Input)]
        for one in in_order(inputs) if len(inputs) > 1 else inputs:
            self._decide(one)
        calls = [one for one in batch if callable(one)] if len(inputs) < len(batch) else ()
        if self._urgent or calls or self._due or (self._unsaid and self.run.finished is not None):
            await self._settle()  # at the end too: only who has heard of it knows what is to do
        elif self._unsaid:
            self._late.within(LAZY)
        for call in calls:
            call()

    def _decide(self, one: Input) -> bool:
        """Let the machines hear an input. False where the strategy failed, on it or on an earlier
        one: then it is only written down, for the next life."""
        seq = self.journal.enter(one.now, one.event)
        if self._failed:
            self._unsaid.append(_Decided(one, [], None))
            self._urgent = True
            return False
        try:
            heard, actions, effects = self.run.handle(one.event, one.now)
        except Exception as error:  # a strategy may raise anything; the run ends with it
            logger.info("run=%s the strategy failed", self.journal.run, exc_info=True)
            self.journal.fail(seq, repr(error))
            self._failed = True
            self._unsaid.append(_Decided(one, [], None))
            self._urgent = True
            self.fail(failed(type(one.event).__name__, error))
            return False
        self.journal.decide(seq, actions)
        enough: str | None = None
        for effect in effects:  # a timer that fires is an input like any other
            if isinstance(effect, Merge):
                enough = enough or self.rules.last(effect.version)
            if isinstance(effect, Arm):
                self._timers.arm(effect.timer, effect.at)
            elif isinstance(effect, Disarm):
                self._timers.disarm(effect.timer)
            elif not isinstance(effect, Tell):
                self._urgent = True
        told = self.world.heard(one.now, heard, actions, effects)
        self._unsaid.append(_Decided(one, effects, told))
        if enough is not None and self.run.finished is None:
            return self._decide(Input(one.now, Stopping(enough), None, None))
        return True

    async def _settle(self) -> None:
        """Write down what was decided; then say it."""
        self._due = False
        self._late.done()
        if not self._unsaid and not self.journal.behind:
            if self.journal.ahead:
                await self._disk.do(self.journal.follow)
            return
        assert self._loop is not None
        said, self._unsaid = self._unsaid, []
        payloads = [one.input.payload for one in said if one.input.payload is not None]
        batch = self.journal.take(payloads, *self.world.spent())
        if batch.size <= AT_ONCE:
            self.journal.stage(batch)
            writing = self._disk.do(self.journal.write)
        else:
            writing = self._disk.do(partial(self.journal.commit, batch))
        try:
            followed = self._follow(said)
            whole = [*said, *followed]
            self._pack(whole)
        finally:
            await writing
        for one in whole:
            self._say(one)
        self._late.within(BEHIND)
        self._since_snapshot += len(said)
        if self.snapshot is not None and self._since_snapshot >= self.snapshot_every:
            self._since_snapshot = 0
            text = self.snapshot()
            if text is not None:
                now = said[-1].input.now
                await self._disk.do(partial(self.journal.snapshot, now, text))

    def _follow(self, said: list[_Decided]) -> list[_Decided]:
        """What follows from these inputs alone, worked out while they are being written."""
        self._settling = True
        ahead, followed = deque(said), list[_Decided]()
        try:
            while ahead:
                for effect in ahead.popleft().effects:
                    if isinstance(effect, Merge) and self.world.quick(effect):
                        self.world.merge(effect)
                while self._derived:
                    more = Input(said[-1].input.now, self._derived.popleft(), None, None)
                    going = self._decide(more)
                    ahead.extend(self._unsaid)
                    followed += self._unsaid
                    self._unsaid = []
                    if not going:
                        return followed
        finally:
            self._settling = self._urgent = False  # what is urgent in it is said with the rest
        return followed

    def _pack(self, decided: list[_Decided]) -> None:
        """What will leave when they are written is made ready while they are."""
        for one in decided:
            for effect in one.effects:
                if isinstance(effect, Deliver | Tell):
                    self.world.ready(effect)

    def _waited(self) -> None:
        self._due = True
        self._queue.put(None)

    def _say(self, one: _Decided) -> None:
        """An input is written: carry out what was decided about it."""
        if one.heard is None:
            return
        event, now = one.input.event, one.input.now
        if isinstance(event, Evaluated):
            self.rules.evaluated(event.version, event.metrics, now)
        elif isinstance(event, Merged):
            self.rules.merged(event.stats)
        one.heard()
        for effect in one.effects:
            self._perform(effect)
        if one.input.then is not None:
            one.input.then()
        if isinstance(event, Merged | Evaluated | TimerFired):
            self._check_rules(now)

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
                if not self.world.quick(effect):  # else it is made already
                    self.world.merge(effect)
            case Tell(client, outcome):
                self.world.tell(client, outcome)
            case Stop(reason):
                logger.info("run=%s finished: %s", self.journal.run, reason)

    def _fire(self, timer: str, at: float) -> None:
        self._put(max(at, self.clock.now()), TimerFired(timer))

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
        self._queue.put(None)
