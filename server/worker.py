"""Worker: the half of `server/workers.py` that trains, in a process or a machine of its own.

    python -m atoll.server.worker     frames on stdin, frames on stdout

A frame is a line of JSON and so many bytes as it says under "bytes": a model's tensors one after
another, in the order of its manifest, and then those that it lists under "beside", by names such as
"state/control/c": vectors that go with a model or an update, and a client's private state.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from atoll.client.algorithm import BUILTIN
from atoll.client.local import TorchTrainer
from atoll.client.trainer import Tensors, Trained
from atoll.protocols.errors import AtollError
from atoll.server.crew import Job, Together
from atoll.server.trainers import Trainers

Shapes = list[tuple[str, list[int], str]]  # name, shape, dtype of each tensor that travels
State = Mapping[str, Tensors]  # by kind


class Frame(NamedTuple):
    head: Mapping[str, Any]  # "kind" says what it is
    body: bytes = b""


class Worker:
    """What it is sent, and what it answers: no sockets, no clock, whatever carries the frames.

    `begin` an order, with its model where that is new; `go`: train ahead all that can be; `want`:
    answer with this order; `forget` it. What was sent once is not sent again, unless it is wanted
    `anew`, since its client's state has changed meanwhile.
    """

    def __init__(self, trainers: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._crew = Together(Trainers.loads(trainers).make)
        self._shapes: Shapes = []
        self._models: dict[int, dict[str, Tensor]] = {}  # version -> tensors
        self._extras: dict[int, Tensors] = {}  # version -> what came beside them
        self._begun: dict[str, Job] = {}
        self._sent: dict[str, Job] = {}

    def handle(self, frame: Frame) -> list[Frame]:
        head = frame.head
        match head["kind"]:
            case "shapes":
                self._shapes = head["shapes"]
            case "model":
                version, at = head["version"], length_of(self._shapes)
                self._models[version] = unpacked(self._shapes, frame.body[:at])
                self._extras[version] = opened(head, frame.body[at:])["extras"]
            case "drop":
                self._models.pop(head["version"], None)
                self._extras.pop(head["version"], None)
            case "begin":
                job = self._job(frame)
                self._begun[job.order] = job
                self._crew.begin(job, lambda: self._models[job.version])
            case "forget":
                self._crew.forget(head["order"])
                self._begun.pop(head["order"], None)
                self._sent.pop(head["order"], None)
            case "go":
                ahead = [job for job in self._begun.values() if self._ahead(job)]
                return [answer for job in ahead for answer in self._answer(job)]
            case "want":
                job = self._job(frame)
                if head["anew"]:
                    self._crew.forget(job.order)
                    self._sent.pop(job.order, None)
                return self._answer(job, head["anew"])
        return []

    def _job(self, frame: Frame) -> Job:
        """As it was told; its vectors came with its model, its state only where it has any."""
        job = Job(**frame.head["job"])
        own = opened(frame.head, frame.body)
        state, latest = by_kind(own["state"]), by_kind(own["latest"])
        return replace(
            job, extras=self._extras.get(job.version, {}), own=own["own"], state=state,
            latest=latest if frame.head["newer"] else state, life=frame.head["life"],
        )  # fmt: skip

    def _ahead(self, job: Job) -> bool:
        """Whether it may be trained before it is asked for: its trainer keeps nothing from order
        to order but what is told here.
        """
        trainer = self._crew.trainer(job.client)
        return (
            isinstance(trainer, TorchTrainer)
            and f"{type(trainer.algorithm).__module__}:{type(trainer.algorithm).__qualname__}"
            in BUILTIN.values()
            and not trainer.config.keep_optimizer_state
        )

    def _answer(self, job: Job, anew: int = 0) -> list[Frame]:
        if self._sent.get(job.order) == job:
            return []
        self._sent[job.order] = job
        head: dict[str, Any] = {"kind": "result", "job": told(job), "anew": anew}
        try:
            made = self._crew.trained(job, lambda: self._models[job.version])
        except AtollError as error:
            return [Frame(head | {"error": [error.code, error.message, error.hint]})]
        head |= {"steps": made.steps, "examples": made.examples, "metrics": dict(made.metrics)}
        head |= {"said": dict(made.said)}
        beside, body = closed(extras=made.extras, state=flat_of(made.state))
        return [Frame(head | beside, packed(self._shapes, made.tensors) + body)]


def told(job: Job) -> dict[str, Any]:
    """All that makes it the same job."""
    made = {f.name: getattr(job, f.name) for f in fields(job) if f.compare}
    return made | {"extra": dict(job.extra)}


def telling(job: Job) -> tuple[dict[str, Any], bytes]:
    """Head and body that make the job on the other side, but for what goes with its model."""
    newer = not alike(job.state, job.latest)
    latest = flat_of(job.latest) if newer else {}
    beside, body = closed(state=flat_of(job.state), latest=latest, own=job.own)
    return {"job": told(job), "life": job.life, "newer": newer} | beside, body


def alike(one: State, other: State) -> bool:
    """Whether two states are the same, number for number."""
    return one.keys() == other.keys() and all(
        one[kind].keys() == other[kind].keys()
        and all(torch.equal(one[kind][n], other[kind][n]) for n in one[kind])
        for kind in one
    )


def flat_of(state: State) -> Tensors:
    return {f"{kind}/{name}": t for kind, named in state.items() for name, t in named.items()}


def by_kind(tensors: Tensors) -> State:
    found: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        kind, _, name = path.partition("/")
        found.setdefault(kind, {})[name] = tensor
    return found


def closed(**groups: Tensors) -> tuple[dict[str, Any], bytes]:
    """Tensors that go beside a model's: what a head says of them, and their bytes."""
    named = {f"{group}/{name}": t for group, own in groups.items() for name, t in own.items()}
    shapes = shapes_of(named)
    return {"beside": shapes}, packed(shapes, named)


def opened(head: Mapping[str, Any], body: bytes) -> Mapping[str, Tensors]:
    """What `closed` was given; a group that is not there is empty."""
    found: dict[str, dict[str, Tensor]] = {"extras": {}, "state": {}, "latest": {}, "own": {}}
    for path, tensor in unpacked(head["beside"], body).items():
        group, _, name = path.partition("/")
        found[group][name] = tensor
    return found


def length_of(shapes: Shapes) -> int:
    """Bytes of such tensors."""
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for _, shape, dtype in shapes)


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return [(n, list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()]


def packed(shapes: Shapes, tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors' bytes, in the order of `shapes`."""
    parts = [
        tensors[name].detach().contiguous().view(-1).view(torch.uint8) for name, _, _ in shapes
    ]
    return b"".join(part.numpy().tobytes() for part in parts)


def unpacked(shapes: Shapes, body: bytes) -> dict[str, Tensor]:
    found, at, whole = {}, 0, bytearray(body)  # writable, as torch wants it
    for name, shape, dtype in shapes:
        kind, count = getattr(torch, dtype), math.prod(shape)
        if count:  # torch makes none of no bytes
            found[name] = torch.frombuffer(whole, dtype=kind, count=count, offset=at).view(shape)
        else:
            found[name] = torch.empty(shape, dtype=kind)
        at += count * kind.itemsize
    return found


def result_of(shapes: Shapes, frame: Frame) -> Trained:
    head, at = frame.head, length_of(shapes)
    tensors, beside = unpacked(shapes, frame.body[:at]), opened(head, frame.body[at:])
    return Trained(
        tensors, head["steps"], head["examples"], head["metrics"], by_kind(beside["state"]),
        beside["extras"], head["said"],
    )  # fmt: skip


# ---- frames ----------------------------------------------------------------------------------


def write(stream: IO[bytes], frame: Frame) -> None:
    stream.write(json.dumps(dict(frame.head) | {"bytes": len(frame.body)}).encode() + b"\n")
    stream.write(frame.body)


def read(stream: IO[bytes]) -> Frame | None:
    """The next frame; None at the end."""
    line = stream.readline()
    if not line:
        return None
    head = json.loads(line)
    return Frame(head, stream.read(head.pop("bytes")))


def main() -> None:
    commands, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a user's module prints is no frame
    first = read(commands)
    assert first is not None, "the trainers come first"
    worker = Worker(first.head["trainers"], first.head["threads"])
    while (frame := read(commands)) is not None:
        for answer in worker.handle(frame):
            write(answers, answer)
        answers.flush()


if __name__ == "__main__":
    main()
