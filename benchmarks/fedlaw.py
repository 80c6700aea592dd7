"""FedLAW: 16 updates of 25 M float32 in mapped files are learned on; memory is bounded.

The limit that fails is memory: peak RssAnon + RssShmem of the process that merges, sampled from
outside, at most 3 models and 300 MB. Besides, the time of one learning step (the mixture is built,
the loss of 100 proxy examples goes forward and back through all 25 M parameters, and its gradient
is multiplied with every update) is given as a ratio to one read of the same bytes with as many
threads, in the same process: two reads and the backward are what it is made of. The whole merge is
checked against the sum that its shares and its scale say.
"""

import contextlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from harness import Result, main, say
from merge import THREADS, read
from torch import Tensor, nn

from atoll.aggregation.fedlaw import FedLaw
from atoll.client.data import Split
from atoll.client.flat import FlatModel
from atoll.client.models import manifest_of
from atoll.protocols.codecs import as_tensor, codec
from atoll.protocols.manifest import Manifest
from atoll.protocols.payload import parse
from atoll.protocols.tensors import sections_of
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger
from atoll.server.regions import map_file
from atoll.server.versions import VersionStore

UPDATES, INPUTS, HIDDEN, CLASSES, EXAMPLES = 16, 2500, 9950, 10, 100
ROOM = 300_000_000  # bytes besides three models
LIMIT = 1.0  # of the room that 3 models and ROOM are
STEP_LIMIT = 20.0  # reads of the updates that a step may take, its backward included
SAMPLED = 0.02  # seconds


def run(quick: bool) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="atoll-fedlaw-", dir=os.environ.get("ATOLL_BENCH_DIR")))
    try:
        told, peak = child(folder, epochs=2 if quick else 10)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    model = told["model_bytes"]
    allowed = 3 * model + ROOM
    ratio = told["step_s"] / told["read_s"]
    say(f"peak {peak / 1e6:.0f} MB of {allowed / 1e6:.0f}; a step is {ratio:.1f} reads")
    more = {"step_s": told["step_s"], "read_s": told["read_s"], "step_in_reads": round(ratio, 2),
            "steps": told["steps"], "step_limit": STEP_LIMIT, "loss": told["loss"],
            "loss_before": told["before"]}  # fmt: skip
    return Result(
        "fedlaw", peak / 1e6, "MB", LIMIT, allowed / 1e6, ok=ratio <= STEP_LIMIT, more=more
    )


def child(folder: Path, epochs: int) -> tuple[dict[str, float], float]:
    """What the merging process told, and its peak memory in bytes."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(folder), str(epochs)], stdout=subprocess.PIPE
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(SAMPLED)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    assert process.returncode == 0, "the merging process failed"
    pairs = (line.split("=") for line in said.split())
    return {name: float(value) for name, value in pairs}, peak


def memory(pid: int) -> float:
    """RssAnon + RssShmem of a process, bytes: what is not a mapped file."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        parts = [line.split() for line in lines if line.startswith(("RssAnon", "RssShmem"))]
        return 1024.0 * sum(int(part[1]) for part in parts)
    return 0.0


# ---- in the process that merges ------------------------------------------------------------


def merge(folder: Path, epochs: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    manifest = manifest_of(net)
    store = VersionStore(folder / "versions", manifest)
    base = store.initial(net.state_dict())
    count = manifest.counts["trainable"]
    items = [(update(folder / f"u{i}", manifest, i), 1 / UPDATES) for i in range(UPDATES)]
    x = torch.randn(EXAMPLES, INPUTS)
    proxy = FlatModel(net, Split(x, torch.arange(EXAMPLES) % CLASSES))
    proxy.vector.copy_(base.flat("trainable"))
    del net
    rule = FedLaw(epochs=epochs, lr=0.05, batch=EXAMPLES)
    merger = Merger(manifest, rule.with_proxy(Watched(proxy)), threads=THREADS)
    draft = store.draft(1, 0)
    stats = merger.merge(base, draft, items).stats
    made = draft.seal().flat("trainable")
    check(base.flat("trainable"), made, items, stats)
    views = [as_tensor(item.payload.view, torch.float32)[:count] for item, _ in items]
    reads = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(4):
            began = time.perf_counter()
            read(views, pool)
            reads.append(time.perf_counter() - began)
    merger.close()
    times = Watched.steps
    return {
        "model_bytes": 4.0 * count, "read_s": sorted(reads)[1], "steps": float(len(times)),
        "step_s": statistics.median(b - a for a, b in itertools.pairwise(times)),
        "before": stats["proxy_loss_before"], "loss": stats["proxy_loss"],
    }  # fmt: skip


class Watched:
    """A proxy that notes when it was asked for a gradient: a step lies between two of them."""

    steps: list[float]

    def __init__(self, proxy: FlatModel) -> None:
        self._proxy = proxy
        self.vector, self.examples, self.limit = proxy.vector, proxy.examples, proxy.limit
        Watched.steps = []

    def begin(self, buffers: Mapping[str, Tensor]) -> None:
        self._proxy.begin(buffers)

    def loss(self) -> float:
        return self._proxy.loss()

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        Watched.steps.append(time.perf_counter())
        return self._proxy.gradient(at)

    def gain(self, before: float, after: float) -> float:
        return self._proxy.gain(before, after)

    def told(self) -> Mapping[str, float]:
        return self._proxy.told()

    def settle(self) -> Tensor:
        return self._proxy.settle()

    def interrupt(self) -> None:
        self._proxy.interrupt()


def update(path: Path, manifest: Manifest, seed: int) -> UpdateBytes:
    """An update as the store of uploads holds it: a mapped file of nothing but its payload."""
    random, count = torch.Generator().manual_seed(seed), manifest.counts["trainable"]
    with path.open("wb") as file:
        file.write((8).to_bytes(8, "little"))  # so that `map_file` finds its data
        file.write(b" " * 8)
        for lo in range(0, count, 1 << 20):
            values = torch.randn(min(1 << 20, count - lo), generator=random) * 0.01
            values.numpy().tofile(file)
    fp32 = codec("fp32")
    view = map_file(path, sha=False)[1].view
    return UpdateBytes(path.name, parse(manifest, sections_of(manifest, fp32), view, fp32, "model"))


def check(x: Tensor, made: Tensor, items: list[Item], stats: Mapping[str, float]) -> None:
    """The new model is gamma * sum of lambda_i * (x - delta_i)."""
    end = 1000
    models = [
        stats[f"lambda/{item.id}"] * (x[:end] - as_tensor(item.payload.view, torch.float32)[:end])
        for item, _ in items
    ]
    expected = stats["gamma"] * torch.stack(models).sum(dim=0)
    assert torch.allclose(made[:end], expected, atol=1e-5), "the merge is not what it told"
    assert stats["proxy_loss"] < stats["proxy_loss_before"], "it learned nothing"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        told = merge(Path(sys.argv[2]), int(sys.argv[3]))
        print("\n".join(f"{name}={value}" for name, value in told.items()))
    else:
        main(run)
