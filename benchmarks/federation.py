"""Federation: the real server and real clients, each a process, with training that does nothing.

What is left is what a federation itself costs: download, verify, upload, verify, spill, journal,
merge, save. Used by `round.py` and `rate.py`.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from atoll.protocols.poller import read_where_we_wait

LIMIT = 120.0  # seconds a whole run may take


@dataclass(frozen=True)
class Measured:
    rounds: list[float]  # wall seconds between two versions, the first left out
    peak_bytes: int  # RssAnon + RssShmem of the server, sampled from outside
    idle_bytes: int  # the same when it was ready and no client had come
    server_cpu: float  # processor seconds a round, of all its threads; nan: too few rounds to tell
    client_cpu: float  # the same, the mean of the clients


def measure(floats: int, clients: int, rounds: int, look: float = 0.01, **server: str) -> Measured:
    """A run of `rounds` FedAvg rounds over a model of `floats` float32. The server's memory is
    looked at every `look` seconds, which takes processor time itself."""
    with tempfile.TemporaryDirectory(prefix="atoll-bench-", dir=_disk()) as folder:
        return _measure(Path(folder), floats, clients, rounds, look, server)


def _measure(
    folder: Path, floats: int, clients: int, rounds: int, look: float, server: Mapping[str, str]
) -> Measured:
    base = [sys.executable, __file__, "--folder", str(folder), "--floats", str(floats)]
    options = [f"--set={k}={v}" for k, v in server.items()]
    command = [*base, *options, "--serve", "--clients", str(clients), "--rounds", str(rounds)]
    processes = [subprocess.Popen(command)]
    try:
        address = _address(folder / "state" / "server.json", processes[0])
        ready = folder / "ready"
        while not ready.exists():
            assert processes[0].poll() is None, "the server died"
            time.sleep(0.02)
        memory = _Memory(processes[0].pid, look)
        commands = ([*base, "--client", str(index), address] for index in range(clients))
        processes.extend(subprocess.Popen(command) for command in commands)
        for process in reversed(processes):  # the server last: it outlives a client's failure
            if process.wait(LIMIT):
                raise RuntimeError(f"process {process.args} failed")
        memory.stop()
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    rows = [json.loads(line) for line in (folder / "state" / "history.jsonl").open()]
    merged = [row["t"] for row in rows if row["kind"] == "merged"]
    assert len(merged) == rounds, f"{len(merged)} versions of {rounds}"
    gaps = [b - a for a, b in itertools.pairwise(merged)]
    spent = [float((folder / f"cpu-c{index}").read_text()) for index in range(clients)]
    server_cpu = float((folder / "cpu-server").read_text())
    return Measured(gaps, memory.peak, memory.first, server_cpu, sum(spent) / clients)


class _Spent:
    """Counts this process's processor time by rounds, the first ones left out."""

    FIRST = 50

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rounds = 0
        self._began = self._now = 0.0

    def round(self) -> None:
        self._rounds += 1
        if self._rounds == self.FIRST:
            self._began = time.process_time()
        if self._rounds >= self.FIRST:
            self._now = time.process_time()

    def write(self) -> None:
        rounds = self._rounds - self.FIRST
        self._path.write_text(str((self._now - self._began) / rounds if rounds > 0 else math.nan))


class _Memory:
    """Samples a process's private memory from outside."""

    def __init__(self, pid: int, look: float) -> None:
        self._pid = pid
        self._look = look
        self.first = self.peak = self._sample()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._look):
            try:
                self.peak = max(self.peak, self._sample())
            except (OSError, psutil.Error):
                return

    def _sample(self) -> int:
        found = 0
        with open(f"/proc/{self._pid}/status") as status:
            for line in status:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    found += int(line.split()[1]) * 1024
        return found


def _address(note: Path, process: "subprocess.Popen[bytes]") -> str:
    for _ in range(2000):
        try:
            return str(json.loads(note.read_text())["address"])
        except (OSError, ValueError):
            time.sleep(0.02)
        assert process.poll() is None, "the server died"
    raise TimeoutError("the server did not start")


def _disk() -> str:
    """Beside the code: a state directory lies on a disk, /tmp may be memory."""
    return os.environ.get("ATOLL_BENCH_DIR", str(Path(__file__).resolve().parents[1]))


# ---- the processes -----------------------------------------------------------------------------


def serve(folder: Path, floats: int, clients: int, rounds: int, given: Mapping[str, str]) -> None:
    import torch

    from atoll.protocols.ids import ulid
    from atoll.server.server import Server
    from atoll.server.spec import RunSpec

    def model() -> torch.nn.Module:  # made by the server, which lets go of it, as of --model
        return torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(floats))})

    strategy = f"fedavg:steps=1,min_clients={clients},rounds={rounds}"
    numbers = {k: int(v) if v.isdecimal() else v for k, v in given.items()}
    spec = RunSpec(ulid(), strategy=strategy, data="", evaluate_every=0, **numbers)  # type: ignore[arg-type]
    spent = _Spent(folder / "cpu-server")

    def heard(row: Mapping[str, object]) -> None:
        if row["kind"] == "merged":
            spent.round()

    server = Server.of(spec, folder / "state", slots={"model": model}, on_row=heard)
    server.run("127.0.0.1:0", lambda _: (folder / "ready").touch())
    spent.write()


class NoTraining:
    """A Trainer that gives back what it was given."""

    examples = 1
    reads_only = True

    def __init__(self, spent: _Spent) -> None:
        self._spent = spent

    def load(self, tensors):  # type: ignore[no-untyped-def]
        self._tensors = tensors

    def train(self, task):  # type: ignore[no-untyped-def]
        from atoll.client.trainer import Trained

        self._spent.round()
        return Trained(self._tensors, task.steps, task.steps, {})

    def evaluate(self) -> dict[str, float]:
        return {}


def client(folder: Path, index: int, address: str) -> None:
    import torch

    from atoll.client.client import Client

    torch.set_num_threads(1)
    name = f"c{index}"
    spent = _Spent(folder / f"cpu-{name}")
    Client(address, NoTraining(spent), name=name, folder=folder / name).run()
    spent.write()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--floats", type=int)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--client", nargs=2)
    told = parser.parse_args()
    read_where_we_wait()  # as the commands do
    if told.serve:
        given = dict(pair.split("=", 1) for pair in told.set)
        serve(told.folder, told.floats, told.clients, told.rounds, given)
    else:
        client(told.folder, int(told.client[0]), told.client[1])


if __name__ == "__main__":
    main()
