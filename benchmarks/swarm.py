"""Swarm: real peers over real hivemind, each a process, whose work is known beforehand.

What a peer does is a function of its name and the round, so each checks every mean that it applies
against the exact one of the group. Used by the benchmarks of peers and by their slow tests.

A peer prints a line of JSON for each thing that happens: {"event", "round", "at", ...}, `at` on a
clock that all processes of a machine share. `die` names the moment at which it kills itself.
"""

import asyncio
import hashlib
import importlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
MOMENTS = ("train", "reduce", "made", "vote", "decided", "bind", "mean", "model")


# ---- one peer's process -------------------------------------------------------------------------


def work_of(name: str, round_: int, elements: int) -> Any:
    """A peer's delta, fp32."""
    import torch

    seed = int.from_bytes(hashlib.sha256(f"{name} {round_}".encode()).digest()[:4], "big")
    return torch.empty(elements).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))


def known_manifest(elements: int, rounds: int, peer: str, founder: str, **patience: Any) -> Any:
    from atoll.aggregation.circle import Patience
    from atoll.p2p.manifest import Manifest

    return Manifest(
        run="01SWARM", name="known work", model="none", data="none", seed=0, local_steps=8, batch=1,
        lr=1.0, outer="nesterov", codec="fp32", rounds=rounds, elements=elements, schema="known",
        init="0" * 64, speed=1.0, founder=founder, peer=peer, patience=Patience(**patience),
    )  # fmt: skip


@dataclass
class Done:
    delta: Any
    factor: float = 1.0
    steps: int = 8
    tokens: int = 8
    loss: float = 1.0


class Known:
    """The training half: its work is `work_of`, after `pause` seconds."""

    def __init__(
        self, name: str, elements: int, pause: float, tell: Callable[..., None], lies: str
    ) -> None:
        import torch

        from atoll.aggregation.outer import Nesterov
        from atoll.aggregation.sync_engine import SyncEngine
        from atoll.p2p.work import Facts

        self.engine = SyncEngine(Nesterov(), torch.zeros(elements))
        self.facts = Facts(elements, "known", "0" * 64)
        self._name, self._elements, self._pause, self._tell = name, elements, pause, tell
        self.lies = lies

    async def train(self, steps: int) -> Done:
        import torch

        if self.lies == "nan":
            return Done(torch.full((self._elements,), float("nan")))
        round_ = self.engine.state.round
        self._tell("train", round=round_)
        await asyncio.sleep(self._pause)
        return Done(await asyncio.to_thread(work_of, self._name, round_, self._elements))

    def bench(self, seconds: float) -> float:
        return 1e9 if self.lies == "hostile" else 1.0

    def close(self) -> None:
        pass


def tell(event: str, **more: object) -> None:
    line = json.dumps({"event": event, "at": time.monotonic(), **more}) + "\n"
    os.write(1, line.encode())  # at once, whatever comes next


def process(told: Mapping[str, Any]) -> None:
    """One peer, as `told`: see `Swarm.start`."""
    import torch

    from atoll.p2p.invite import read
    from atoll.p2p.peer import Peer
    from atoll.protocols.loops import run

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    folder, name = Path(told["folder"]), told["name"]
    moment, _, at_round = told["die"].partition(":")

    class Observed(Peer):
        async def _find(self, who: str, blob: str) -> Any:
            found = await super()._find(who, blob)
            false = {"short": "in/", "bits": "state/"}.get(told["lies"], "none")
            if not blob.startswith(false):
                return found
            tell("lies", blob=blob)
            view = bytearray(found.view)
            view[0] ^= 1
            given = memoryview(view[:-4] if told["lies"] == "short" else view)
            return replace(found, info=replace(found.info, sha256=b"", size=len(given)), view=given)

        async def _live(self) -> Any:
            self._observe()
            if told["lies"] != "hostile":
                return await super()._live()
            torment = importlib.import_module("hostile").torment
            deeds = asyncio.create_task(torment(self, tell))
            try:
                return await super()._live()
            finally:
                deeds.cancel()

        def _names(self) -> dict[str, str]:
            members = [self._gate.me, *self._gate.roster.entries()]
            return {entry.peer: entry.name for entry in members}

        def _round(self) -> int:
            return self._driver.tally.round

        def _moment(self, this: str) -> None:
            if this == moment and self._round() >= int(at_round):
                tell("dies", moment=this, round=self._round())
                os.kill(os.getpid(), signal.SIGKILL)

        def _observe(self) -> None:
            driver: Any = self._driver
            memory: Any = self._memory
            work: Any = self._work
            engine: Any = work.engine
            apply, reduce, over, bind = driver._apply, driver._reduce, driver._over, driver._bind
            commit, train, write = engine.commit, work.train, memory._write
            keep_model = memory.keep_model

            def applied(value: Any, used: bool) -> None:
                names = self._names()
                self.group = [names.get(p, "?") for p in value.group]
                self.weights = list(value.weights)
                apply(value, used)

            def committed(mean: Any) -> Any:
                round_ = engine.state.round
                share, group = sum(self.weights), self.group
                exact = torch.zeros_like(mean)
                for who, weight in zip(group, self.weights, strict=True):
                    if weight:
                        exact.add_(work_of(who, round_, len(mean)), alpha=weight / share)
                error = float((exact - mean).abs().max())
                state = commit(mean)
                tell(
                    "commit", round=state.round, group=group, weights=self.weights, error=error,
                    digest=state.digest,
                )  # fmt: skip
                return state

            def reduces(chain: str, ballot: Any, plan: Any, deadline: float) -> None:
                reduce(chain, ballot, plan, deadline)
                tell("reduce", round=self._round(), group=len(plan.group))
                if moment == "reduce":
                    asyncio.get_running_loop().call_later(0.02, self._moment, "reduce")

            async def binds(bound: Any, anyway: bool = False) -> None:
                before = driver._bound
                await bind(bound, anyway)
                if bound.accepted is not None and before.accepted is None:
                    self._moment("vote")
                if bound.stand != before.stand:
                    self._moment("decided")

            def writes(file: str, content: Any) -> None:
                def then(out: Any) -> None:
                    content(out)
                    out.flush()
                    self._moment("bind" if file == "state.json" else "mean")

                write(file, then)

            def keeps(chain: str, model: Any) -> None:
                self._moment("model")
                keep_model(chain, model)

            async def trains(steps: int) -> Any:
                self._moment("train")
                done = await train(steps)
                tell("ready", round=self._round())
                return done

            def ends(attempt: str, end: Any) -> None:
                tell("attempt", round=self._round(), end=type(end).__name__, why=str(end)[:200])
                self._moment("made")
                over(attempt, end)

            driver._apply, driver._reduce, driver._bind = applied, reduces, binds
            driver.exchange._over = ends
            engine.commit, work.train, memory._write = committed, trains, writes
            memory.keep_model = keeps

    def watch(status: Mapping[str, Any]) -> None:
        addresses = peer._gate.me.addresses
        tell("beat", round=status["round"], state=status["state"], addresses=addresses)

    pause, elements = told["pause"], told["elements"]
    lies = told["lies"]
    known = None if told["real"] else lambda m, me: Known(name, elements, pause, tell, lies)
    peer = Observed(
        folder, read(told["invite"]), bytes.fromhex(told["signed"]), name=name,
        listen=LOOPBACK if told["accepts"] else (), watch=watch, training=known,
    )  # fmt: skip

    async def live() -> Any:
        for one in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(one, peer.leave)
        tell("up")
        return await peer.run()

    from dataclasses import asdict

    tell("end", **asdict(run(live())))


# ---- all of them --------------------------------------------------------------------------------


@dataclass
class One:
    """A peer's process, and what it has told."""

    name: str
    popen: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            event = json.loads(line)
            self.events.append(event)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> float:
        at = time.monotonic()
        self.popen.kill()
        self.popen.wait(10)
        return at

    def close(self) -> None:
        """Killed, if it lives, and all that it told read."""
        self.kill()
        self._reader.join(10)
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    def told(self, event: str, **more: object) -> list[dict[str, Any]]:
        """Of this kind, with these values."""
        found = [e for e in list(self.events) if e["event"] == event]
        return [e for e in found if all(e.get(k) == v for k, v in more.items())]

    @property
    def round(self) -> int:
        return max((e["round"] for e in list(self.events) if "round" in e), default=-1)


class Swarm:
    """Peers of one run. `with` it: at the end all are killed."""

    def __init__(
        self,
        folder: Path,
        *,
        elements: int = 100_000,
        rounds: int = 0,
        pause: float = 0.2,
        real: Mapping[str, Any] | None = None,
        **patience: Any,
    ) -> None:
        """`real`: fields of a manifest for real training; else known work."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from hivemind.p2p import P2P

        from atoll.p2p import invite, manifest
        from atoll.p2p.identity import Identity

        self.folder, self.elements, self.pause, self.real = folder, elements, pause, bool(real)
        self.peers: dict[str, One] = {}
        self.former: list[One] = []  # lives that are over
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw()
        (folder / "a").mkdir(parents=True)
        P2P.generate_identity(str(folder / "a" / "identity.key"))
        me = Identity(folder / "a" / "identity.key").id
        made = known_manifest(elements, rounds, me, public.hex(), **patience)
        made = replace(made, **(real or {}))
        data = manifest.dump(made)
        self._signed = manifest.sign(data, key)
        self._invite = invite.Invite(
            (), made.run, manifest.digest(data), public, secrets.token_bytes(32)
        )

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.peers.values():
            one.close()

    def start(
        self,
        name: str,
        *,
        die: str = "",
        lies: str = "",
        accepts: bool = True,
        pause: float = -1.0,
    ) -> One:
        """A peer, for the first time or again; the first, `a`, has founded the run. `die`:
        "MOMENT:ROUND". `lies`: "nan" (its work is none), "short" (it gives too few bytes), "bits"
        (it gives other bits for its model), "hostile" (see `hostile.py`)."""
        from atoll.p2p import invite

        addresses = self.addresses()
        assert addresses or name == "a" or name in self.peers, "nobody is known yet"
        told = {
            "folder": str(self.folder / name), "name": name, "elements": self.elements,
            "invite": invite.write(replace(self._invite, addresses=addresses)),
            "signed": self._signed.hex() if name == "a" else "", "die": die or "never:0",
            "pause": self.pause if pause < 0 else pause, "real": self.real, "accepts": accepts,
            "lies": lies,
        }  # fmt: skip
        command = [sys.executable, __file__, json.dumps(told)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.err").open("ab") as err:
            popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=err, env=environment, cwd=self.folder
            )
        if name in self.peers:
            self.peers[name].close()
            self.former.append(self.peers[name])
        self.peers[name] = One(name, popen)
        return self.peers[name]

    def addresses(self) -> tuple[str, ...]:
        """Of whoever lives."""
        for one in self.peers.values():
            beats = one.told("beat")
            if one.alive and beats and beats[-1]["addresses"]:
                return tuple(beats[-1]["addresses"])
        return ()

    def up(self, *names: str, seconds: float = 180.0, **how: Any) -> None:
        """Start these, the founder first, and wait until all have had a beat."""
        for name in names:
            self.start(name, **how)
            if name == "a":
                self.until(self.addresses, seconds, "a")
        self.until(lambda: all(self.peers[n].told("beat") for n in names), seconds, "their beats")

    def until(self, true: Callable[[], object], seconds: float = 120.0, what: str = "") -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise AssertionError(
                    f"{what or 'it'} did not come true in {seconds:g} s{self.said()}"
                )
            time.sleep(0.01)

    def said(self) -> str:
        """The end of each one's log, for a failure."""
        found = []
        for name, one in self.peers.items():
            log = (self.folder / f"{name}.err").read_text()[-1500:]
            found.append(f"\n---- {name} {one.popen.poll()} {one.events[-3:]}\n{log}")
        return "".join(found)

    def commits(self) -> dict[int, list[tuple[str, dict[str, Any]]]]:
        """round -> (peer, what it told of that commit), of all its lives."""
        found: dict[int, list[tuple[str, dict[str, Any]]]] = {}
        for one in [*self.former, *self.peers.values()]:
            for event in one.told("commit"):
                found.setdefault(event["round"], []).append((one.name, event))
        return found

    @property
    def round(self) -> int:
        """The newest that anybody has applied."""
        return max(self.commits(), default=0)

    def forks(self) -> int:
        """Rounds that ended in more than one way."""
        return sum(len({e["digest"] for _, e in by}) > 1 for by in self.commits().values())


if __name__ == "__main__":
    process(json.loads(sys.argv[1]))
