"""Training: the thread in which a client trains, as its event loop sees it.

One order at a time, with one warm trainer. What happens there reaches the session as events.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from atoll.client import session_events as said
from atoll.client.line import BROKEN, Line, fetch_by
from atoll.client.work import Dropped, Workbench
from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.errors import AtollError, ClientError
from atoll.protocols.events import MAX_COUNT, Then
from atoll.protocols.hand import Hand
from atoll.protocols.sent import sent_from_wire

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What a client did, for the log and for tests."""

    orders: int = 0
    steps: int = 0
    used: int = 0
    discarded: int = 0
    reconnections: int = 0
    reason: str = ""


@dataclass
class Job:
    """The order in training, as seen from both threads."""

    order: messages.Order
    line: Line | None  # that it came by
    here: bool  # its model came with it
    asked: Then | None = None  # to send or to drop
    snapshots: int = 0  # asked for
    taken: int = 0  # of these
    step: int = 0

    def look(self) -> Then | None:
        """What was asked; each snapshot once."""
        if self.asked is None and self.taken < self.snapshots:
            self.taken += 1
            return "continue"
        return self.asked


class Training:
    """`post` is called in the loop's thread; `line` is the control stream of now, if there is one.
    `bench` must be there before an order is."""

    def __init__(
        self,
        name: str,
        report: Report,
        post: Callable[[said.Event], None],
        line: Callable[[], Line | None],
        loop: Callable[[], asyncio.AbstractEventLoop],
    ) -> None:
        self.bench: Workbench | None = None
        self._hand = Hand("train")
        self._name = name
        self._report = report
        self._post = post
        self._line = line
        self._loop = loop
        self._job: Job | None = None
        self._unjudged = ""  # why a version could not be evaluated, as said last

    async def prepare(self, make: Callable[[], Workbench]) -> None:
        """Make the bench where it will be used."""
        self.bench = await self._hand.do(make)

    def beat(self) -> wire_pb2.Heartbeat:
        """How far it is."""
        if (job := self._job) is None:
            return wire_pb2.Heartbeat()
        return wire_pb2.Heartbeat(order=job.order.id, step=job.step)

    def interrupt(self, order: str, then: Then) -> None:
        """Let the order in training know what was asked of it."""
        if self._job is None or self._job.order.id != order:
            return
        if then == "continue":
            self._job.snapshots += 1
        else:
            self._job.asked = then

    def close(self) -> None:
        """Give up what is in training, as soon as it looks."""
        if self._job is not None:
            self._job.asked = "drop"
        self._hand.close(wait=False)

    def begin(self, order: messages.Order, line: Line | None) -> None:
        """Train an order that came by `line`."""
        assert self.bench is not None
        job = self._job = Job(order, line, order.sent.here)
        if job.here:
            self._post(said.Fetched(job.order.id))
        working = self._hand.do(functools.partial(self._train, self.bench, job))
        working.add_done_callback(functools.partial(self._worked, job))

    def _worked(self, job: Job, working: "asyncio.Future[messages.Result]") -> None:
        order = job.order.id
        try:
            result = working.result()
            self._report.orders += 1
            self._report.steps += result.steps
            self._post(said.Finished(order, result.update))
        except Dropped:
            self._post(said.Dropped(order))
        except AtollError as error:
            self._failed(job, error)
        except Exception as error:  # a bug, ours or a trainer's, must not leave the order open
            logger.exception("client=%s order=%s failed", self._name, order)
            bug = "this is a bug: -v shows its traceback, please report it"
            self._failed(job, ClientError("FL-S100", f"unexpected error: {error!r}", bug))
        finally:
            if self._job is job:
                self._job = None

    def _failed(self, job: Job, error: AtollError) -> None:
        order = job.order.id
        if error.code in BROKEN:  # its model could not be fetched: it will be sent again
            if job.line is not None and self._line() is job.line:
                self._post(said.Lost(error.message))
            self._post(said.Dropped(order))
        else:
            logger.info("client=%s order=%s %s", self._name, order, error, exc_info=error)
            self._post(said.Failed(order, error.code, error.message, error.hint))

    def _train(self, bench: Workbench, job: Job) -> messages.Result:
        loop = self._loop()

        def report(step: object) -> None:
            job.step = _bounded(step, job)
            if job.step == 0 and not job.here:
                loop.call_soon_threadsafe(self._post, said.Fetched(job.order.id))

        def fetch(info: BlobInfo, dest: memoryview) -> None:
            fetch_by(job.line, info, dest)

        def snapped(result: messages.Result) -> None:
            finished = said.Finished(job.order.id, result.update, final=False)
            loop.call_soon_threadsafe(self._post, finished)

        return bench.do(job.order, fetch, job.look, report, snapped)

    def evaluate(self, line: Line, asked: wire_pb2.Evaluate) -> Coroutine[Any, Any, None]:
        """Judge a version for the server; what is returned tells it what was found.

        It is queued at once, behind the orders before it: a model may be the next one's base.
        """
        bench = self.bench
        assert bench is not None
        judging = self._hand.do(lambda: bench.evaluate(sent_from_wire(asked), line.fetch))
        return self._judged(line, asked.version, judging)

    async def _judged(
        self, line: Line, version: int, judging: "asyncio.Future[dict[str, float]]"
    ) -> None:
        try:
            found = await judging
        except Exception as error:  # training goes on
            if getattr(error, "code", "") in BROKEN:
                if self._line() is line:
                    self._post(said.Lost(str(error)))
                return
            if str(error) != self._unjudged:  # what fails so at every version is said once
                self._unjudged, words = str(error), (self._name, version, error)
                where = not isinstance(error, AtollError) or logger.isEnabledFor(logging.INFO)
                logger.warning("client=%s version=%d not evaluated: %s", *words, exc_info=where)
            found = {}  # as one without test data: the server waits for an answer
        count = found.pop("examples", 0.0)
        examples = int(count) if 0 < count <= MAX_COUNT else 0
        told = wire_pb2.Evaluation(version=version, metrics=found, examples=examples)
        if (now := self._line()) is not None:
            now.say(evaluation=told)


def _bounded(step: object, job: Job) -> int:
    """How far a job is, as its trainer says it: within its order, or as before where that is no
    number. Only a progress bar shows it, so nothing may end by it."""
    try:
        return min(max(int(step), 0), job.order.steps)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: of a tensor of several
        return job.step
