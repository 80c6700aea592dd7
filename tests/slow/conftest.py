"""Real servers and clients: as processes, to be killed, and as threads, to be looked into."""

import contextlib
import gc
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from atoll.aggregation.strategy import Strategy
from atoll.client.client import Client
from atoll.client.options import Options, maker
from atoll.client.training import Report
from atoll.protocols import wire_pb2
from atoll.protocols.errors import AtollError
from atoll.protocols.events import Event, Merged, UpdateReceived
from atoll.protocols.ids import ulid
from atoll.protocols.slots import resolve
from atoll.protocols.wire_pb2_grpc import AtollStub
from atoll.server.door import read_note
from atoll.server.journal import Journal
from atoll.server.rules import Rules
from atoll.server.run import Run, Tell
from atoll.server.server import Server, Summary
from atoll.server.spec import STRATEGIES, RunSpec, open_spec

BIN = Path(sys.executable).parent


LOADED = 4.0  # a machine with other work to do takes so many times as long


def _until(true: Callable[[], object], seconds: float = 30.0, what: str = "") -> Any:
    """What `true` gives once it gives something; fails after so many seconds of a free machine."""
    end = time.monotonic() + LOADED * seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what or true} did not come true in {seconds} s"
        time.sleep(0.02)
    return found


@pytest.fixture
def collected() -> Iterator[None]:
    """What a test leaves to the garbage collector is found in it, not in another one."""
    yield
    gc.collect()


class Process:
    """A command of ours in a process of its own."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.name = name
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.popen = subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environment,
            )

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def interrupt(self) -> None:
        self.popen.send_signal(signal.SIGINT)

    def wait(self, seconds: float = 60.0) -> int:
        try:
            return self.popen.wait(LOADED * seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on:\n{self.said()}") from None

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def said(self) -> str:
        return self.err.read_text()[-3000:]

    def told(self) -> dict[str, Any]:
        """The envelope it printed last."""
        found: dict[str, Any] = json.loads(self.out.read_text().strip().splitlines()[-1])
        return found

    def data(self, seconds: float = 60.0) -> dict[str, Any]:
        """What it printed when it ended well."""
        code = self.wait(seconds)
        assert code == 0, f"{self.name} ended with {code}:\n{self.out.read_text()}\n{self.said()}"
        found: dict[str, Any] = self.told()["data"]
        return found

    def error(self, seconds: float = 60.0) -> str:
        """The code it ended with."""
        return self.failure(seconds)[0]

    def failure(self, seconds: float = 60.0) -> tuple[str, int, str]:
        """Code, exit code and message; what and how to mend it are one line each."""
        exit_code = self.wait(seconds)
        told = self.told()
        assert not told["ok"], told
        error = told["error"]
        for line in (error["message"], error["hint"]):
            assert line, told
            assert "\n" not in line
        return error["code"], exit_code, error["message"]


class Local(threading.Thread):
    """A server in a thread of this process; `summary` or `error` says how it ended."""

    def __init__(self, server: Server, address: str) -> None:
        super().__init__(name="server", daemon=True)
        self.server = server
        self.listen = address
        self.summary: Summary | None = None
        self.error: AtollError | None = None
        self.bug: BaseException | None = None  # what no server may end with
        self.ready = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.summary = self.server.run(self.listen, lambda _: self.ready.set())
        except AtollError as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001  # the test that started it fails with it
            self.bug = error
        finally:
            self.ready.set()

    def check(self) -> None:
        if self.bug is not None:
            raise self.bug

    def ended(self, seconds: float = 60.0) -> Summary:
        self.join(LOADED * seconds)
        assert not self.is_alive(), "the server goes on"
        self.check()
        assert self.error is None, self.error
        assert self.summary is not None
        return self.summary


class Guest(threading.Thread):
    """A client in a thread of this process; `report` or `error` says how it ended."""

    def __init__(self, client: Client) -> None:
        super().__init__(name=client.name, daemon=True)
        self.client = client
        self.report: Report | None = None
        self.error: AtollError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.report = self.client.run()
        except AtollError as error:
            self.error = error

    def ended(self, seconds: float = 60.0) -> Report:
        self.join(LOADED * seconds)
        assert not self.is_alive(), f"client {self.name} goes on"
        assert self.error is None, self.error
        assert self.report is not None
        return self.report


class Raw:
    """The wire by hand: a client that can say anything, with the generated stub."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.stub = AtollStub(self.channel)  # type: ignore[no-untyped-call]
        self.out: queue.Queue[wire_pb2.ClientMessage | None] = queue.Queue()
        self.stream: Any = None
        self.metadata: tuple[tuple[str, str], ...] = ()

    def say(self, **message: Any) -> None:
        self.out.put(wire_pb2.ClientMessage(**message))

    def open(self, **first: Any) -> None:
        self.say(**first)
        self.stream = self.stub.Control(iter(self.out.get, None), timeout=120)

    def hello(self, name: str, **fields: Any) -> wire_pb2.Welcome:
        told = {"protocol": 1, "client": name, "node": ulid(), "examples": 10}
        self.open(hello=wire_pb2.Hello(**{**told, "capabilities": ["fp32"], **fields}))
        welcome: wire_pb2.Welcome = self.hear("welcome")
        self.metadata = (("atoll-session", welcome.session),)
        return welcome

    def hear(self, *kinds: str) -> Any:
        """The next message of one of these kinds; others on the way are passed over."""
        for message in self.stream:
            if (kind := message.WhichOneof("kind")) in kinds:
                return getattr(message, kind)
        raise AssertionError(f"the stream ended before any {' or '.join(kinds)}")

    def refused(self) -> str:
        """The code with which the server ends the stream."""
        try:
            for message in self.stream:
                if message.WhichOneof("kind") == "refusal" and message.refusal.fatal:
                    return str(message.refusal.code)
        except grpc.RpcError as error:
            return code_of(error)
        raise AssertionError("the stream ended well")

    def close(self) -> None:
        self.out.put(None)
        if self.stream is not None:
            self.stream.cancel()
        self.channel.close()


def code_of(error: grpc.RpcError) -> str:
    """The FL-… code in a refused call, with a message and a remedy."""
    for key, value in error.trailing_metadata() or ():
        if key == "atoll-error-bin":
            told = wire_pb2.Refusal.FromString(value)
            assert told.message, told
            assert told.hint, told
            return str(told.code)
    raise AssertionError(f"no refusal in {error!r}")


class Gate:
    """A TCP proxy before a server that lets so many bytes of clients' words through, then none."""

    def __init__(self, address: str, most: int) -> None:
        host, _, port = address.rpartition(":")
        self.target = (host, int(port))
        self.most = most
        self.passed = 0
        self.open = threading.Event()  # set: all may pass
        self.refuse = False
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._start(self._accept)

    @property
    def shut(self) -> bool:
        return self.passed >= self.most

    def cut(self, refuse: bool = False) -> None:
        """Break all connections; `refuse`: also every one that comes from now on."""
        self.refuse = refuse
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.open.set()
        for end in [self._door, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _start(self, job: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=job, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._door.accept()[0]
                if self.refuse:
                    near.close()
                    continue
                far = socket.create_connection(self.target)
                self._ends += [near, far]
                self._start(self._pump, near, far, True)
                self._start(self._pump, far, near, False)

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                if counted:
                    self.passed += len(piece)
                    while self.shut and not self.open.wait(0.02):
                        pass
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Ledger:
    """What the journal says of a run: every input, and what became of every update."""

    events: list[tuple[float, Event]] = field(default_factory=list)
    fates: Counter[str] = field(default_factory=Counter)  # "used o17.0" -> how often
    run: Run | None = None

    @property
    def updates(self) -> list[str]:
        return [e.update.id for _, e in self.events if isinstance(e, UpdateReceived)]

    @property
    def versions(self) -> list[int]:
        return [e.version for _, e in self.events if isinstance(e, Merged)]

    def check(self) -> None:
        """Nobody's work lost or counted twice; versions one after another; time goes on."""
        assert len(set(self.updates)) == len(self.updates), "an update came in twice"
        decided = Counter(told.split()[1] for told in self.fates.elements())
        assert self.run is not None
        open_ = [*self.run.held, *(u for items in self.run.merging.values() for u in items)]
        if self.run.finished is not None:
            assert not open_, "an update of a finished run was not decided"
        assert decided + Counter(open_) == Counter(self.updates), "not decided exactly once"
        assert self.versions == list(range(1, len(self.versions) + 1))
        times = [now for now, _ in self.events]
        assert times == sorted(times)


class Federation:
    """One state directory, and all processes that a test started; they end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.processes: list[Process] = []
        self.guests: list[Guest] = []
        self.locals: list[Local] = []
        self.gates: list[Gate] = []
        self.raws: list[Raw] = []
        self.address = "127.0.0.1:0"

    def command(self, name: str, *arguments: str) -> Process:
        process = Process(self.folder, name, *arguments)
        self.processes.append(process)
        return process

    def server(self, *options: str, wait: bool = True) -> Process:
        """`fl-server start` on the state directory, at the port of the server before it."""
        name = f"server{len(self.processes)}"
        process = self.command(
            name, "fl-server", "start", "--listen", self.address, "--state", str(self.state),
            "--json", "-v", *options,
        )  # fmt: skip
        if wait:
            self.address = self.until(lambda: self._serving(process), 60, name)
        return process

    def local(self, rules: Rules | None = None, **spec: Any) -> Local:
        """A server in this process: quicker, and without the command line."""
        slots = spec.pop("slots", {})
        wanted = RunSpec(ulid(), **{"lease": 5.0, **spec})
        found = open_spec(self.state, wanted, spec)
        local = Local(Server.of(found, self.state, rules, slots=slots), self.address)
        self.locals.append(local)
        assert local.ready.wait(120), "the server does not come up"
        local.check()
        if local.error is None:
            self.address = local.server.address
        return local

    def client(self, name: str, *options: str, address: str = "") -> Process:
        return self.command(
            name, "fl-client", "start", address or self.address, "--name", name, "--json", "-v",
            "--dir", str(self.folder / f"client-{name}"), *options,
        )  # fmt: skip

    def gate(self, most: int) -> Gate:
        gate = Gate(self.address, most)
        self.gates.append(gate)
        return gate

    def raw(self) -> Raw:
        raw = Raw(self.address)
        self.raws.append(raw)
        return raw

    def digits(self, name: str, shard: tuple[int, int] = (0, 1), slowdown: float = 0.0) -> Guest:
        """A client in this process that trains on its part of the digits."""
        options = Options(name, shard=shard, slowdown=slowdown)
        folder = self.folder / f"client-{name}"
        return self.guest(Client(self.address, maker(options), name=name, folder=folder))

    def guest(self, client: Client) -> Guest:
        guest = Guest(client)
        self.guests.append(guest)
        return guest

    @staticmethod
    def until(true: Callable[[], object], seconds: float = 30.0, what: str = "") -> Any:
        return _until(true, seconds, what)

    def _serving(self, process: Process) -> str | None:
        assert process.alive, f"{process.out.read_text()}\n{process.said()}"
        note = read_note(self.state)
        if note.get("pid") != process.popen.pid:
            return None
        return str(note["address"])

    def history(self, kind: str) -> list[dict[str, Any]]:
        """Rows of one kind so far, whole lines only."""
        path = self.state / "history.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        rows: list[dict[str, Any]] = [json.loads(one) for one in lines]
        return [row for row in rows if row["kind"] == kind]

    def merged(self) -> int:
        """The newest version that the history knows of."""
        return max((row["version"] for row in self.history("merged")), default=0)

    def ledger(self) -> Ledger:
        """The journal of a server that has ended, gone through once more."""
        spec = RunSpec.read(self.state / "run.json")
        strategy = resolve("strategy", spec.strategy, STRATEGIES)
        assert isinstance(strategy, Strategy)
        journal = Journal(self.state / "journal.sqlite", spec.id)
        ledger = Ledger(run=Run(strategy))
        assert ledger.run is not None
        for row in journal.rows():
            ledger.events.append((row.now, row.event))
            _, _, effects = ledger.run.handle(row.event, row.now)
            for effect in effects:
                if isinstance(effect, Tell):
                    ledger.fates[f"{effect.outcome.fate} {effect.outcome.update}"] += 1
        journal.close()
        return ledger

    def close(self) -> None:
        for process in self.processes:
            if process.alive:
                process.kill()
        for guest in self.guests:
            guest.client.stop()
        for raw in self.raws:
            raw.close()
        for gate in self.gates:
            gate.close()
        for local in self.locals:
            local.server.stop()
        for thread in (*self.guests, *self.locals):
            thread.join(30)
            assert not thread.is_alive(), f"{thread.name} goes on after its test"
        for local in self.locals:
            local.check()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    try:
        yield made
    finally:
        made.close()
