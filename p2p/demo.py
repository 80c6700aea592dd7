"""Demo: a swarm on this machine, every peer a process of its own, over real libp2p.

The first peer founds a run that waits for the others but one. When they have made a round the late
one joins; when the late one's work is in a mean, a third is killed. We read what each writes into
its `status.json`, and compare the digests that they give of the same round.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.p2p import folder as folders
from atoll.p2p.demo_view import PeerView, Show, SwarmView
from atoll.protocols import places
from atoll.protocols.children import Child
from atoll.protocols.errors import AtollError, PeerError, UsageError

POLL = 0.1  # seconds between two looks at the processes and what they have written
ENDING = 5.0  # seconds at most in which all say goodbye and write their models
FEWEST, MOST = 3, 16  # peers: the founder, the one that is killed and the late one must differ


@dataclass(frozen=True)
class SwarmSpec:
    """What `fl-peer demo` was asked for."""

    peers: int
    rounds: int
    steps: int  # between two rounds, of a peer as fast as the founder
    model: str
    data: str
    lr: float
    codec: str
    seed: int
    timeout: float  # seconds
    out: Path

    def __post_init__(self) -> None:
        if not FEWEST <= self.peers <= MOST:
            hint = f"give {FEWEST} to {MOST}: one founds, one comes late, one is killed"
            raise UsageError("FL-S108", f"--peers {self.peers}", hint)
        if not self.timeout > 2 * ENDING:
            hint = f"give seconds above {2 * ENDING:g}"
            raise UsageError("FL-S108", f"--timeout {self.timeout:g}", hint)


@dataclass
class Digests:
    """What peers said of the models they held, by round."""

    said: dict[int, dict[str, str]] = field(default_factory=dict)  # round -> peer -> digest

    def note(self, peer: str, made: int, digest: str) -> None:
        if made > 0 and digest:
            self.said.setdefault(made, {})[peer] = digest

    @property
    def compared(self) -> int:
        """Rounds of which two peers or more have said their digest."""
        return sum(len(of_round) > 1 for of_round in self.said.values())

    @property
    def forks(self) -> int:
        """Rounds of which two peers hold different models."""
        return sum(len(set(of_round.values())) > 1 for of_round in self.said.values())


class Swarm:
    """`run` returns the JSON data of the command."""

    def __init__(self, spec: SwarmSpec, show: Show, say: Callable[[str], None]) -> None:
        self.spec, self._show, self._say = spec, show, say
        self.interrupted = False
        self.names = [f"peer-{i}" for i in range(1, spec.peers + 1)]
        self.founder, self.victim, self.late = self.names[0], self.names[-2], self.names[-1]
        self.logs = spec.out / "logs"
        self.children: dict[str, Child] = {}
        self.digests = Digests()
        self.told: dict[str, dict[str, Any]] = {name: {} for name in self.names}  # last statuses
        self.killed_at: int | None = None  # round
        self.joined_at: int | None = None  # round of the late one's first mean
        self._came: set[str] = set()
        self._ended: set[str] = set()
        self._round = 0
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        spec = self.spec
        try:
            spec.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PeerError(
                "FL-P405", f"{spec.out}: {error.strerror or error}", "give another --out"
            ) from error
        places.target(spec.out / folders.MODEL)
        for left in (spec.out / "peers", self.logs):
            shutil.rmtree(left, ignore_errors=True)  # of an earlier demo in the same folder
        with self._processes(), self._show:
            self._found()
            while not self._over():
                self._look()
                self._act()
                self._show.show(self.view())
                time.sleep(POLL)
            self._look()
            self._show.show(self.view())
        return self._finish()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def folder(self, name: str) -> Path:
        return self.spec.out / "peers" / name

    # ---- processes -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _processes(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            try:
                end = time.monotonic() + ENDING
                for child in self.children.values():
                    child.ask_to_end()
                for child in self.children.values():
                    child.stop(max(0.0, end - time.monotonic()))
            except KeyboardInterrupt:  # they are not waited for
                self.interrupted = True
                for child in self.children.values():
                    child.stop(0.0)

    def _start(self, name: str, *arguments: str) -> None:
        fixed = (
            "--stop-with-stdin", "--json", "--name", name, "--folder", str(self.folder(name)),
            "--host", "127.0.0.1", "--port", "0", "--device", "cpu",
        )  # fmt: skip
        self.children[name] = Child(name, "atoll.p2p", (*arguments, *fixed), self.logs)
        self.children[name].start()

    def _found(self) -> None:
        spec = self.spec
        self._start(
            self.founder, "init", "--run", "demo", "--model", spec.model, "--data", spec.data,
            "--steps", str(spec.steps), "--lr", str(spec.lr), "--codec", spec.codec,
            "--rounds", str(spec.rounds), "--seed", str(spec.seed),
            "--first", str(spec.peers - 1),
        )  # fmt: skip

    def _join(self, name: str) -> None:
        self._start(name, "join", folders.read(self.folder(self.founder)).invite)

    def _over(self) -> bool:
        if self.elapsed > self.spec.timeout - ENDING:
            self._say(f"not all {self.spec.rounds} rounds within {self.spec.timeout:g} s")
            return True
        for name, child in self.children.items():
            if name == self.victim and self.killed_at is not None:
                continue
            if child.died():
                raise self._failed(child)
        return all(child.ended_well() for child in self._survivors())

    def _survivors(self) -> list[Child]:
        killed = self.killed_at is not None
        return [c for name, c in self.children.items() if not (killed and name == self.victim)]

    def _failed(self, child: Child) -> AtollError:
        """What a peer said before it died: its own error, code and all."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            error = json.loads(child.out.read_text())["error"]
            return PeerError(error["code"], f"{child.name}: {error['message']}", error["hint"])
        return PeerError("FL-P203", f"{child.name} ended: {child.reason}", f"see {child.err}")

    # ---- watching ------------------------------------------------------------------------------

    def _look(self) -> None:
        for name in self.children:
            told = folders.status(self.folder(name))
            if not told:
                continue
            self.told[name] = told
            self.digests.note(name, told["digested"], told["digest"])
            self._round = max(self._round, told["round"])
        for name in sorted(self.children):
            told = self.told[name]
            if told and name not in self._came:
                self._came.add(name)
                self._event(f"{name} is up" + (", late" if name == self.late else ""))
            if name not in self._ended and self.children[name].ended_well():
                self._ended.add(name)
                self._event(f"{name} has ended")

    def _act(self) -> None:
        if len(self.children) == 1 and self.told[self.founder]:
            for name in self.names[1:-1]:
                self._join(name)
        if self.late not in self.children and self._round >= 1:
            self._event(f"{self.late} is started late")
            self._join(self.late)
        if self.joined_at is None and self.told[self.late].get("rounds_joined", 0) >= 1:
            self.joined_at = self.told[self.late]["round"]
            self._event(f"the work of {self.late} is in a mean")
        if self.killed_at is None and self._ripe():
            self.children[self.victim].kill()
            self.killed_at = self._round
            self._event(f"{self.victim} is killed (SIGKILL)")

    def _ripe(self) -> bool:
        """Whether the one is killed: beside the late one, or, if that does not come, soon."""
        if self.victim not in self.children or not self.children[self.victim].running():
            return False
        joined = self.told[self.victim].get("rounds_joined", 0) >= 1
        return joined and (self.joined_at is not None or 3 * self._round >= 2 * self.spec.rounds)

    def _event(self, what: str) -> None:
        self._show.event(self.elapsed, what)

    # ---- what is shown -------------------------------------------------------------------------

    def view(self) -> SwarmView:
        spec, views = self.spec, tuple(self._peer(name) for name in self.names)
        losses = [v.loss for v in views if v.loss is not None and v.state != "killed"]
        return SwarmView(
            f"{spec.model} on {spec.data}", self.elapsed, self._round, spec.rounds,
            sum(losses) / len(losses) if losses else None, views, self.digests.forks,
        )  # fmt: skip

    def _peer(self, name: str) -> PeerView:
        told = self.told[name]
        if name == self.victim and self.killed_at is not None:
            state = "killed"
        elif name not in self.children:
            state = "to come"
        else:
            state = str(told.get("state", "starting"))
        return PeerView(
            name, state, told.get("round", 0), told.get("loss"), told.get("rounds_joined", 0),
            told.get("bytes_out", 0), told.get("bytes_in", 0),
        )  # fmt: skip

    # ---- the end -------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        self._look()
        if not self._round and not self.interrupted:
            what = f"no round within {self.spec.timeout:g} s"
            raise PeerError("FL-S205", what, "give more --timeout, or look into the logs")
        results = {child.name: _result(child) for child in self._survivors()}
        for name, result in results.items():
            if "digest" in result:
                self.digests.note(name, result["rounds"], result["digest"])
        ends = {(r.get("rounds"), r.get("digest")) for r in results.values()}
        founders = [self.told[name] for name in self.names[:-1]]
        equal = len(ends) == 1 and all("digest" in r for r in results.values())
        whole = all(r.get("rounds") == self.spec.rounds for r in results.values())
        views = [self._peer(name) for name in self.names]
        model = self._model()
        files = {"logs": self.logs, "peers": self.spec.out / "peers"}
        return {
            "peers": self.spec.peers,
            "rounds": self._round,
            "loss_first": _mean([told.get("loss_first") for told in founders]),
            "loss_last": _mean([r.get("loss_last") for r in results.values()]),
            "joined_late": int(self.joined_at is not None),
            "killed": int(self.killed_at is not None),
            "digests_equal": equal,
            "digest": next(iter(ends))[1] if equal else None,
            "forks": self.digests.forks,
            "rounds_compared": self.digests.compared,
            "reached": whole and equal and None not in (self.joined_at, self.killed_at),
            "joined_at_round": self.joined_at,
            "killed_at_round": self.killed_at,
            "bytes_up": sum(view.up for view in views),
            "bytes_down": sum(view.down for view in views),
            "elapsed_s": round(self.elapsed, 3),
            "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest() if model else None,
            "sample": results.get(self.founder, {}).get("sample", ""),
            "files": {**({"model": model} if model else {}), **files},
            "members": views,
        }

    def _model(self) -> Path | None:
        """The founder's: all hold the same."""
        made, kept = self.folder(self.founder) / folders.MODEL, self.spec.out / folders.MODEL
        if not made.exists():
            return None
        shutil.copyfile(made, kept)
        return kept


def _result(child: Child) -> dict[str, Any]:
    """What a peer printed at its end; {} where it printed nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return dict(json.loads(child.out.read_text())["data"])
    return {}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
