"""Swarm: real peers over real hivemind, each a process, whose work is known beforehand.

Each checks every mean that it applies against the exact one of its group (`swarm_peer.py`). Used by
the benchmarks of peers and by their slow tests.
"""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PEER = Path(__file__).with_name("swarm_peer.py")


def known_manifest(elements: int, rounds: int, peer: str, founder: str, **patience: Any) -> Any:
    from atoll.aggregation.circle import Patience
    from atoll.p2p.manifest import Manifest

    return Manifest(
        run="01SWARM", name="known work", model="none", data="none", seed=0, local_steps=8, batch=1,
        lr=1.0, outer="nesterov", codec="fp32", rounds=rounds, elements=elements, schema="known",
        init="0" * 64, speed=1.0, founder=founder, peer=peer, patience=Patience(**patience),
    )  # fmt: skip


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
        "MOMENT:ROUND" (`swarm_peer.py`). `lies`: "nan" (its work is none), "short" (it gives too
        few bytes), "bits" (it gives other bits for its model), "hostile" (see `hostile.py`)."""
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
        command = [sys.executable, str(PEER), json.dumps(told)]
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
