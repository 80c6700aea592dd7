"""Client: obeys one server's orders with one warm trainer, and survives losing it.

The driver of `session.py`: an asyncio loop for the control stream, one thread that trains, one
that moves bulk bytes, so that a client trains and transfers at the same time.
"""

import asyncio
import contextlib
import gc
import json
import logging
import signal
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from atoll.client import session as machine
from atoll.client import session_events as said
from atoll.client import transfer
from atoll.client.keep import Keep
from atoll.client.line import BROKEN, Line
from atoll.client.links import own_codecs
from atoll.client.localdp import LocalDP
from atoll.client.outbox import Outbox
from atoll.client.part import Maker, Part
from atoll.client.settling import Settling
from atoll.client.trainer import Trainer
from atoll.client.training import Report, Training
from atoll.protocols import bounds, lifted, loops, messages, refusals, wire_pb2
from atoll.protocols.blobs import Bulk
from atoll.protocols.channel import CHANNEL_OPTIONS, SERVICE
from atoll.protocols.errors import AtollError, ClientError
from atoll.protocols.ids import machine_name
from atoll.protocols.links import Link
from atoll.protocols.messages import RESULT_FIELD
from atoll.protocols.packed import nested
from atoll.protocols.runinfo import RunInfo

logger = logging.getLogger(__name__)


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
        self._outbox = Outbox(folder)
        self._keep = Keep(folder / "keep" if folder is not None else None)
        self._keep.retain([update for _, update in self._outbox.waiting()])
        self._part = Part(
            self.name, trainer, examples, seconds_per_step, codec, private,
            self._outbox, self._keep, lambda: self._line,
        )  # fmt: skip
        self._settling = Settling(
            self._keep, self._outbox, self._acknowledge, lambda error: self._reject(error, "")
        )
        node = self._outbox.memory.node
        self._session = machine.Session(
            seed=node, give_up_seconds=patience_seconds, first_seconds=first_seconds
        )
        self._line: Line | None = None
        self._talk: asyncio.Task[None] | None = None  # the life of the newest control stream
        self._orders: dict[str, messages.Order] = {}
        self._events: deque[said.Event] = deque()  # posted while another one is handled
        self._handling = False
        self._training = Training(
            self.name, self.report, self._post, lambda: self._line, self._running
        )
        self._bulk = ThreadPoolExecutor(2, thread_name_prefix="bulk")
        self._waiting: set[str] = set()  # updates for which the server has no room
        self._tasks: set[asyncio.Task[None]] = set()
        self._quit: asyncio.Future[said.Quit] | None = None
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
        self._post(said.Ended("stopped by its owner", done=True))

    async def serve(self) -> Report:
        """As `run`, in a running loop."""
        self._loop = asyncio.get_running_loop()
        self._quit = self._loop.create_future()
        self._post(said.Started(self._outbox.waiting()))
        try:
            leaving = await self._quit
        finally:
            await self._close()
        self.report.reason = leaving.reason
        if leaving.code:
            raise ClientError(leaving.code, leaving.reason, leaving.hint)
        return self.report

    async def _close(self) -> None:
        self._training.close()
        self._part.close()
        await self._settling.close()
        if self._line is not None:
            await asyncio.sleep(0.05)  # let a goodbye or an acknowledgement out
        if self._line is not None:
            self._line.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._bulk.shutdown(wait=False, cancel_futures=True)
        self._keep.close()
        self._outbox.close()
        gc.unfreeze()

    # ---- what the machine says -----------------------------------------------------------------

    def _perform(self, action: said.Action) -> None:
        match action:
            case said.Connect(at):
                self._hang_up()
                self._spawn(self._tick(at))
            case said.Wake(at):
                self._spawn(self._tick(at))
            case said.Greet(holding):
                self._talk = self._spawn(self._converse(holding))
            case said.Work(order):
                self._training.begin(self._orders.pop(order), self._line)
            case said.Interrupt(order, then):
                self._training.interrupt(order, then)
            case said.Deliver(update):
                self._deliver(update)
            case said.Complain(order, code, message):
                self._say(failure=wire_pb2.Failure(order=order, code=code, message=message))
            case said.Acknowledge(update):
                if update not in self._settling:
                    self._acknowledge(update)
            case said.Settle(update, fate):
                self.report.used += fate == "used"
                self.report.discarded += fate != "used"
                self._settling.begin(self._training.bench, update, fate)
            case said.Quit():
                assert self._quit is not None
                self._quit.set_result(action)

    def _acknowledge(self, update: str) -> None:
        if self._line is not None:
            self._line.acknowledge(update)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _post(self, event: said.Event) -> None:
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

    def _running(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop

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
        self._post(said.Tick(at))

    # ---- the control stream --------------------------------------------------------------------

    async def _converse(self, holding: tuple[str, ...]) -> None:
        """One life of the control stream, from hello to its end, whatever ends it."""
        try:
            async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
                stale = await self._prepare(channel)
                holding = tuple(order for order in holding if order not in stale)
                await self._talk_on(channel, Line(), holding)
            self._lost("the server closed the stream")
        except grpc.aio.AioRpcError as error:
            refused = refusals.error_from_metadata(error.trailing_metadata())
            if refused is not None:
                self._reject(refused, "")
            else:
                self._lost(refusals.plainly(error.code().name, error.details() or ""))
        except AtollError as error:
            self._reject(error, "")
        except Exception as error:  # a bug of ours must end the client, not hang it
            logger.exception("client=%s the control stream failed", self.name)
            self._reject(ClientError("FL-S100", f"unexpected error: {error!r}"), "")

    async def _talk_on(self, channel: Any, line: Line, holding: tuple[str, ...]) -> None:
        assert self._training.bench is not None
        line.say(hello=self._part.hello(self._training.bench, holding))
        call = channel.stream_stream(
            f"/{SERVICE}/Control",
            response_deserializer=lifted.server_messages,
        )(line.queued())
        try:
            async for together in call:
                for message, bulk in together:
                    self._hear(line, message, bulk)
        finally:
            if self._line is line:
                self._line = None
            line.close()
            line.out.put(None)

    def _lost(self, reason: str) -> None:
        if self._session.failures == 0 and self._session.phase != "over":
            logger.info("client=%s has no server (%s), trying again", self.name, reason)
        self._post(said.Lost(reason))

    def _reject(self, error: AtollError, order: str) -> None:
        retry = getattr(error, "retry_seconds", None)
        self._post(
            said.Rejected(error.code, error.message, error.hint, order, retry is None, retry or 0.0)
        )

    async def _prepare(self, channel: Any) -> set[str]:
        """Before the first hello: hear of the run, make the trainer, measure its speed. Orders of
        another run, whose results lie in the outbox, are forgotten; these are answered."""
        if self._training.bench is not None:
            return set()
        call = channel.unary_unary(
            f"/{SERVICE}/Inspect",
            request_serializer=wire_pb2.InspectRequest.SerializeToString,
            response_deserializer=wire_pb2.InspectReply.FromString,
        )
        reply = await call(wire_pb2.InspectRequest(what="run"), timeout=30.0)
        self._post(said.Answered())
        info = RunInfo.of(json.loads(reply.data))
        stale = self._outbox.waiting() if self._outbox.memory.run != info.id else ()
        for order, update in stale:
            self._post(said.Told(order, update, "discarded"))
        self._outbox.enter(info.id)
        self._keep.enter(info.id)
        if self._keep.lost:
            logger.warning("client=%s private state is lost: %s", self.name, self._keep.lost)
        await self._training.prepare(lambda: self._part.make(info))
        gc.freeze()  # torch and the trainer's data stay: they need not be looked at again
        return {order for order, _ in stale}

    def _hear(self, line: Line, message: wire_pb2.ServerMessage, bulk: Bulk) -> None:
        match message.WhichOneof("kind"):
            case "welcome":
                self._welcomed(line, message.welcome)
            case "order":
                self._ordered(messages.order_from_wire(message.order, bulk))
            case "ask":
                self._post(said.Asked(*messages.ask_from_wire(message.ask)))
            case "receipt":
                self._post(said.Received(message.receipt.update))
            case "outcome":
                told = messages.outcome_from_wire(message.outcome)
                self._post(said.Told(told.order, told.update, told.fate))
            case "evaluate":
                self._spawn(self._training.evaluate(line, message.evaluate))
            case "question":
                question = messages.question_from_wire(message.question)
                if self._part.answering is not None:
                    self._spawn(self._part.answering.answer(line, question))
            case "refusal":
                refused = refusals.error_from_wire(message.refusal)
                self._reject(refused, message.refusal.order)
            case "goodbye":
                bye = message.goodbye
                reason = bounds.text(bye.reason)
                if not bye.done:
                    logger.info("client=%s has no server (%s), trying again", self.name, reason)
                self._post(said.Ended(reason, bye.done, bye.retry_seconds))

    def _ordered(self, order: messages.Order) -> None:
        self._orders[order.id] = order
        self._post(said.Ordered(order.id))

    def _welcomed(self, line: Line, welcome: wire_pb2.Welcome) -> None:
        assert self._training.bench is not None
        agreed = Link(welcome.up_codec, welcome.down_codec)
        self._training.bench.agree(*own_codecs(agreed, self._part.asked))
        line.token, line.run = welcome.session, welcome.run
        line.inline_limit = welcome.inline_limit
        line.bulk = transfer.connect(self.address)
        self.report.reconnections += self._session.failures > 0
        self._line = line
        self._spawn(self._beat(line, welcome.heartbeat_seconds))
        logger.info("client=%s is in the run at %s", self.name, self.address)
        self._post(said.Welcomed(welcome.lease_seconds))

    async def _beat(self, line: Line, seconds: float) -> None:
        while self._line is line:
            await asyncio.sleep(seconds)
            line.say(heartbeat=self._training.beat())

    # ---- delivering ----------------------------------------------------------------------------

    def _deliver(self, update: str) -> None:
        kept, line = self._outbox.get(update), self._line
        if kept is None or line is None:
            return
        result, view = kept
        packed = self._outbox.packed(update)
        if packed is not None and len(view) <= line.inline_limit:
            line.out.put(nested(RESULT_FIELD, *packed))
        else:
            self._spawn(self._upload(line, result, view))

    async def _upload(self, line: Line, result: messages.Result, view: memoryview) -> None:
        def waits(told: AtollError) -> None:
            if result.update not in self._waiting:  # else it was said: it may take hours
                self._waiting.add(result.update)
                words = self.name, result.update, told.message
                logger.warning("client=%s update=%s waits: %s", *words)

        def send() -> None:
            transfer.upload(line.bulk, line.token, line.run, result, view, line.patience, waits)

        try:
            await asyncio.get_running_loop().run_in_executor(self._bulk, send)
            self._waiting.discard(result.update)
            self._post(said.Received(result.update))
        except AtollError as error:
            if self._line is not line:
                return  # the next welcome delivers it again
            if error.code in BROKEN:
                self._post(said.Lost(error.message))
            else:
                self._reject(error, result.order if error.code == "FL-W102" else "")
