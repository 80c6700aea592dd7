"""Workers: a crew of several processes, each of which trains its share of the clients.

A client stays with one worker. As soon as one result is asked for, all workers train ahead what
has begun, so that those of a round are trained side by side. Frames, no pickles, go through pipes;
`server/rayworkers.py` sends the same ones to other machines. The results, and so the hash of the
history, are those of one process (with as many threads of torch in each).
"""

import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

from atoll.client.trainer import Trained
from atoll.protocols.errors import ClientError, ServerError
from atoll.server.crew import Job, Start
from atoll.server.trainers import Trainers
from atoll.server.worker import (
    Frame,
    Shapes,
    alike,
    closed,
    packed,
    read,
    result_of,
    shapes_of,
    telling,
    write,
)


class Link(Protocol):
    """The way to one worker."""

    def send(self, frame: Frame) -> None: ...

    def receive(self) -> list[Frame]:
        """The next answers, maybe none yet. ServerError FL-S211 where the worker is gone."""

    def close(self) -> None: ...


class Process:
    """A worker on this machine."""

    def __init__(self, trainers: str, threads: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "atoll.server.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answers: queue.Queue[Frame | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.send(Frame({"trainers": trainers, "threads": threads}))

    def _listen(self) -> None:
        """Take answers as they come: a full pipe would stop a worker that is still being told."""
        assert self._process.stdout is not None
        try:
            while (frame := read(self._process.stdout)) is not None:
                self._answers.put(frame)
        except ValueError:  # closed, or cut off in the middle of a frame
            pass
        self._answers.put(None)

    def send(self, frame: Frame) -> None:
        assert self._process.stdin is not None
        try:
            write(self._process.stdin, frame)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._gone() from None

    def receive(self) -> list[Frame]:
        frame = self._answers.get()
        if frame is None:
            raise self._gone()
        return [frame]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _gone(self) -> ServerError:
        code = self._process.wait()
        return ServerError(
            "FL-S211", f"a worker ended with {code} in the middle of the simulation",
            "see what it said above; --workers 1 shows more",
        )  # fmt: skip


class Workers:
    """A crew over several links. `close` it."""

    def __init__(self, links: Sequence[Link], clients: Sequence[str]) -> None:
        self._links = list(links)
        self._worker = {name: i % len(links) for i, name in enumerate(clients)}
        self._shapes: Shapes = []
        self._begun: dict[str, Job] = {}
        self._anew: dict[str, int] = {}  # order -> how often its client's state has changed since
        self._idle = [True] * len(links)  # nothing begun since it was last told to go
        self._models: list[dict[int, set[str]]] = [{} for _ in links]  # version -> its orders
        self._results: dict[str, tuple[Job, Trained | ClientError]] = {}

    @classmethod
    def of(cls, trainers: Trainers, processes: int, threads: int = 1) -> "Workers":
        """So many processes on this machine."""
        spec = trainers.dumps()
        return cls([Process(spec, threads) for _ in range(processes)], trainers.clients)

    def begin(self, job: Job, start: Start) -> None:
        at = self._worker[job.client]
        orders = self._models[at].get(job.version)
        if orders is None:
            self._send_model(at, job, start)
            orders = self._models[at].setdefault(job.version, set())
        orders.add(job.order)
        self._begun[job.order] = job
        self._idle[at] = False
        head, body = telling(job)
        self._links[at].send(Frame({"kind": "begin"} | head, body))

    def trained(self, job: Job, start: Start) -> Trained:
        begun = self._begun[job.order]
        if not alike(begun.latest, job.latest):  # what was made ahead measured by a former state
            self._begun[job.order] = job
            self._anew[job.order] = self._anew.get(job.order, 0) + 1
            self._results.pop(job.order, None)
        if not self._has(job):
            for at, link in enumerate(self._links):
                if not self._idle[at]:
                    link.send(Frame({"kind": "go"}))
                    self._idle[at] = True
            link = self._links[self._worker[job.client]]
            head, body = telling(job)
            anew = self._anew.get(job.order, 0)
            link.send(Frame({"kind": "want", "anew": anew} | head, body))
            while not self._has(job):
                for frame in link.receive():
                    self._take(frame)
        made = self._results[job.order][1]
        if isinstance(made, ClientError):
            raise made
        return made

    def forget(self, order: str) -> None:
        self._results.pop(order, None)
        self._anew.pop(order, None)
        job = self._begun.pop(order, None)
        if job is None:
            return
        at = self._worker[job.client]
        self._links[at].send(Frame({"kind": "forget", "order": order}))
        orders = self._models[at][job.version]
        orders.discard(order)
        if not orders:
            del self._models[at][job.version]
            self._links[at].send(Frame({"kind": "drop", "version": job.version}))

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _has(self, job: Job) -> bool:
        found = self._results.get(job.order)
        return found is not None and found[0] == job

    def _send_model(self, at: int, job: Job, start: Start) -> None:
        tensors = start()
        if not self._shapes:
            self._shapes = shapes_of(tensors)
            for link in self._links:
                link.send(Frame({"kind": "shapes", "shapes": self._shapes}))
        beside, body = closed(extras=job.extras)
        head = {"kind": "model", "version": job.version} | beside
        self._links[at].send(Frame(head, packed(self._shapes, tensors) + body))

    def _take(self, frame: Frame) -> None:
        job = Job(**frame.head["job"])
        if job.order not in self._begun or frame.head["anew"] != self._anew.get(job.order, 0):
            return  # forgotten while it was being trained, or wanted anew
        if "error" in frame.head:
            self._results[job.order] = (job, ClientError(*frame.head["error"]))
        else:
            self._results[job.order] = (job, result_of(self._shapes, frame))
