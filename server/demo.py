"""Demo: a whole federation on this machine. One server, several clients, all real processes.

We start them, read the history that the server writes, ask it for progress, restart a client that
dies, and at the end put model, history and plots into one folder.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atoll.protocols.children import MAX_RESTARTS, Child
from atoll.protocols.errors import AtollError, ServerError, UsageError
from atoll.server.history import History, line
from atoll.server.live import ClientView, Live, LiveView, view
from atoll.server.look import FromFile
from atoll.server.options import make_folder
from atoll.server.totals import Row

# Exit codes of a client that would fail the same way again: bad configuration, a mismatch, refused.
HOPELESS = (2, 3, 64, 76, 77, 78)
POLL = 0.1  # seconds between two looks at the processes and the history
ASK = 0.3  # seconds between two questions to the server
SLOWEST = 0.001  # speed: a step takes almost a minute then
STEP = 0.05  # seconds a step takes at speed 1: slow enough that a person can watch


@dataclass(frozen=True)
class DemoSpec:
    """What `fl-server demo` was asked for. `server` are the options passed on to the server."""

    clients: int
    speeds: tuple[float, ...]
    strategy: str
    data: str
    model: str
    partition: str
    target: float
    timeout: float
    seed: int
    out: Path
    server: tuple[str, ...] = ()
    step_seconds: float = STEP
    trainer: str = ""

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise UsageError("FL-S108", f"--clients {self.clients}", "give at least 1")
        if len(self.speeds) != self.clients:
            raise UsageError(
                "FL-S108",
                f"--speeds names {len(self.speeds)} clients, --clients is {self.clients}",
                "give one speed per client, e.g. --clients 4 --speeds 1,1,2,4",
            )
        if not 0 < self.timeout < float("inf"):
            raise UsageError("FL-S108", f"--timeout {self.timeout}", "give seconds above 0")
        if not all(SLOWEST <= s <= 1 / SLOWEST for s in self.speeds):
            told = ",".join(f"{s:g}" for s in self.speeds)
            hint = f"speeds are from {SLOWEST:g} to {1 / SLOWEST:g}"
            raise UsageError("FL-S108", f"--speeds {told}", hint)


@dataclass
class Demo:
    """`run` returns the JSON data of the command."""

    spec: DemoSpec
    live: Live
    say: Callable[[str], None]
    history: History = field(default_factory=History)
    progress: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.state = self.spec.out / "state"
        self.logs = self.spec.out / "logs"
        self.names = [f"client-{i}" for i in range(self.spec.clients)]
        self.speeds = dict(zip(self.names, self.spec.speeds, strict=True))
        self.server = Child("server", "atoll.server", self._server_arguments(), self.logs)
        self.children: dict[str, Child] = {}
        self._file = FromFile(self.state / "history.jsonl")
        self._asked = 0.0
        self._began = time.monotonic()
        self._restarts: list[Row] = []

    def run(self) -> dict[str, Any]:
        spec = self.spec
        make_folder(spec.out)
        for left in (self.state, self.logs, spec.out / "clients"):
            shutil.rmtree(left, ignore_errors=True)  # of an earlier demo in the same folder
        with self._processes():
            address = self._start_server()
            for i, name in enumerate(self.names):
                self.children[name] = self._client(address, i, name)
                self.children[name].start()
            with self.live:
                self._watch(address)
        self._read_history()
        return self._finish()

    # ---- processes -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _processes(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            over = self.history.finished is not None
            everyone = [self.server, *self.children.values()]
            for child in everyone if over else ():
                child.wait(5.0)
            for child in everyone:
                child.stop(10.0)

    def _server_arguments(self) -> tuple[str, ...]:
        spec = self.spec
        return (
            "start", "--stop-with-stdin", "--listen", "127.0.0.1:0", "--state", str(self.state),
            "--name", "demo", "--lease", "10", "--strategy", spec.strategy, "--data", spec.data,
            "--model", spec.model, "--seed", str(spec.seed),
            "--target-accuracy", str(spec.target), "--trainer", spec.trainer, *spec.server,
        )  # fmt: skip

    def _client(self, address: str, index: int, name: str) -> Child:
        spec = self.spec
        pause = spec.step_seconds / spec.speeds[index]
        trains: tuple[str, ...] = (
            "--data", spec.data, "--model", spec.model, "--partition", spec.partition,
            "--device", "cpu",
        )  # fmt: skip
        if spec.trainer:
            trains = ("--trainer", spec.trainer)
        arguments = (
            "start", address, "--stop-with-stdin", "--name", name,
            "--dir", str(spec.out / "clients" / name), "--shard", f"{index}/{spec.clients}",
            "--sleep-per-step", f"{pause:.6g}", *trains,
        )  # fmt: skip
        return Child(name, "atoll.client", arguments, self.logs)

    def _start_server(self) -> str:
        self.server.start()
        note = self.state / "server.json"
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError):
                return str(json.loads(note.read_text())["address"])
            if not self.server.running():
                self.server.died()
                raise self._server_failed()
            self._check_time()
            time.sleep(0.05)

    def _server_failed(self) -> AtollError:
        return failure_of(self.server, f"the server ended: {self.server.reason or 'early'}")

    def _look_after_clients(self) -> None:
        for name, child in self.children.items():
            if not child.died():
                continue
            if child.code in HOPELESS or child.restarts >= MAX_RESTARTS:
                raise failure_of(child, f"{name} died {child.restarts + 1} times, {child.reason}")
            now = self._clock()
            self._note({"t": now, "kind": "restart", "client": name, "reason": child.reason})
            child.restart()

    # ---- watching ------------------------------------------------------------------------------

    def _watch(self, address: str) -> None:
        while self.history.finished is None:
            if not self.server.running():
                self._read_history()
                if self.history.finished is None:
                    self.server.died()
                    raise self._server_failed()
                break
            self._read_history()
            self._look_after_clients()
            self._ask(address)
            self.live.show(self._view())
            if time.monotonic() - self._began > self.spec.timeout:
                self.say(f"no {self.spec.target:g} accuracy within {self.spec.timeout:g} s")
                break
            time.sleep(POLL)
        self.live.show(self._view())

    def _check_time(self) -> None:
        if time.monotonic() - self._began > self.spec.timeout:
            raise ServerError("FL-S205", "the server did not start in time", "give more --timeout")

    def _ask(self, address: str) -> None:
        if time.monotonic() - self._asked < ASK:
            return
        self._asked = time.monotonic()
        from atoll.client.inspect import ask

        with contextlib.suppress(AtollError):  # it is busy or has just ended: the next look tells
            told = ask(address, "status", seconds=2.0)
            for client in told["clients"]:
                name = client["name"]
                self.progress[name] = client["step"] or 0
                self.traffic[name] = (client["bytes_up"], client["bytes_down"])

    def _read_history(self) -> None:
        for row in self._file.rows():
            self._note(row)

    def _note(self, row: Row) -> None:
        if row["kind"] == "restart":
            self._restarts.append(row)
        self.history.append(row)
        self.live.row(row)

    def _clock(self) -> float:
        return self.history.now

    def _view(self) -> LiveView:
        states = {
            name: ("restarting" if child.restarts else "starting", child.reason)
            for name, child in self.children.items()
            if name not in self.history.clients and child.running()
        }
        shown = view(
            self.history,
            title=f"{self.spec.data.split(':')[0]}, {self.spec.strategy.split(':')[0]}, "
            f"{self.spec.partition}",
            target=self.spec.target,
            progress=self.progress,
            speeds=self.speeds,
            states=states,  # type: ignore[arg-type]
        )
        return replace(shown, clients=tuple(self._with_restarts(c) for c in shown.clients))

    def _with_restarts(self, client: ClientView) -> ClientView:
        child = self.children.get(client.name)
        return replace(client, restarts=child.restarts if child else 0)

    # ---- the end -------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        from atoll.server import plots

        spec, out = self.spec, self.spec.out
        if not self.history.rows:
            if not self.interrupted:
                what = f"nothing happened within {spec.timeout:g} s"
                raise ServerError("FL-S205", what, "give more --timeout")
            raise ServerError("FL-S208", "interrupted before anything happened", "start it again")
        title = f"{spec.data.split(':')[0]}, {spec.strategy}, {spec.partition}"
        files = {
            "model": self._model(),
            "history": out / "history.jsonl",
            "timeline": plots.timeline(self.history, out / "timeline.png", title),
            "accuracy": plots.accuracy(self.history, out / "accuracy.png", spec.target, title),
        }
        if self.history.taken:
            from atoll.server import strips

            files["shares"] = strips.shares(self.history, out / "shares.png", title)
        rows = sorted(self.history.rows, key=lambda r: float(r["t"]))
        files["history"].write_bytes(b"".join(map(line, rows)))
        best = max(self.history.series("accuracy"), key=lambda p: p.value, default=None)
        losses = {v: m.get("loss") for _, v, m in self.history.evaluations}
        reached = self.history.seconds_to("accuracy", spec.target)
        clients = [self._client_data(name) for name in self.names]
        return {
            "strategy": spec.strategy,
            "versions": self.history.version,
            "accuracy": best.value if best else None,
            "loss": losses.get(best.version) if best else None,
            "target_accuracy": spec.target,
            "reached": reached is not None,
            "elapsed_s": round(time.monotonic() - self._began, 3),
            "seconds_to_target": None if reached is None else round(reached, 3),
            "model_sha256": hashlib.sha256(files["model"].read_bytes()).hexdigest(),
            "bytes_up": sum(c["bytes_up"] for c in clients),
            "bytes_down": sum(c["bytes_down"] for c in clients),
            "epsilon": self.history.epsilon,
            "files": {name: str(path) for name, path in files.items()},
            "clients": clients,
        }

    def _model(self) -> Path:
        """The best version that is kept, else the newest."""
        from atoll.server.offline import best_model

        made = self.spec.out / "model.safetensors"
        shutil.copyfile(best_model(self.state, self.history), made)
        return made

    def _client_data(self, name: str) -> dict[str, Any]:
        totals = self.history.clients.get(name)
        child = self.children.get(name)
        up, down = self.traffic.get(name, (0, 0))
        return {
            "name": name,
            "speed": self.speeds[name],
            "updates": totals.updates if totals else 0,
            "steps": totals.steps if totals else 0,
            "mean_staleness": round(totals.mean_staleness, 3) if totals else 0.0,
            "bytes_up": max(up, totals.bytes_up if totals else 0),
            "bytes_down": max(down, totals.bytes_down if totals else 0),
            "restarts": child.restarts if child else 0,
        }


def failure_of(child: Child, otherwise: str) -> AtollError:
    """What a process said before it died: its own error, code and all."""
    words = child.last_words(6)
    words = words[max(0, words.rfind("error FL-")) :]
    code, _, rest = words.removeprefix("error ").partition(": ")
    lines = [part.strip() for part in rest.splitlines()]
    hint = next((part.removeprefix("fix").strip() for part in lines if part[:3] == "fix"), "")
    if code.startswith("FL-") and lines:
        return ServerError(code, lines[0], hint)
    full = f"{child.name} cannot write to {child.folder}: its disk is full"
    error = ServerError("FL-S203", full, "free space there, or give another --out")
    if child.code == error.exit_code:  # it could not even say so
        return error
    return ServerError("FL-S204", otherwise, f"see {child.err}")
