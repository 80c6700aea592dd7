"""Behalf: a peer whose local work others do, as the clients of a server in the same process.

The peer lives in a thread and a loop of its own. What the others did comes in by `average`, from
any other thread, and goes into the peers' next mean as this peer's contribution; what comes back is
the model that the peers made of it.

    behalf = Behalf(folder, invite)
    manifest = behalf.start()                       # it has joined
    answer = behalf.average(anchor, mean)           # blocks, until the peers' round is over
    behalf.stop()                                   # with a goodbye
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atoll.aggregation.outer import Outer, outer
from atoll.aggregation.sync_engine import SyncEngine, SyncState
from atoll.client.data import load_data
from atoll.client.models import build, manifest_of
from atoll.p2p.invite import Invite
from atoll.p2p.manifest import Manifest
from atoll.p2p.peer import LISTEN, Peer
from atoll.p2p.work import Facts, Progress, Trained, facts_of, vector_only
from atoll.protocols.errors import PeerError
from atoll.protocols.tensors import flatten


@dataclass(frozen=True)
class Answer:
    state: SyncState  # the peers' model now
    counted: bool  # the work is in it, as far as this peer knows


class Behalf:
    """One `average` at a time."""

    def __init__(
        self, folder: Path, invite: Invite, *, name: str = "", listen: tuple[str, ...] = LISTEN
    ) -> None:
        self._peer: Peer | None = None
        self._folder, self._invite, self._name, self._listen = folder, invite, name, listen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="peer")
        self._life: Future[None] = Future()
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._training: _Training | None = None
        self._manifest: Manifest | None = None
        self._stopping = False

    def start(self) -> Manifest:
        """Blocks until the run is known. PeerError where it cannot be."""
        self._life = self._thread.submit(lambda: asyncio.run(self._run()))
        self._life.add_done_callback(lambda life: self._notify())
        with self._changed:
            self._changed.wait_for(lambda: self._manifest is not None or self._life.done())
            self._raise_if_over()
            assert self._manifest is not None, "it is over, or it has one"
            return self._manifest

    @property
    def state(self) -> SyncState:
        """The peers' model, as this one knows it."""
        assert self._training is not None, "start it first"
        return self._training.engine.state

    def average(self, base: Tensor, delta: Tensor) -> Answer | None:
        """Give what was trained from `base` into the peers' mean, and wait for their next model.

        Where `base` is not their model any more, nothing is given, and the answer is their newest.
        PeerError where this peer or the peers' run has ended. None after `interrupt`.
        """
        training = self._training
        assert training is not None, "start it first"
        with self._changed:
            self._raise_if_over()
            state, before = training.engine.state, self._joined()
            if not torch.equal(base, state.anchor):
                return Answer(state, False)
            training.offer(state, delta)
            self._changed.wait_for(
                lambda: training.engine.state is not state or self._life.done() or self._stopping
            )
            if training.engine.state is state:
                self._raise_if_over()
                return None
            return Answer(training.engine.state, self._joined() > before)

    def interrupt(self) -> None:
        """Let go of whoever waits in `average`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def stop(self, seconds: float = 20.0) -> None:
        """Leave the peers with a goodbye."""
        self.interrupt()
        if self._loop is not None and self._peer is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                self._loop.call_soon_threadsafe(self._peer.leave)
        with contextlib.suppress(Exception):  # told where somebody waited
            self._life.result(seconds)
        self._thread.shutdown(wait=False)

    def _joined(self) -> int:
        return self._peer.joined if self._peer is not None else 0

    def _raise_if_over(self) -> None:
        if self._life.done():
            self._life.result()
            raise PeerError(
                "FL-P409", "the peers' run is over", "its model is the newest version here"
            )

    # ---- in the peer's thread ------------------------------------------------------------------

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._peer = Peer(
            self._folder, self._invite, name=self._name, listen=self._listen, training=self._made
        )
        await self._peer.run()

    def _made(self, manifest: Manifest, me: str) -> "_Training":
        """In a worker thread of the peer's."""
        assert self._loop is not None
        training = _Training(manifest, self._loop, self._notify)
        with self._changed:
            self._training, self._manifest = training, manifest
            self._changed.notify_all()
        return training

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Engine(SyncEngine):
    """One that says when its state is another."""

    def __init__(self, outer: Outer, anchor: Tensor, changed: Callable[[], None]) -> None:
        super().__init__(outer, anchor)
        self._tell = changed

    def commit(self, mean: Tensor) -> SyncState:
        state = super().commit(mean)
        self._tell()
        return state

    def load(self, state: SyncState) -> None:
        super().load(state)
        self._tell()


class _Training:
    """The driver's `Training`: it waits for work that was done from the engine's state."""

    def __init__(
        self, manifest: Manifest, loop: asyncio.AbstractEventLoop, changed: Callable[[], None]
    ) -> None:
        module = build(manifest.model, load_data(manifest.data).info, manifest.seed)
        shapes = vector_only(manifest_of(module))
        named = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        vector = flatten(shapes, named, "trainable")
        self.facts: Facts = facts_of(shapes, named)
        self.engine = _Engine(outer(manifest.outer), vector, changed)
        self._speed, self._loop = manifest.speed, loop
        self._offered: tuple[SyncState, Tensor] | None = None
        self._news = asyncio.Event()

    def offer(self, state: SyncState, delta: Tensor) -> None:
        """From another thread."""
        self._offered = state, delta
        self._loop.call_soon_threadsafe(self._news.set)

    async def train(self, steps: int, progress: Progress | None = None) -> Trained:
        while True:
            self._news.clear()
            offered = self._offered
            if offered is not None and offered[0] is self.engine.state:
                return Trained(offered[1], 1.0, steps, 0, float("nan"), 0.0)
            await self._news.wait()

    def bench(self, seconds: float = 1.0) -> float:
        """A whole share: a server is one peer, however many clients it has."""
        return self._speed

    def close(self) -> None:
        pass
