"""Worker: the half of `server/workers.py` that trains, in a process or a machine of its own.

    python -m atoll.server.worker     frames on stdin, frames on stdout

A frame is a line of JSON and so many bytes as it says under "bytes": a model's tensors one after
another, in the order of its manifest.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from atoll.client.algorithm import FedProx, Plain
from atoll.client.local import TorchTrainer
from atoll.client.trainer import Trained
from atoll.protocols.errors import AtollError
from atoll.server.crew import Job, Together
from atoll.server.trainers import Trainers

Shapes = list[tuple[str, list[int], str]]  # name, shape, dtype of each tensor that travels


class Frame(NamedTuple):
    head: Mapping[str, Any]  # "kind" says what it is
    body: bytes = b""


class Worker:
    """What it is sent, and what it answers: no sockets, no clock, whatever carries the frames.

    `begin` an order, with its model where that is new; `go`: train ahead all that can be; `want`:
    answer with this order; `forget` it. What was sent once is not sent again.
    """

    def __init__(self, trainers: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._crew = Together(Trainers.loads(trainers).make)
        self._shapes: Shapes = []
        self._models: dict[int, dict[str, Tensor]] = {}  # version -> tensors
        self._begun: dict[str, Job] = {}
        self._sent: dict[str, Job] = {}

    def handle(self, frame: Frame) -> list[Frame]:
        head = frame.head
        match head["kind"]:
            case "shapes":
                self._shapes = head["shapes"]
            case "model":
                self._models[head["version"]] = unpacked(self._shapes, frame.body)
            case "drop":
                self._models.pop(head["version"], None)
            case "begin":
                job = Job(**head["job"])
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
                return self._answer(Job(**head["job"]))
        return []

    def _ahead(self, job: Job) -> bool:
        """Whether it may be trained before it is asked for: its trainer keeps nothing from order
        to order.
        """
        trainer = self._crew.trainer(job.client)
        return (
            isinstance(trainer, TorchTrainer)
            and type(trainer.algorithm) in (Plain, FedProx)
            and not trainer.config.keep_optimizer_state
        )

    def _answer(self, job: Job) -> list[Frame]:
        if self._sent.get(job.order) == job:
            return []
        try:
            made = self._crew.trained(job, lambda: self._models[job.version])
        except AtollError as error:
            said = [error.code, error.message, error.hint]
            return [self._sending(job, Frame({"error": said}))]
        head = {"steps": made.steps, "examples": made.examples, "metrics": dict(made.metrics)}
        return [self._sending(job, Frame(head, packed(self._shapes, made.tensors)))]

    def _sending(self, job: Job, frame: Frame) -> Frame:
        self._sent[job.order] = job
        return Frame({"kind": "result", "job": told(job)} | dict(frame.head), frame.body)


def told(job: Job) -> dict[str, Any]:
    """All that makes it the same job."""
    made = {f.name: getattr(job, f.name) for f in fields(job) if f.compare}
    return made | {"extra": dict(job.extra)}


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
    head = frame.head
    tensors = unpacked(shapes, frame.body)
    return Trained(tensors, head["steps"], head["examples"], head["metrics"])


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
