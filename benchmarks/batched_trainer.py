"""Batched trainer: a simulated round's local training, all clients at once against one at a time.

100 clients of MNIST, batch 32, 20 steps of SGD each, on one thread: the MLP 196-32-10 on pictures
pooled to 14x14 (the specs' small recipe), which is held, and 784-64-10 on whole ones, which is
reported: there the products alone are a sixth of what one client at a time takes. Seconds are of
processor time, the best of several rounds. `value` is how many times as fast the batched trainer
is; both give the same bits, or the benchmark fails.
"""

import time
from pathlib import Path

import harness
import torch

from atoll.client import stacked
from atoll.client.data import Data, DataInfo, Split, load_data
from atoll.client.local import LocalConfig, TorchTrainer, trainer_on
from atoll.client.partition import shards_of
from atoll.client.trainer import Task, Trained

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
CLIENTS, STEPS, LIMIT = 100, 20, 10.0


def run(quick: bool) -> harness.Result:
    torch.set_num_threads(1)
    if not MNIST.is_dir():
        harness.say(f"skipped: no MNIST in {MNIST}")
        return harness.Result("batched_trainer", LIMIT, "times", LIMIT, better="higher",
                              more={"skipped": True})  # fmt: skip
    whole = load_data(f"mnist:{MNIST}")
    rounds = 4 if quick else 12
    small = compared(pooled(whole), "mlp:hidden=32", rounds)
    large = compared(whole, "mlp:hidden=64", rounds)
    return harness.Result(
        "batched_trainer", small["times"], "times", LIMIT, better="higher",
        ok=bool(small["same_bits"] and large["same_bits"]),
        more={"196-32-10": small, "784-64-10": large},
    )  # fmt: skip


def compared(data: Data, model: str, rounds: int) -> dict[str, float]:
    """Microseconds a client's step takes, both ways."""
    parts = shards_of(data, "iid", CLIENTS, 0)
    local = LocalConfig(lr=0.1, batch=32, device="cpu")
    trainers = [
        trainer_on(data.shard(rows), data, model, 0, local, client=f"c{i}")
        for i, rows in enumerate(parts)
    ]
    start = {name: t.clone() for name, t in trainers[0].export().items()}
    works = [stacked.Work(trainer, start, Task(STEPS)) for trainer in trainers]
    one, many = float("inf"), float("inf")
    for _ in range(rounds):  # in turn
        began = time.process_time()
        alone = [single(work.trainer, work) for work in works]
        middle = time.process_time()
        together = stacked.train(works)
        one, many = min(one, middle - began), min(many, time.process_time() - middle)
    same = all(b is not None and equal(a, b) for a, b in zip(alone, together, strict=True))
    scale = 1e6 / (CLIENTS * STEPS)
    return {
        "times": round(one / many, 2),
        "one_us": round(one * scale, 1),
        "batched_us": round(many * scale, 1),
        "same_bits": same,
    }


def single(trainer: TorchTrainer, work: stacked.Work) -> Trained:
    trainer.load(work.start)
    return trainer.train(work.task)


def equal(a: Trained, b: Trained) -> bool:
    return a.metrics == b.metrics and all(
        torch.equal(b.tensors[n], t) for n, t in a.tensors.items()
    )


def pooled(data: Data) -> Data:
    """14x14: means of 2x2 pixels."""

    def half(split: object) -> Split:
        assert isinstance(split, Split)
        raw = torch.nn.functional.avg_pool2d(split.raw.to(torch.float32), 2)
        return Split(raw, split.y, split.mean, split.std, split.scale)

    return Data(DataInfo((1, 14, 14), 10), half(data.train), half(data.test))


if __name__ == "__main__":
    harness.main(run)
