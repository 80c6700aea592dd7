"""Client: obeys one server's orders with one warm trainer, and survives losing it.

The driver of `session.py`: an asyncio loop for the control stream, one thread that trains, one
that moves bulk bytes, so that a client trains and transfers at the same time.
"""

import asyncio
import contextlib
import functools
import json
import logging
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc

from atoll.client import session as machine
from atoll.client import transfer
from atoll.client.keep import Keep
from atoll.client.links import asked_of, capabilities, own_codecs
from atoll.client.localdp import LocalDP, local_dp, stricter
from atoll.client.outbox import Outbox
from atoll.client.trainer import Trainer
from atoll.client.work import Dropped, Workbench
from atoll.protocols import chains, loops, messages, wire_pb2
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.channel import CHANNEL_OPTIONS, SERVICE
from atoll.protocols.codecs import Fp32
from atoll.protocols.errors import AtollError, ClientError
from atoll.protocols.events import ClientInfo, Then
from atoll.protocols.ids import machine_name
from atoll.protocols.links import Link
from atoll.protocols.manifest import Manifest
from atoll.protocols.messages import ACK_FIELD, RESULT_FIELD
from atoll.protocols.packed import MORE, Parts, nested
from atoll.protocols.runinfo import RunInfo

Maker = Callable[[RunInfo], Trainer]

logger = logging.getLogger(__name__)

PROTOCOL = 1
BATCH = "batch"  # capability: several server messages in one
LATER = 0.05  # seconds an acknowledgement may wait for a message to go with
# A transfer ended with its connection, or the server took us to hold what we do not.
BROKEN = ("FL-C101", "FL-C109", "FL-S208", "FL-W110", "FL-W112")


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
class _Job:
    """The order in training, as seen from both threads."""

    order: messages.Order
    line: "_Line | None"  # that it came by
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


@dataclass
class _Line:
    """One control stream."""

    out: "asyncio.Queue[Parts | None]" = field(default_factory=asyncio.Queue)
    token: str = ""
    run: str = ""
    inline_limit: int = 0
    bulk: Any = None
    patience: transfer.Patience = field(default_factory=transfer.Patience)

    _acks: list[str] = field(default_factory=list)  # updates whose outcome we know
    _timer: asyncio.TimerHandle | None = None  # to acknowledge them

    def say(self, **kind: Any) -> None:
        self.out.put_nowait((wire_pb2.ClientMessage(**kind).SerializeToString(),))

    def acknowledge(self, update: str) -> None:
        """Not urgent: it goes with the next message, or on its own after LATER seconds."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LATER, lambda: self.say(ack=self._take_acks()))
        self._acks.append(update)

    async def queued(self) -> AsyncIterator[bytes]:
        """What is said, until None is."""
        while (message := await self.out.get()) is not None:
            if self._acks:
                acks = nested(ACK_FIELD, self._take_acks().SerializeToString())
                message = (*message, *nested(MORE, *acks))
            yield b"".join(message)

    def _take_acks(self) -> wire_pb2.Ack:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        acks, self._acks = self._acks, []
        return wire_pb2.Ack(updates=acks)

    def close(self) -> None:
        self._take_acks()
        self.patience.stop.set()
        if self.bulk is not None:
            self.bulk.close()


class Client:
    """`trainer` is a Trainer, or makes one from what the server tells of its run.

    `folder` keeps finished work and the data order over restarts; None keeps them in memory.
    `examples` is how many training examples this client holds: its weight in an average. `codec`
    asks for what the run allows, e.g. "up=int8"; empty: as the run wants.
    It gives up after `patience_seconds` without a server, or after `first_seconds` where it has
    never been in the run.
    """

    def __init__(
        self,
        address: str,
        trainer: Trainer | Maker,
        *,
        name: str = "",
        folder: Path | None = None,
        examples: int | None = None,
        seconds_per_step: float | Callable[[Trainer], float] | None = None,
        patience_seconds: float = float("inf"),
        first_seconds: float = float("inf"),
        codec: str = "",
        private: LocalDP | None = None,
    ) -> None:
        self.address = address
        self.name = name or machine_name()
        self.report = Report()
        self._trainer = trainer
        self._examples = examples
        self._pace = seconds_per_step
        self._asked = asked_of(codec)
        self._private = private
        self._outbox = Outbox(folder)
        self._keep = Keep(folder / "keep" if folder is not None else None)
        self._keep.retain([update for _, update in self._outbox.waiting()])
        self._settling: set[str] = set()  # updates whose outcome private state is taking in
        node = self._outbox.memory.node
        self._session = machine.Session(
            seed=node, give_up_seconds=patience_seconds, first_seconds=first_seconds
        )
        self._bench: Workbench | None = None
        self._line: _Line | None = None
        self._talk: asyncio.Task[None] | None = None  # the life of the newest control stream
        self._job: _Job | None = None
        self._orders: dict[str, messages.Order] = {}
        self._events: deque[machine.Event] = deque()  # posted while another one is handled
        self._handling = False
        self._training = ThreadPoolExecutor(1, thread_name_prefix="train")
        self._bulk = ThreadPoolExecutor(2, thread_name_prefix="bulk")
        self._settler = ThreadPoolExecutor(1, thread_name_prefix="keep")  # in the order of outcomes
        self._tasks: set[asyncio.Task[None]] = set()
        self._info = ClientInfo(0)
        self._quit: asyncio.Future[machine.Quit] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> Report:
        """Take part until the run is over. Raises AtollError where this client cannot go on."""
        return loops.run(self._until_signal())

    async def _until_signal(self) -> Report:
        """Ctrl-C and SIGTERM leave with a goodbye: the run need not wait for a lease to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self.stop)
        return await self.serve()

    def stop(self) -> None:
        """Leave with a goodbye, from any thread; work that is not finished is given up."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._say(goodbye=wire_pb2.Goodbye(reason="stopped by its owner"))
        self._post(machine.Ended("stopped by its owner", done=True))

    async def serve(self) -> Report:
        """As `run`, in a running loop."""
        self._loop = asyncio.get_running_loop()
        self._quit = self._loop.create_future()
        self._post(machine.Started(self._outbox.waiting()))
        try:
            leaving = await self._quit
        finally:
            await self._close()
        self.report.reason = leaving.reason
        if leaving.code:
            raise ClientError(leaving.code, leaving.reason, leaving.hint)
        return self.report

    async def _close(self) -> None:
        if self._job is not None:
            self._job.asked = "drop"
        if self._line is not None:
            await asyncio.sleep(0.05)  # let a goodbye or an acknowledgement out
        if self._line is not None:
            self._line.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._training.shutdown(wait=False, cancel_futures=True)
        self._bulk.shutdown(wait=False, cancel_futures=True)
        self._settler.shutdown(wait=False, cancel_futures=True)
        self._keep.close()
        self._outbox.close()

    # ---- what the machine says -----------------------------------------------------------------

    def _perform(self, action: machine.Action) -> None:
        match action:
            case machine.Connect(at):
                self._hang_up()
                self._spawn(self._tick(at))
            case machine.Greet(holding):
                self._talk = self._spawn(self._converse(holding))
            case machine.Work(order):
                self._work(_Job(self._orders.pop(order), self._line))
            case machine.Interrupt(order, then):
                self._interrupt(order, then)
            case machine.Deliver(update):
                self._deliver(update)
            case machine.Complain(order, code, message):
                self._say(failure=wire_pb2.Failure(order=order, code=code, message=message))
            case machine.Acknowledge(update):
                if update not in self._settling:
                    self._acknowledge(update)
            case machine.Settle(update, fate):
                self.report.used += fate == "used"
                self.report.discarded += fate != "used"
                if self._keep.announce(update) and self._bench is not None:
                    self._settling.add(update)
                    self._spawn(self._settle(self._bench, update, fate))
                else:
                    self._outbox.drop(update)
            case machine.Quit():
                assert self._quit is not None
                self._quit.set_result(action)

    def _acknowledge(self, update: str) -> None:
        if self._line is not None:
            self._line.acknowledge(update)

    async def _settle(self, bench: Workbench, update: str, fate: str) -> None:
        """First the private state, then the outbox, then the acknowledgement. An order that comes
        meanwhile waits for the state: it was announced in the same turn of the loop."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._settler, bench.settle, update, fate)
        except AtollError as error:
            self._reject(error, "")
            return
        self._outbox.drop(update)
        self._settling.discard(update)
        self._acknowledge(update)

    def _interrupt(self, order: str, then: Then) -> None:
        if self._job is None or self._job.order.id != order:
            return
        if then == "continue":
            self._job.snapshots += 1
        else:
            self._job.asked = then

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _post(self, event: machine.Event) -> None:
        """Let the machine hear of it, in the loop's thread: now, or after the one it is at."""
        self._events.append(event)
        if self._handling:
            return
        assert self._loop is not None
        assert self._quit is not None
        self._handling = True
        try:
            while self._events and not self._quit.done():
                for action in self._session.handle(self._events.popleft(), self._loop.time()):
                    self._perform(action)
        except Exception as error:  # a bug of ours must end the client, not hang it
            logger.exception("client=%s the session failed", self.name)
            if not self._quit.done():
                self._quit.set_exception(error)
        finally:
            self._handling = False

    def _say(self, **kind: Any) -> None:
        if self._line is not None:
            self._line.say(**kind)

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._talk is not None:
            self._talk.cancel()

    async def _tick(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
        self._post(machine.Tick(at))

    # ---- the control stream --------------------------------------------------------------------

    async def _converse(self, holding: tuple[str, ...]) -> None:
        """One life of the control stream, from hello to its end, whatever ends it."""
        try:
            async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
                stale = await self._prepare(channel)
                holding = tuple(order for order in holding if order not in stale)
                await self._talk_on(channel, _Line(), holding)
            self._lost("the server closed the stream")
        except grpc.aio.AioRpcError as error:
            refused = messages.error_from_metadata(error.trailing_metadata())
            if refused is not None:
                self._reject(refused, "")
            else:
                details = messages.text(error.details() or "", 200)
                self._lost(f"{error.code().name}: {details}")
        except AtollError as error:
            self._reject(error, "")
        except Exception as error:  # a bug of ours must end the client, not hang it
            logger.exception("client=%s the control stream failed", self.name)
            self._reject(ClientError("FL-S100", f"unexpected error: {error!r}"), "")

    async def _talk_on(self, channel: Any, line: _Line, holding: tuple[str, ...]) -> None:
        line.say(hello=self._hello(holding))
        call = channel.stream_stream(
            f"/{SERVICE}/Control",
            response_deserializer=wire_pb2.ServerMessage.FromString,
        )(line.queued())
        try:
            async for message in call:
                self._hear(line, message)
                for further in message.more:
                    self._hear(line, further)
        finally:
            if self._line is line:
                self._line = None
            line.close()
            line.out.put_nowait(None)

    def _lost(self, reason: str) -> None:
        if self._session.failures == 0 and self._session.phase != "over":
            logger.info("client=%s has no server (%s), trying again", self.name, reason)
        self._post(machine.Lost(reason))

    def _reject(self, error: AtollError, order: str) -> None:
        retry = getattr(error, "retry_seconds", None)
        self._post(
            machine.Rejected(
                error.code, error.message, error.hint, order, retry is None, retry or 0.0
            )
        )

    async def _prepare(self, channel: Any) -> set[str]:
        """Before the first hello: hear of the run, make the trainer, measure its speed. Orders of
        another run, whose results lie in the outbox, are forgotten; these are answered."""
        if self._bench is not None:
            return set()
        call = channel.unary_unary(
            f"/{SERVICE}/Inspect",
            request_serializer=wire_pb2.InspectRequest.SerializeToString,
            response_deserializer=wire_pb2.InspectReply.FromString,
        )
        reply = await call(wire_pb2.InspectRequest(what="run"), timeout=30.0)
        info = RunInfo.of(json.loads(reply.data))
        stale = self._outbox.waiting() if self._outbox.memory.run != info.id else ()
        for order, update in stale:
            self._post(machine.Told(order, update, "discarded"))
        self._outbox.enter(info.id)
        self._keep.enter(info.id)
        if self._keep.lost:
            logger.warning("client=%s private state is lost: %s", self.name, self._keep.lost)
        loop = asyncio.get_running_loop()
        self._bench = await loop.run_in_executor(self._training, self._make, info)
        return {order for order, _ in stale}

    def _make(self, info: RunInfo) -> Workbench:
        made = self._trainer
        trainer = cast("Trainer", made) if hasattr(made, "train") else made(info)
        mine = getattr(trainer, "manifest", None)
        if isinstance(mine, Manifest) and (differs := info.manifest.difference(mine)):
            raise ClientError(
                "FL-C103",
                f"this client's model is not the run's: {differs}",
                f"give it the run's model ({info.model}): see `fl-client test`",
            )
        examples = self._examples
        if examples is None:
            examples = int(getattr(trainer, "examples", 0)) or 1
        pace = self._pace(trainer) if callable(self._pace) else self._pace
        self._info = ClientInfo(examples, pace, (BATCH, *capabilities(self._asked)))
        runs = local_dp(info.local_dp) if info.local_dp else None
        private = stricter(self._private, runs)
        return Workbench(trainer, info.manifest, Fp32(), Fp32(), self._outbox, self._keep, private)

    def _hello(self, holding: tuple[str, ...]) -> wire_pb2.Hello:
        assert self._bench is not None
        memory, held = self._outbox.memory, self._bench.holding.held
        return messages.hello_to_wire(
            messages.Hello(
                PROTOCOL, memory.run, self.name, memory.node, self._info,
                self._bench.manifest.schema, holding, "0.1.0", self._keep.report(), self._asked,
                chains.spoken(*held) if held is not None else "",
            )
        )  # fmt: skip

    def _hear(self, line: _Line, message: wire_pb2.ServerMessage) -> None:
        match message.WhichOneof("kind"):
            case "welcome":
                self._welcomed(line, message.welcome)
            case "order":
                self._ordered(messages.order_from_wire(message.order))
            case "ask":
                self._post(machine.Asked(*messages.ask_from_wire(message.ask)))
            case "receipt":
                self._post(machine.Received(message.receipt.update))
            case "outcome":
                told = messages.outcome_from_wire(message.outcome)
                self._post(machine.Told(told.order, told.update, told.fate))
            case "evaluate":
                self._spawn(self._evaluate(line, message.evaluate))
            case "refusal":
                refused = messages.error_from_wire(message.refusal)
                self._reject(refused, message.refusal.order)
            case "goodbye":
                bye = message.goodbye
                self._post(machine.Ended(messages.text(bye.reason), bye.done, bye.retry_seconds))

    def _ordered(self, order: messages.Order) -> None:
        self._orders[order.id] = order
        self._post(machine.Ordered(order.id))

    def _welcomed(self, line: _Line, welcome: wire_pb2.Welcome) -> None:
        assert self._bench is not None
        agreed = Link(welcome.up_codec, welcome.down_codec)
        self._bench.agree(*own_codecs(agreed, self._asked))
        line.token, line.run = welcome.session, welcome.run
        line.inline_limit = welcome.inline_limit
        line.bulk = transfer.connect(self.address)
        self.report.reconnections += self._session.failures > 0
        self._line = line
        self._spawn(self._beat(line, welcome.heartbeat_seconds))
        logger.info("client=%s is in the run at %s", self.name, self.address)
        self._post(machine.Welcomed())

    async def _beat(self, line: _Line, seconds: float) -> None:
        while self._line is line:
            await asyncio.sleep(seconds)
            job = self._job
            beat = wire_pb2.Heartbeat(order=job.order.id, step=job.step) if job else None
            line.say(heartbeat=beat or wire_pb2.Heartbeat())

    # ---- work ----------------------------------------------------------------------------------

    def _work(self, job: _Job) -> None:
        assert self._bench is not None
        self._job = job
        if job.order.sent.here:
            self._post(machine.Fetched(job.order.id))
        working = self._training.submit(self._train, self._bench, job)
        working.add_done_callback(functools.partial(self._back, job))

    def _back(self, job: _Job, working: "Future[messages.Result]") -> None:
        """In the training thread: its work is done, or has failed."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the client has ended
            self._loop.call_soon_threadsafe(self._worked, job, working)

    def _worked(self, job: _Job, working: "Future[messages.Result]") -> None:
        order = job.order.id
        try:
            result = working.result()
            self.report.orders += 1
            self.report.steps += result.steps
            self._post(machine.Finished(order, result.update))
        except Dropped:
            self._post(machine.Dropped(order))
        except AtollError as error:
            self._failed(job, error)
        except Exception as error:  # a bug, ours or a trainer's, must not leave the order open
            logger.exception("client=%s order=%s failed", self.name, order)
            self._failed(job, ClientError("FL-S100", f"unexpected error: {error!r}"))
        finally:
            if self._job is job:
                self._job = None

    def _failed(self, job: _Job, error: AtollError) -> None:
        order = job.order.id
        if error.code in BROKEN:  # its model could not be fetched: it will be sent again
            if self._line is not None and self._line is job.line:
                self._post(machine.Lost(error.message))
            self._post(machine.Dropped(order))
        else:
            logger.warning("client=%s order=%s %s", self.name, order, error)
            self._post(machine.Failed(order, error.code, error.message))

    def _train(self, bench: Workbench, job: _Job) -> messages.Result:
        assert self._loop is not None
        loop = self._loop

        def report(step: int) -> None:
            job.step = step
            if step == 0 and not job.order.sent.here:
                loop.call_soon_threadsafe(self._post, machine.Fetched(job.order.id))

        def fetch(info: BlobInfo, dest: memoryview) -> None:
            self._fetch(job.line, info, dest)

        def snapped(result: messages.Result) -> None:
            finished = machine.Finished(job.order.id, result.update, final=False)
            loop.call_soon_threadsafe(self._post, finished)

        return bench.do(job.order, fetch, job.look, report, snapped)

    def _fetch(self, line: _Line | None, info: BlobInfo, dest: memoryview) -> None:
        if line is None:
            raise ClientError("FL-C101", f"no server to fetch {info.id} from")
        transfer.download(line.bulk, line.token, line.run, info, dest, line.patience)

    async def _evaluate(self, line: _Line, asked: wire_pb2.Evaluate) -> None:
        assert self._bench is not None

        def fetch(info: BlobInfo, dest: memoryview) -> None:
            self._fetch(line, info, dest)

        try:
            sent = messages.sent_from_wire(asked)
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._training, self._bench.evaluate, sent, fetch)
        except ClientError as error:
            if error.code in BROKEN and self._line is line:
                self._post(machine.Lost(error.message))
            return
        except Exception:  # training goes on
            logger.exception("client=%s version=%d not evaluated", self.name, asked.version)
            return
        examples = int(found.pop("examples", 0))
        self._say(
            evaluation=wire_pb2.Evaluation(version=asked.version, metrics=found, examples=examples)
        )

    # ---- delivering ----------------------------------------------------------------------------

    def _deliver(self, update: str) -> None:
        kept, line = self._outbox.get(update), self._line
        if kept is None or line is None:
            return
        result, view = kept
        packed = self._outbox.packed(update)
        if packed is not None and len(view) <= line.inline_limit:
            line.out.put_nowait(nested(RESULT_FIELD, packed))
        else:
            self._spawn(self._upload(line, result, view))

    async def _upload(self, line: _Line, result: messages.Result, view: memoryview) -> None:
        def send() -> None:
            transfer.upload(line.bulk, line.token, line.run, result, view, line.patience)

        try:
            await asyncio.get_running_loop().run_in_executor(self._bulk, send)
            self._post(machine.Received(result.update))
        except AtollError as error:
            if self._line is not line:
                return  # the next welcome delivers it again
            if error.code in BROKEN:
                self._post(machine.Lost(error.message))
            else:
                self._reject(error, result.order if error.code == "FL-W102" else "")
