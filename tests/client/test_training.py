"""Training as the event loop sees it: what a trainer says of its progress ends nothing."""

import asyncio
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from atoll.client import session_events as said
from atoll.client.outbox import Outbox
from atoll.client.trainer import Task, Trained
from atoll.client.training import Report, Training
from atoll.client.work import Workbench
from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.codecs import codec
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.messages import Order

MANIFEST = Manifest((TensorSpec("w", (2,), "float32", "trainable"),))
STEPS = 4


class Telling:
    """A trainer that first tells a true step, then something odd; `beats` are what went out."""

    def __init__(self, odd: object) -> None:
        self.odd = odd
        self.beats: list[int] = []
        self.training: Training | None = None
        self.values: Mapping[str, Tensor] = {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.values = {name: value.clone() for name, value in tensors.items()}

    def train(self, task: Task) -> Trained:
        assert self.training is not None
        for step in (2, self.odd):
            task.report(step)  # type: ignore[arg-type]
            self.beats.append(self.training.beat().step)
        return Trained(self.values, task.steps, task.steps, {})

    def evaluate(self) -> Mapping[str, float]:
        return {}


async def trained(trainer: Telling) -> said.Event:
    """The last event of an order."""
    heard: list[said.Event] = []
    over = asyncio.Event()

    def post(event: said.Event) -> None:
        heard.append(event)
        if not isinstance(event, said.Fetched):
            over.set()

    loop = asyncio.get_running_loop()
    training = Training("a", Report(), post, lambda: None, lambda: loop)
    trainer.training = training
    fp32 = codec("fp32")
    await training.prepare(lambda: Workbench(trainer, MANIFEST, fp32, fp32, Outbox(None)))
    info = BlobInfo("v3/fp32", 8, b"", (Section("trainable", "fp32", 2, 8),))
    training.begin(Order("o1", 0, 3, STEPS, info, bytes(8), {}), None)
    await over.wait()
    training.close()
    return heard[-1]


@pytest.mark.parametrize(
    ("odd", "step"),
    [
        (3, 3),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (2.5, 2),
        (10**20, STEPS),
        (-1, 0),
        (float("nan"), 2),
        (float("inf"), 2),
        (None, 2),
        ("half", 2),
        (torch.zeros(2), 2),
    ],
)
def test_a_progress_that_cannot_be_is_bounded_or_passed_over(odd: object, step: int) -> None:
    """protobuf refused it: the heartbeats ended, and the server expelled the client."""
    trainer = Telling(odd)
    assert asyncio.run(trained(trainer)) == said.Finished("o1", "o1.0")
    assert trainer.beats == [2, step]
