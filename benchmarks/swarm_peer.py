"""Swarm peer: one peer's process in a `Swarm`. Its work is known, so it can check every mean.

What a peer does is a function of its name and the round. It prints a line of JSON for each thing
that happens: {"event", "round", "at", ...}, `at` on a clock that all processes of a machine share.
`die` names the moment at which it kills itself: train, reduce, made, vote, decided, bind, mean or
model.
"""

import asyncio
import hashlib
import importlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def work_of(name: str, round_: int, elements: int) -> Any:
    """A peer's delta, fp32."""
    import torch

    seed = int.from_bytes(hashlib.sha256(f"{name} {round_}".encode()).digest()[:4], "big")
    return torch.empty(elements).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))


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

    tell("end", **asdict(run(live())))


if __name__ == "__main__":
    process(json.loads(sys.argv[1]))
