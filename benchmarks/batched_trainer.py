"""Batched trainer: a simulated round's local training, all clients at once against one at a time.

100 clients of MNIST (600 examples each) and one pass in batches of 10, as in the paper of FedAvg
(https://arxiv.org/abs/1602.05629, E = 1, B = 10), with the MLP 196-32-10 on pictures pooled to
14x14, the specs' small recipe: that is held. Reported besides, both with batches of 32: the same
MLP, and 784-64-10 on whole pictures, where the products alone are a sixth of what one client at a
time takes. One thread; seconds are of processor time, taken in turn in pieces of a few clients, of
each piece the best of several rounds, since whoever else uses the machine disturbs long pieces
more than short ones. One client at a time is what the simulator does without stacking. `value` is
how many times as fast the batched trainer is; both give the same bits, or the benchmark fails.
"""

import time
from pathlib import Path

import harness
import torch

from atoll.client import stacked
from atoll.client.data import Data, DataInfo, Split, load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.partition import shards_of
from atoll.client.specs import trainer_on
from atoll.client.trainer import Task, Trained

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
CLIENTS, LIMIT = 100, 10.0
TOGETHER = 50  # clients of a piece where they are stacked, and
ALONE = 5  # where they are not: about as long


def run(quick: bool) -> harness.Result:
    torch.set_num_threads(1)
    if not MNIST.is_dir():
        harness.say(f"skipped: no MNIST in {MNIST}")
        return harness.Result("batched_trainer", LIMIT, "times", LIMIT, better="higher",
                              more={"skipped": True})  # fmt: skip
    whole = load_data(f"mnist:{MNIST}")
    small, rounds = pooled(whole), 4 if quick else 12
    held = compared(small, "mlp:hidden=32", 10, 60, rounds)
    more = {
        "196-32-10, batch 10": held,
        "196-32-10, batch 32": compared(small, "mlp:hidden=32", 32, 20, rounds),
        "784-64-10, batch 32": compared(whole, "mlp:hidden=64", 32, 20, rounds),
    }
    same = all(found["same_bits"] for found in more.values())
    return harness.Result(
        "batched_trainer", held["times"], "times", LIMIT, better="higher", ok=same, more=more
    )


def compared(data: Data, model: str, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Microseconds a client's step takes, both ways."""
    parts = shards_of(data, "iid", CLIENTS, 0)
    local = LocalConfig(lr=0.1, batch=batch, device="cpu")
    trainers = [
        trainer_on(data.shard(rows), data, model, 0, local, client=f"c{i}")
        for i, rows in enumerate(parts)
    ]
    start = {name: t.clone() for name, t in trainers[0].export().items()}
    works = [stacked.Work(trainer, start, Task(steps)) for trainer in trainers]
    one, many, same = 0.0, 0.0, True
    for piece in pieces(works, TOGETHER):
        alone = [float("inf")] * (TOGETHER // ALONE)
        together = float("inf")
        for _ in range(rounds):  # in turn
            reference: list[Trained] = []
            for at, few in enumerate(pieces(piece, ALONE)):
                began = time.process_time()
                reference += [single(work.trainer, work) for work in few]
                alone[at] = min(alone[at], time.process_time() - began)
            began = time.process_time()
            found = stacked.train(piece)
            together = min(together, time.process_time() - began)
        one, many = one + sum(alone), many + together
        pairs = zip(reference, found, strict=True)
        same = same and all(b is not None and equal(a, b) for a, b in pairs)
    scale = 1e6 / (CLIENTS * steps)
    return {
        "times": round(one / many, 2),
        "one_us": round(one * scale, 1),
        "batched_us": round(many * scale, 1),
        "same_bits": same,
    }


def pieces(works: list[stacked.Work], size: int) -> list[list[stacked.Work]]:
    return [works[at : at + size] for at in range(0, len(works), size)]


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
