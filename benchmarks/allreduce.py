"""All-reduce of 100 MB fp32 among four processes on loopback, beside hivemind's own averager.

The floor is the same bytes (each part to its reducer, each result to all) through the daemons'
raw streams, with nothing done to them. The rival is `hivemind.DecentralizedAverager`'s all-reduce,
matchmaking not counted. All of them take turns in one run, because this machine's speed drifts.
`idle_mb` is what a peer that has joined and waits holds beyond torch, its daemon included.
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import Result, main, say

PEERS = 4
ELEMENTS = 25_000_000
LIMIT = 2.0  # of raw daemon streams
OF_RIVAL = 0.6
IDLE_MB = 150.0
PIECE = 1 << 20
STUCK = 10.0  # seconds after which a raw exchange is begun again: the daemons can block each other


# ---- one peer's process -------------------------------------------------------------------------


async def peer(number: int, folder: Path, elements: int) -> None:
    """Commands on stdin, one JSON line each; what it did on stdout."""
    import torch

    from atoll.aggregation.allreduce import Done, Fail, Part, PartReady, Plan
    from atoll.aggregation.shares import cut, split
    from atoll.p2p import bulk
    from atoll.p2p.contribution import Contribution
    from atoll.p2p.direct import NAME, Direct
    from atoll.p2p.exchange import Exchange
    from atoll.p2p.node import Node
    from atoll.p2p.peer import MOST
    from atoll.p2p.roads import Roads
    from atoll.protocols.channel import tune_malloc
    from atoll.protocols.codecspec import parse

    torch.set_num_threads(1)
    tune_malloc()  # as a peer does
    loop = asyncio.get_running_loop()
    first = json.loads(await _line()) if number else {}
    node = Node(
        folder / str(number), listen=("/ip4/127.0.0.1/tcp/0",), bootstrap=first.get("bootstrap", ())
    )
    await node.start()
    ended: asyncio.Queue[Done | Fail] = asyncio.Queue()

    async def fetch(giver: str, name: str, dest: memoryview, shorter: bool) -> bulk.Got:
        return await (streams if attempts[-1].startswith("streams") else roads).fetch(
            giver, name, dest, shorter
        )

    def tell(to: str, attempt: str, message: PartReady) -> None:
        said = json.dumps([attempt, message.part, message.digest]).encode()
        _keep(loop.create_task(node.call(to, "ready", said)))

    async def ready(who: str, said: bytes) -> bytes:
        attempt, part, digest = json.loads(said)
        exchange.hear(attempt, PartReady(who, part, digest))
        return b""

    exchange = Exchange(
        node.id, elements, up=parse("fp32"), down=parse("fp32"), fetch=fetch, tell=tell,
        over=lambda _, end: ended.put_nowait(end), clock=loop.time, most=MOST,
    )  # fmt: skip
    await node.serve("ready", ready)
    await bulk.Shelf(node, exchange.find).open()
    direct, attempts = Direct(node, exchange.find), [""]
    await direct.open("127.0.0.1")
    await node.serve(NAME, direct.offer)
    roads, streams = Roads(node, direct), Roads(node, None)
    raw = _Raw(node, elements)
    await raw.open()
    _say({"id": node.id, "addresses": await node.addresses()})
    delta = torch.randn(elements, generator=torch.Generator().manual_seed(number))
    while line := await _line():
        asked = json.loads(line)
        if asked["do"] == "raw":
            _say({"bytes": await raw.round(asked["group"])})
        elif asked["do"] == "reduce":
            group = tuple(sorted(asked["group"]))
            counts, parts, start = split(elements, [1 / len(group)] * len(group)), [], 0
            for name, count in zip(group, counts, strict=True):
                for piece in cut(count):
                    parts.append(Part(name, start, start + piece))
                    start += piece
            plan = Plan(group, (1.0,) * len(group), tuple(parts))
            mine = Contribution(delta, parse(asked["codec"]))
            attempts.append(asked["attempt"])
            exchange.turn()  # only now: others may have fetched the last one's mean later than this
            exchange.begin(asked["attempt"], plan, loop.time() + 60, mine)
            end = await ended.get()
            assert isinstance(end, Done), end
            _say({"digest": end.digest})
    await direct.close()
    await node.stop()


class _Raw:
    """The same bytes over the daemons' own streams: sent from memory, read and thrown away."""

    def __init__(self, node: Any, elements: int) -> None:
        self._node, self._size = node, 4 * elements // PEERS
        self._data = memoryview(bytes(PIECE))

    async def open(self) -> None:
        await self._node._up_p2p().add_binary_stream_handler("raw", self._give)

    async def _give(self, _: Any, __: asyncio.StreamReader, writer: Any) -> None:
        for at in range(0, self._size, PIECE):
            writer.write(self._data[: min(PIECE, self._size - at)])
            await writer.drain()
        with contextlib.suppress(Exception):
            await asyncio.sleep(5)  # the reader closes

    async def round(self, group: list[str]) -> int:
        """Two parts from each of the others: an input and a result. 0: it was stuck."""
        others = [name for name in group if name != self._node.id]
        try:
            async with asyncio.timeout(STUCK):
                return sum(await asyncio.gather(*(self._take(name) for name in others * 2)))
        except TimeoutError:
            return 0

    async def _take(self, name: str) -> int:
        from hivemind.p2p import PeerID

        p2p = self._node._up_p2p()
        _, reader, writer = await p2p.call_binary_stream_handler(PeerID.from_base58(name), "raw")
        held = 0
        with contextlib.closing(writer):
            while held < self._size:
                data = await reader.read(PIECE)
                assert data, "the stream ended early"
                held += len(data)
        return held


def rival(number: int, elements: int) -> None:
    """hivemind's averager in a process of its own; it says how long its all-reduce took."""
    import torch
    from hivemind import DHT
    from hivemind.averaging import DecentralizedAverager

    torch.set_num_threads(1)

    class Timed(DecentralizedAverager):
        async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = await super()._aggregate_with_group(*args, **kwargs)
            seconds.value = time.perf_counter() - begun
            return result

    import multiprocessing

    seconds = multiprocessing.Value("d", 0.0)
    first = json.loads(sys.stdin.readline()) if number else {}
    dht = DHT(
        start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=first.get("bootstrap")
    )
    vector = torch.randn(elements, generator=torch.Generator().manual_seed(number))
    averager = Timed(
        [vector], dht, start=True, prefix="bench", target_group_size=PEERS,
        min_matchmaking_time=4.0, request_timeout=2.0,
    )  # fmt: skip
    _say({"addresses": [str(a) for a in dht.get_visible_maddrs()]})
    for line in sys.stdin:
        if json.loads(line)["do"] != "reduce":
            break
        group = averager.step(timeout=60)
        _say({"seconds": seconds.value, "peers": len(group or ())})
    averager.shutdown()
    dht.shutdown()


async def _line() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


_kept: set[asyncio.Task[Any]] = set()


def _keep(task: asyncio.Task[Any]) -> None:
    _kept.add(task)
    task.add_done_callback(_kept.discard)


# ---- the run ------------------------------------------------------------------------------------


class Swarm:
    """Processes of one kind, commanded line by line."""

    def __init__(self, kind: str, folder: Path, elements: int) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.ids: list[str] = []
        bootstrap: list[str] = []
        for number in range(PEERS):
            command = [
                sys.executable,
                __file__,
                f"--{kind}",
                str(number),
                str(folder),
                str(elements),
            ]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.processes.append(process)
        for number, process in enumerate(self.processes):
            if number:
                self._ask(process, {"bootstrap": bootstrap})
            told = self._hear(process)
            self.ids.append(told.get("id", ""))
            bootstrap = bootstrap or told["addresses"]

    def all(self, asked: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
        """Ask all of them at once; seconds until the last has answered, and the answers."""
        before = self.worked()
        begun = time.perf_counter()
        for process in self.processes:
            self._ask(process, asked)
        answers = [self._hear(process) for process in self.processes]
        seconds = time.perf_counter() - begun
        self.cpu = self.worked() - before
        return seconds, answers

    def worked(self) -> float:
        """Processor seconds of all of them and their daemons so far."""
        trees = [psutil.Process(process.pid) for process in self.processes]
        every = [one for tree in trees for one in [tree, *tree.children(recursive=True)]]
        return sum(t.user + t.system for t in (one.cpu_times() for one in every))

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            _kill(process)

    def _ask(self, process: subprocess.Popen[str], asked: dict[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()

    def _hear(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "a peer of the benchmark has ended"
        found: dict[str, Any] = json.loads(line)
        return found


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(10)


def held(pid: int) -> float:
    """MB that a process and its children hold, mapped files not counted."""
    tree = psutil.Process(pid)
    return sum(_anonymous(one.pid) for one in [tree, *tree.children(recursive=True)]) / 1e6


def _anonymous(pid: int) -> int:
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(rows[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def idle(folder: Path) -> float:
    """MB beyond torch of a peer that waits."""
    code = "import torch, sys; print(flush=True); sys.stdin.readline()"
    bare = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert bare.stdout is not None
    bare.stdout.readline()
    alone = held(bare.pid)
    bare.kill()
    bare.wait()
    swarm = Swarm("peer", folder / "idle", 1000)
    found = [held(process.pid) for process in swarm.processes]
    swarm.close()
    return statistics.median(found) - alone


def run(quick: bool) -> Result:
    times: dict[str, list[float]] = {"ours": [], "streams": [], "raw": [], "rival": []}
    worked: list[float] = []
    stuck = 0
    with tempfile.TemporaryDirectory() as name:
        beyond = idle(Path(name))
        ours = Swarm("peer", Path(name), ELEMENTS)
        theirs = Swarm("rival", Path(name), ELEMENTS)
        try:
            for turn in range(5 if quick else 9):
                group = {"group": ours.ids}
                seconds, answers = ours.all({"do": "raw", **group})
                while not all(a["bytes"] for a in answers):  # not counted: a floor has no waits
                    stuck += 1
                    seconds, answers = ours.all({"do": "raw", **group})
                times["raw"].append(seconds)
                for kind in ("ours", "streams"):
                    asked = {"do": "reduce", "attempt": f"{kind}/{turn}/x", **group}
                    seconds, answers = ours.all({**asked, "codec": "fp32"})
                    times[kind].append(seconds)
                    if kind == "ours":
                        worked.append(ours.cpu)
                    assert len({a["digest"] for a in answers}) == 1, "not the same bits"
                _, answers = theirs.all({"do": "reduce"})
                times["rival"].append(max(a["seconds"] for a in answers))
                say(", ".join(f"{kind} {t[-1]:.2f} s" for kind, t in times.items()))
        finally:
            ours.close()
            theirs.close()
    # The first two warm up: each peer looks there which road from each other is the faster one.
    middle = {kind: statistics.median(t[2:]) for kind, t in times.items()}
    of_rival = middle["ours"] / middle["rival"]
    more = {
        "streams": round(middle["streams"], 3),  # s, where no peer reaches another directly
        "of_rival": round(of_rival, 3),
        "limit_of_rival": OF_RIVAL,
        "processor_seconds": round(statistics.median(worked[2:]), 2),  # ours, of all four
        "idle_mb": round(beyond),
        "raw_stuck": stuck,  # times that the floor's exchange was begun again
    }
    ok = of_rival <= OF_RIVAL and beyond <= IDLE_MB
    return Result(
        "allreduce", middle["ours"], "s", LIMIT, middle["raw"], middle["rival"], ok=ok, more=more
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        asyncio.run(peer(int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
    elif sys.argv[1:2] == ["--rival"]:
        rival(int(sys.argv[2]), int(sys.argv[4]))
    else:
        main(run)
