"""Questions: models that clients judge in the middle of a merge, on their way out and back.

The merging thread asks and waits; everything else happens in the loop's. Who is asked, and when it
is enough, is decided by `atoll.aggregation.validated`. An answer is checked as an update is, and
one that cannot be used costs its client its say, not its place in the run.
"""

import asyncio
import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.aggregation.aggregator import AskingRule
from atoll.aggregation.asking import Answer
from atoll.aggregation.proxy import InterruptedMergeError
from atoll.aggregation.validated import (
    Action,
    Answered,
    Asked,
    Began,
    Came,
    Count,
    Done,
    Event,
    Expired,
    Failed,
    Left,
    Passed,
    Refused,
    Send,
    Silent,
    Validators,
    Verdict,
    Wait,
)
from atoll.protocols import bounds, messages, wire_pb2
from atoll.protocols.blobs import INLINE, Blob, BlobInfo, Section
from atoll.protocols.codecs import FP32, all_finite, as_tensor
from atoll.protocols.errors import RemoteError
from atoll.protocols.frames import checksums
from atoll.protocols.manifest import Manifest
from atoll.protocols.messages import LOSS, NOTHING, VALIDATE, Question, Result
from atoll.protocols.tensors import pack
from atoll.server import plausible
from atoll.server.outgoing import Traffic
from atoll.server.sessions import Session, Sessions
from atoll.server.uploads import StoredUpdate, Uploads

logger = logging.getLogger(__name__)

Row = Mapping[str, object]
Found = Sequence[tuple[Count, StoredUpdate | None]]  # who answered, and its gradient
Waiting = Future[Found | None]  # None: too few did


@dataclass(frozen=True, slots=True)
class Around:
    """What the loop's half needs of the run."""

    sessions: Sessions
    uploads: Uploads
    counted: Callable[[str], Traffic]  # of a client
    note: Callable[[Row], None]  # for the history


class Questions:
    """An `Asker`, of a run that asks or not. `listen` once in the loop, before clients come."""

    def __init__(self, manifest: Manifest, most_examples: int = 0) -> None:
        """`most_examples` that a client may claim; 0: no bound."""
        self.machine = Validators()
        self.wanted = False  # a rule asks
        self._manifest, self._most = manifest, most_examples
        self._batch_statistics = True
        count = manifest.counts["trainable"]
        self._slope = (Section("trainable", FP32.name, count, 4 * count),)
        self._around: Around | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._future: Waiting | None = None  # of the open question
        self._blob: Blob | None = None  # the model that it is about
        self._gradient = False
        self._numbers = itertools.count(1)
        self._ids: dict[str, str] = {}  # client -> what the open question is called to it
        self._stored: dict[str, StoredUpdate] = {}  # client -> its gradient
        self._timer: asyncio.TimerHandle | None = None
        self._said = ""  # why nothing was learned, the last time

    def ask_for(self, rule: AskingRule) -> None:
        """Ask as this rule wants it."""
        self.machine = Validators(rule.panel, rule.deadline, rule.seed)
        self.wanted, self._batch_statistics = True, rule.buffers == "recompute"

    # ---- the merging thread ------------------------------------------------------------------

    def begin(self) -> None:
        assert self._loop is not None, "a run that merges has begun"
        self._loop.call_soon_threadsafe(self._handle, Began())

    def ask(
        self, model: Tensor, buffers: Mapping[str, Tensor], gradient: bool
    ) -> Sequence[Answer] | None:
        assert self._loop is not None, "a run that merges has begun"
        groups = {"trainable": model, **buffers}
        sections, view = pack(self._manifest, groups, FP32)
        digest = hashlib.sha256(view).digest()
        info = BlobInfo(f"ask/{next(self._numbers)}", len(view), digest, sections)
        blob = Blob(info, view.toreadonly(), checksums(view))
        future: Waiting = Future()
        self._loop.call_soon_threadsafe(self._put, future, blob, gradient)
        found = future.result()
        return None if found is None else [_read(count, stored) for count, stored in found]

    def done(self) -> None:
        """Nobody reads the answers any more, and those still on their way are not wanted."""
        assert self._around is not None
        for name in list(self._ids.values()):
            self._around.uploads.free(name)

    # ---- the loop ----------------------------------------------------------------------------

    def listen(self, around: Around, members: Iterable[str]) -> None:
        """`members` of a run that goes on: they may come back."""
        self._around, self._loop = around, asyncio.get_running_loop()
        for client in members:
            if client not in self.machine.here:
                self._handle(Silent(client))

    def interrupt(self) -> None:
        self._stopped = True
        if self._future is not None and not self._future.done():
            self._future.set_exception(InterruptedMergeError())
        if self._timer is not None:
            self._timer.cancel()

    def came(self, client: str, capabilities: Sequence[str]) -> None:
        self._handle(Came(client, VALIDATE in capabilities))

    def silent(self, client: str) -> None:
        if client in self.machine.here:
            self._handle(Silent(client))

    def left(self, client: str) -> None:
        self._handle(Left(client))

    def declined(self, client: str, failure: wire_pb2.Failure) -> None:
        """It says why it does not judge models."""
        if self._ids.get(client) == failure.question:
            why = f"{bounds.text(failure.code, 16)}: {bounds.text(failure.message, 200)}"
            self._refuse(client, f"it declines: {why}")

    def awaited(self) -> set[str]:
        """What the open question is called, as `Run.awaited` of orders."""
        return set(self._ids.values())

    def blob(self, client: str, name: str) -> Blob | None:
        """The model of the open question."""
        blob = self._blob
        return blob if blob is not None and blob.info.id == name and client in self._ids else None

    def may_upload(self, client: str, result: Result) -> str | None:
        """As `Bulk` wants it: the id to store an answer under, None where it is here. RemoteError
        FL-W102 where nobody waits for it, FL-W104 where it does not fit."""
        if not self._awaits(client, result):
            if client in self._stored and self._ids.get(client) == result.question:
                return None
            raise RemoteError(
                "FL-W102", f"question {result.question} is closed", "forget the answer"
            )
        with self._noted(client):
            self._check(result)
        return result.update

    def inline(self, session: Session, result: Result) -> None:
        """An answer on the control stream; nobody is told what became of it."""
        client = session.client
        with contextlib.suppress(RemoteError):
            if self._awaits(client, result) and LOSS not in result.metrics:
                self._handle(Passed(client))
                return
            if self.may_upload(client, result) is None:
                return
            with self._noted(client):
                stored = self._uploads.keep(result.update, result.inline)
                norm = self._norm(result, stored)
            self._take(client, result, stored, norm)

    async def accepted(self, client: str, result: Result, stored: StoredUpdate) -> None:
        """All bytes of an answer are here. RemoteError FL-W106 where they are not finite."""
        loop = asyncio.get_running_loop()
        with self._noted(client):
            norm = await loop.run_in_executor(None, self._norm, result, stored)
        self._take(client, result, stored, norm)

    # ---- below -------------------------------------------------------------------------------

    @property
    def _uploads(self) -> Uploads:
        assert self._around is not None
        return self._around.uploads

    def _awaits(self, client: str, result: Result) -> bool:
        machine = self.machine
        known = self._ids.get(client) == result.question
        return known and machine.open and client in machine.waiting

    def _put(self, future: Waiting, blob: Blob, gradient: bool) -> None:
        """A merge asks."""
        if self._stopped:
            future.set_exception(InterruptedMergeError())
            return
        self._future, self._blob, self._gradient = future, blob, gradient
        self._ids.clear()
        self._stored.clear()
        try:
            self._handle(Asked(gradient))
        except Exception as error:  # noqa: BLE001  # the merge hears of it, and ends the run
            future.set_exception(error)

    def _handle(self, event: Event) -> None:
        if self._loop is None:
            self.machine.handle(event, 0.0)
            return
        for action in self.machine.handle(event, self._loop.time()):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        assert self._loop is not None
        match action:
            case Send(client):
                self._send(client)
            case Wait(question, at):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(at, self._handle, Expired(question))
            case Done(_, counts):
                self._said = ""
                self._close([(count, self._stored.get(count.client)) for count in counts])
            case Failed(_, reason):
                if reason != self._said:
                    logger.warning("nothing is learned in this merge: %s", reason)
                    self._note({"kind": "unjudged", "reason": reason})
                self._said = reason
                self._close(None)

    def _send(self, client: str) -> None:
        assert self._around is not None
        assert self._blob is not None
        session = self._around.sessions.of.get(client)
        if session is None:
            return  # it will come back, and be asked then
        if client not in self._ids:
            self._ids[client] = f"q{next(self._numbers)}"
        info, view = self._blob.info, self._blob.view
        question = Question(
            self._ids[client], info, bytes(view) if info.size <= INLINE else b"", self._gradient,
            self._batch_statistics, self.machine.seconds,
        )  # fmt: skip
        self._around.counted(client).down += info.size
        session.send(wire_pb2.ServerMessage(question=messages.question_to_wire(question)))

    def _close(self, answers: Found | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._blob = None
        assert self._future is not None
        if not self._future.done():
            self._future.set_result(answers)

    def _check(self, result: Result) -> None:
        """Before its bytes are here."""
        if LOSS not in result.metrics or result.examples < 1:
            raise RemoteError(
                "FL-W101",
                f"malformed message: an answer with metrics {sorted(result.metrics)[:5]} on "
                f"{result.examples} examples",
                "say the loss, and on how many examples it is the mean",
            )
        wanted = self._slope if self._gradient else ()
        if result.payload.sections != wanted:
            raise RemoteError(
                "FL-W104",
                f"an answer with sections {result.payload.sections}"[:200],
                f"send {wanted}",
            )

    def _norm(self, result: Result, stored: StoredUpdate) -> float:
        """Of its gradient; RemoteError where it is not all here, or not finite."""
        if result.payload == NOTHING:
            return 0.0
        if stored.size != result.payload.size:
            raise RemoteError("FL-W104", f"{stored.size} bytes inline", "send them all, or a blob")
        slope = as_tensor(stored.view(), torch.float32)
        if not all_finite(slope):
            raise RemoteError(
                "FL-W106", "its gradient has values that are not finite", "decline instead"
            )
        return float(torch.linalg.vector_norm(slope, dtype=torch.float64))

    def _take(self, client: str, result: Result, stored: StoredUpdate, norm: float) -> None:
        if not self._awaits(client, result):
            self._uploads.free(result.update)  # the time was up while it was checked
            return
        assert self._around is not None
        self._around.counted(client).up += result.payload.size
        if self._gradient:
            self._stored[client] = stored
        examples = plausible.examples(result.examples, self._most)
        verdict = Verdict(result.metrics[LOSS], examples, norm)
        self._handle(Answered(client, self.machine.question, verdict))

    @contextlib.contextmanager
    def _noted(self, client: str) -> Iterator[None]:
        """Whose answer is refused in it is not asked again."""
        try:
            yield
        except RemoteError as error:
            self._refuse(client, str(error))
            raise

    def _refuse(self, client: str, reason: str) -> None:
        """It is not asked again before its next hello."""
        logger.warning("client=%s judges no models: %s", client, reason)
        self._note({"kind": "not-asked", "client": client, "reason": reason})
        self._handle(Refused(client, reason))

    def _note(self, row: Row) -> None:
        if self._around is not None:
            self._around.note(row)


def _read(count: Count, stored: StoredUpdate | None) -> Answer:
    return Answer(count, None if stored is None else as_tensor(stored.view(), torch.float32))
