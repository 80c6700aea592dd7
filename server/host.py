"""Host: one run's world. Orders go out, what clients say comes in, versions are made.

Carries out what the driver's machines decide. Everything here runs in the event loop's thread;
merging, saving and evaluating are handed to worker threads and come back as inputs. Who comes and
goes is `reception.py`'s affair.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from atoll.protocols import bounds, messages, wire_pb2
from atoll.protocols.blobs import INLINE, Blob
from atoll.protocols.errors import AtollError, RemoteError, ServerError
from atoll.protocols.events import (
    Action,
    Evaluated,
    Event,
    Merged,
    Then,
    UpdateReceived,
)
from atoll.protocols.membership import Membership
from atoll.server.driver import Driver
from atoll.server.evaluate import Evaluator
from atoll.server.intake import Intake
from atoll.server.journal import ACKS
from atoll.server.judging import Judging
from atoll.server.links import Links
from atoll.server.merge import InterruptedMergeError
from atoll.server.outgoing import Outgoing
from atoll.server.questions import Around, Questions
from atoll.server.reception import Reception
from atoll.server.recover import snapshot
from atoll.server.rows import Recorder
from atoll.server.run import Deliver, Effect, Merge, Order, Outcome, Run, Tell
from atoll.server.saver import Saver
from atoll.server.sessions import Session, Sessions
from atoll.server.spec import RunSpec
from atoll.server.totals import Row, Totals
from atoll.server.uploads import StoredUpdate
from atoll.server.workshop import Workshop

logger = logging.getLogger(__name__)


class Host:
    """Give it to a `Driver` as its world, then set `driver`."""

    driver: Driver

    def __init__(
        self,
        spec: RunSpec,
        run: Run,
        membership: Membership,
        workshop: Workshop,
        links: Links,
        history: Totals,
        evaluator: Evaluator | None,
        note: Callable[[Sequence[Row]], None],
        questions: Questions,
    ) -> None:
        self.spec = spec
        self.run = run
        self.membership = membership
        self.workshop = workshop
        self.links = links
        self.history = history
        self.evaluator = evaluator
        self.questions = questions
        self.sessions = Sessions()
        self.outgoing = Outgoing(
            run,
            workshop,
            links,
            self.sessions,
            lambda error: self.driver.fail(error),
            history.clients,
        )
        self.reception = Reception(
            spec, run, membership, workshop, links, history, self.sessions, self.outgoing,
            questions, note, lambda: self.driver, lambda client: self.judging.lost(client),
        )  # fmt: skip
        most = spec.most_examples
        self.judging = Judging(self.sessions, self.outgoing, lambda: self.driver, most)
        self.intake = Intake(
            run, membership, workshop, links, self.sessions, self.outgoing,
            lambda: self.driver, self.reception.expel,
        )  # fmt: skip
        self._note = note
        self.recorder = Recorder()  # a resumed run brings its own
        self._groups: dict[str, tuple[tuple[str, ...], float, float]] = {}
        self._groups_of: Callable[[float], Sequence[Any]] | None = getattr(
            run.strategy, "groups", None
        )
        self._spent: list[str] = []
        self._acks: list[tuple[str, str]] = []  # (client, update), not yet written down
        self._merging = ThreadPoolExecutor(1, thread_name_prefix="merge")
        self._saver = Saver(
            workshop,
            spec.save_every,
            published=lambda: self.run.published,
            best=lambda: self.driver.rules.best_version,
            ordered=lambda: {c: order.version for c, order in self.run.open.items()},
            awaited=self._awaited,
            freed=self._spent_more,
            failed=lambda error: self.driver.fail(error),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._offered = self._judged = -1  # newest versions given to the evaluator, heard from it

    # ---- the driver's world --------------------------------------------------------------------

    def ready(self, effect: Deliver | Tell) -> None:
        match effect:
            case Deliver(order):
                self.outgoing.ready(order.client, order)
            case Tell(client, outcome):
                self.outgoing.ready(client, outcome)

    def deliver(self, order: Order) -> None:
        self.outgoing.order(self.sessions.of.get(order.client), order)

    def interrupt(self, order: Order, then: Then) -> None:
        session = self.sessions.of.get(order.client)
        if session is not None:
            session.send(wire_pb2.ServerMessage(ask=messages.ask_to_wire(order.id, then)))

    def quick(self, merge: Merge) -> bool:
        merger = self.workshop.merger
        return self.outgoing.model_size <= INLINE and not merger.learns and merger.table is None

    def merge(self, merge: Merge) -> None:
        self.workshop.stock.merges.append(merge)
        if self.quick(merge):
            merged = self._made(merge)
            if merged is not None:
                self.driver.derive(merged)
        else:
            self._spawn(self._merge(merge))

    def tell(self, client: str, outcome: Outcome) -> None:
        if outcome.fate != "used":
            self.workshop.forget([outcome.update])
            self._spent.append(outcome.update)
        self.outgoing.outcome(self.sessions.of.get(client), outcome)

    def heard(
        self, now: float, event: Event, actions: list[Action], effects: list[Effect]
    ) -> Callable[[], None]:
        size = 0
        if isinstance(event, UpdateReceived):
            info = self.workshop.infos.get(event.update.id)
            size = info.size if info else 0
            self.intake.learn_pace(event.update)
        sent = self.outgoing.size
        rows = self.recorder.rows(self.run, now, event, actions, effects, size, sent)
        if self._groups_of is not None:
            rows.extend(self._new_groups(self._groups_of(now), now))
        return partial(self._written, event, rows)

    def _written(self, event: Event, rows: list[Row]) -> None:
        for row in rows:
            self.history.append(row)
        self._note(rows)
        if isinstance(event, Merged):
            self.workshop.stock.published(event)
            self._published(event.version)
        elif isinstance(event, Evaluated):
            self._judged = max(self._judged, event.version)
            self.workshop.unpin(event.version, self.driver.rules.best_version)

    def _new_groups(self, found: Sequence[Any], now: float) -> Iterator[Row]:
        """FedCompass's arrival groups, where one is new or has changed."""
        for name, members, _, arrival, latest in found:
            told = (tuple(sorted(members)), arrival, latest)
            if self._groups.get(name) != told:
                self._groups[name] = told
                yield {
                    "t": now, "kind": "group", "group": name, "arrival": arrival,
                    "latest": latest, "members": list(told[0]),
                }  # fmt: skip
        self._groups = {g[0]: self._groups[g[0]] for g in found}

    def spent(self) -> tuple[list[str], list[tuple[str, str]]]:
        spent, self._spent = self._spent, []
        meta = self.reception.news()
        acks, self._acks = self._acks, []
        if acks:
            meta.append((ACKS + acks[0][1], json.dumps(acks)))
        return spent, meta

    def _spent_more(self, updates: list[str]) -> None:
        self._spent.extend(updates)

    def busy(self) -> bool:
        if self._judged < self._offered:
            return True
        return self.judging.busy()

    def evaluate(self, version: int) -> None:
        """Let the server's own test data judge a version."""
        if self.evaluator is not None:
            self._offered = max(self._offered, version)
            self.evaluator.offer(version)

    def unjudged(self, version: int) -> None:
        """It could not be evaluated; called from any thread."""
        self._judged = max(self._judged, version)
        self.driver.wake()

    def snapshot(self) -> str | None:
        return snapshot(self.run, self.membership, self.driver.rules, self.workshop.stock)

    def begin(self) -> None:
        """The run starts, or goes on: leases run, and what came before is written."""
        self.reception.open()

    def listen(self) -> None:
        """Before any merge: clients can be asked, those of a former life once they are back."""

        def note(row: Row) -> None:
            self._note([{"t": self.driver.clock.now(), **row}])

        around = Around(self.sessions, self.workshop.uploads, self.outgoing.counted, note)
        self.questions.listen(around, self.membership.alive())

    def _awaited(self) -> set[str]:
        return self.run.awaited() | self.questions.awaited()

    # ---- clients -------------------------------------------------------------------------------

    def message(
        self, session: Session, message: wire_pb2.ClientMessage, bulk: bytes | memoryview = b""
    ) -> None:
        """One message of a client's control stream, and those that travel in it. RemoteError ends
        the session."""
        self.membership.heard(session.client, session.fence, self.driver.clock.now())
        self._hear(session, message, bulk)
        for further in message.more:
            self._hear(session, further, b"")

    def _hear(
        self, session: Session, message: wire_pb2.ClientMessage, bulk: bytes | memoryview
    ) -> None:
        match message.WhichOneof("kind"):
            case "result":
                result = messages.result_from_wire(message.result, bulk)
                (self.questions if result.question else self.intake).inline(session, result)
            case "heartbeat":
                session.beat = message.heartbeat.order, message.heartbeat.step
            case "ack":
                for update in message.ack.updates[:64]:
                    if self.run.acknowledge(session.client, update):
                        self._acks.append((session.client, update))
            case "failure" if message.failure.question:
                self.questions.declined(session.client, message.failure)
            case "failure":
                told = message.failure
                why = f"{bounds.text(told.code, 16)}: {bounds.text(told.message)}"
                logger.warning("client=%s order=%s failed: %s", session.client, told.order, why)
                error = RemoteError(
                    "FL-C104", f"order {bounds.text(told.order, 24)} was given up: {why}",
                    f"mend {'the trainer' if told.code == 'FL-C104' else 'that'} "
                    "and start this client again",
                )  # fmt: skip
                self.reception.expel(session.client, f"it could not train: {why}", error)
            case "evaluation":
                self.judging.heard(session.client, message.evaluation)
            case "goodbye":
                reason = bounds.text(message.goodbye.reason, 200)
                now = self.driver.clock.now()
                left = self.membership.goodbye(session.client, session.fence, now, reason)
                if left is not None:
                    self.reception.left(left)
                session.close()

    # ---- bulk calls (server/bulk.py) -----------------------------------------------------------

    def find_blob(self, client: str, blob: str) -> Blob:
        return self.questions.blob(client, blob) or self.outgoing.find_blob(client, blob)

    def may_upload(self, client: str, result: messages.Result) -> str | None:
        return (self.questions if result.question else self.intake).may_upload(client, result)

    async def accepted(self, client: str, result: messages.Result, stored: StoredUpdate) -> None:
        await (self.questions if result.question else self.intake).accepted(client, result, stored)

    # ---- versions ------------------------------------------------------------------------------

    async def _merge(self, merge: Merge) -> None:
        loop = asyncio.get_running_loop()
        merged = await loop.run_in_executor(self._merging, self._made, merge)
        if merged is not None:
            self.driver.post(merged)

    def _made(self, merge: Merge) -> Merged | None:
        """In whichever thread: make the version. None: it could not be, and the run ends."""
        try:
            merged = self.workshop.make(merge)
            self.links.follow(merge.version)
            return merged
        except InterruptedMergeError:
            logger.info("run=%s version=%d is made when it goes on", self.spec.id, merge.version)
        except AtollError as error:
            self.driver.fail_threadsafe(error)
        except Exception as error:
            logger.exception("run=%s version=%d could not be merged", self.spec.id, merge.version)
            failed = ServerError("FL-S100", f"merging failed: {error!r}", "report it")
            self.driver.fail_threadsafe(failed)
        return None

    def _published(self, version: int) -> None:
        self.links.keep({order.version for order in self.run.open.values()})
        self._saver.offer(version)
        every = self.spec.evaluate_every
        if not every or version % every:
            return
        if self.evaluator is not None:
            self.evaluate(version)
        else:
            self.judging.offer(version)

    async def close(self) -> None:
        """Save the newest version, say goodbye, end the workers."""
        self.judging.close()
        self.reception.close()
        self.workshop.merger.interrupt()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._saver.close(save=self.driver.error is None)
        if self.evaluator is not None:
            await asyncio.to_thread(self.evaluator.close)
        self._merging.shutdown()
        self.workshop.merger.close()
        self.links.close()

    def _spawn(self, work: object) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
