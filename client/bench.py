"""Bench and check: how fast this client trains and packs, and whether it fits a run, offline.

The seconds per step measured here are FedCompass's first estimate of a client's speed.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from atoll.client import contract
from atoll.client.local import TorchTrainer
from atoll.client.trainer import Task, Trained, Trainer
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ClientError
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.tensors import flatten, pack

Clock = Callable[[], float]

LONGEST = 1 << 30  # steps of an order, however little they do
WARM = 3  # steps before the clock starts: the first ones allocate, and compile on a GPU


@dataclass(frozen=True, slots=True)
class Bench:
    seconds_per_step: float
    examples_per_second: float
    device: str  # "cpu", "cuda:0"; of a user's own trainer "unknown"
    encode_mb_s: float  # float32 MB of the model packed per second; 0 where no manifest is known


@dataclass(frozen=True, slots=True)
class Check:
    """What `fl-client test` shows of a trainer that works."""

    steps: int
    loss: float | None
    parameters: int  # trainable; of a user's own trainer without a manifest 0
    tensors: int  # that travel
    metrics: Mapping[str, float]  # of `evaluate`


def bench(
    trainer: Trainer,
    seconds: float = 2.0,
    manifest: Manifest | None = None,
    clock: Clock = time.perf_counter,
) -> Bench:
    """Time real steps for about `seconds`; the model is then as it was, and optimizer state too.

    Steps are run in orders that double, so that an order's own cost does not count for much.
    """
    before = _copied(contract.train(trainer, Task(0)).tensors)
    ours = trainer if isinstance(trainer, TorchTrainer) else None
    optimizer = ours.optimizer_state() if ours else {}
    manifest = ours.manifest if ours else manifest
    try:
        steps, examples, elapsed, work = _timed(trainer, seconds, clock)
        encode = _encode_mb_s(manifest, work.tensors, clock) if manifest else 0.0
    finally:
        contract.load(trainer, before)
        if ours:
            ours.load_optimizer_state(optimizer)
    device = str(ours.device) if ours else "unknown"
    return Bench(elapsed / steps, examples / elapsed, device, encode)


def check(trainer: Trainer, manifest: Manifest | None = None) -> Check:
    """Load, train two batches and evaluate, as a run would; the model is then as it was.

    Raises ClientError FL-C103 where the model is not the `manifest`'s, and FL-C104 where the
    trainer fails or breaks its contract.
    """
    before = _copied(contract.train(trainer, Task(0)).tensors)
    own = trainer.manifest if isinstance(trainer, TorchTrainer) else manifest
    if manifest is not None:
        _fits(manifest, own, before)
    contract.load(trainer, before)
    contract.examples(trainer)
    reported: list[int] = []
    work = contract.train(trainer, Task(2, report=reported.append))
    if work.steps != 2 or reported != [1, 2] or work.examples < 1:
        raise ClientError(
            "FL-C104",
            f"asked for 2 steps, the trainer ran {work.steps}, reported {reported} and saw "
            f"{work.examples} examples",
            "run exactly task.steps steps and call task.report(step) after each",
        )
    metrics = contract.evaluate(trainer)
    contract.load(trainer, before)
    parameters = own.counts["trainable"] if own is not None else 0
    return Check(work.steps, work.metrics.get("loss"), parameters, len(before), metrics)


def _timed(trainer: Trainer, seconds: float, clock: Clock) -> tuple[int, int, float, Trained]:
    """(steps, examples, seconds that they took, the last work), after a warm-up."""
    done = contract.train(trainer, Task(WARM)).steps
    steps, examples, elapsed, order = 0, 0, 0.0, 1
    while True:
        start = clock()
        work = contract.train(trainer, Task(order, done))
        elapsed += clock() - start
        if work.steps < 1:
            raise ClientError(
                "FL-C104", f"asked for {order} steps, the trainer ran {work.steps}", "run them all"
            )
        steps, examples, done = steps + work.steps, examples + work.examples, done + work.steps
        if elapsed >= seconds:
            return steps, examples, max(elapsed, 1e-9), work
        order = _next(order, elapsed / steps, seconds - elapsed)


def _next(order: int, step: float, left: float) -> int:
    """Steps of the next order: twice as many, but not past the time that is left."""
    most = min(2 * order, LONGEST)
    return max(1, math.ceil(min(left / step, most))) if step > 0 else most


def _encode_mb_s(manifest: Manifest, tensors: Mapping[str, Tensor], clock: Clock) -> float:
    """The better of three packings, float32."""
    best = math.inf
    for _ in range(3):
        start = clock()
        groups = {g: flatten(manifest, tensors, g) for g in TRAVELLING if manifest.counts[g]}
        _, packed = pack(manifest, groups, codec("fp32"))
        best = min(best, clock() - start)
    return packed.nbytes / 1e6 / best if best > 0 else 0.0


def _fits(manifest: Manifest, own: Manifest | None, tensors: Mapping[str, Tensor]) -> None:
    hint = "give --model the run's model, with the run's data or data of the same shape"
    if own is not None and own is not manifest:
        difference = manifest.difference(own)
        if difference:
            raise ClientError("FL-C103", difference, hint)
    wanted = {t.name: t.shape for t in manifest.tensors if t.group in TRAVELLING}
    for name in sorted({*wanted, *tensors}):
        mine = tuple(tensors[name].shape) if name in tensors else None
        if wanted.get(name) != mine:
            raise ClientError(
                "FL-C103", f"tensor {name!r} is {mine}, the run expects {wanted.get(name)}", hint
            )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
