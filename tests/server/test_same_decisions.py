"""Real driver and simulator: for the same arrivals, the same decisions in the same order."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Strategy
from atoll.protocols.events import Action, Event, Merged, Then
from atoll.server.clock import Clock
from atoll.server.digest import Digest
from atoll.server.driver import Driver
from atoll.server.journal import Journal
from atoll.server.replay import replay
from atoll.server.rules import Rules
from atoll.server.run import Deliver, Effect, Merge, Order, Outcome, Run, Tell
from atoll.server.simulator import simulate
from atoll.server.world import crowd, exponential

Rows = list[tuple[float, Event, list[Action]]]

MAKERS: list[Callable[[], Strategy]] = [
    lambda: FedAvg(steps=10, deadline=30.0, over_select=1.3, fraction=0.5),
    lambda: FedAvg(steps=10, deadline=30.0, late="stale"),
    lambda: FedBuff(size=3, steps=10, max_age=20.0),
    lambda: FedCompass(min_steps=5, max_steps=25, min_clients=3),
]


class Hand(Clock):
    """A run's clock that is moved by hand."""

    at = 0.0

    def now(self) -> float:
        return self.at


class Instant:
    """Merges as soon as it is asked to, and keeps what it hears."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.driver: Driver | None = None
        self.merged = asyncio.Event()

    def merge(self, merge: Merge) -> None:
        assert self.driver is not None
        self.merged.clear()
        used = tuple(update for update, _ in merge.items)
        self.driver.post(Merged(merge.version, used), then=self.merged.set)

    def quick(self, merge: Merge) -> bool:
        return False

    def heard(
        self, now: float, event: Event, actions: list[Action], effects: list[Effect]
    ) -> Callable[[], None]:
        return lambda: self.rows.append((now, event, actions))

    def ready(self, effect: Deliver | Tell) -> None: ...

    def deliver(self, order: Order) -> None: ...

    def interrupt(self, order: Order, then: Then) -> None: ...

    def tell(self, client: str, outcome: Outcome) -> None: ...

    def spent(self) -> tuple[list[str], list[tuple[str, str]]]:
        return [], []

    def busy(self) -> bool:
        return False


async def driven(strategy: Strategy, arrivals: Rows, path: Path) -> Rows:
    """What the real driver hears and decides when these inputs come at these times."""
    world, clock, run = Instant(), Hand(), Run(strategy)
    journal = Journal(path, "r", durable=False)
    driver = world.driver = Driver(run, journal, world, Rules(), clock)
    serving = asyncio.create_task(driver.serve())
    for now, event, _ in arrivals:
        if isinstance(event, Merged):  # it posts them itself
            continue
        clock.at = now
        handled = asyncio.Event()
        driver.post(event, then=handled.set)
        await handled.wait()
        while run.merging:
            await world.merged.wait()
    await serving
    journal.close()
    return world.rows


@pytest.mark.parametrize("make", MAKERS)
def test_driver_and_simulator_decide_the_same(make: Callable[[], Strategy], tmp_path: Path) -> None:
    simulated: Rows = []
    models = [replace(m, uptime=60.0, downtime=12.0) for m in crowd(5, exponential(0.4), 7)]
    found = simulate(
        make(), models, 120.0, 7, lease=8.0, listen=lambda *heard: simulated.append(heard)
    )
    real = asyncio.run(driven(make(), simulated, tmp_path / "journal.sqlite"))
    assert real == simulated
    digest = Digest()
    for row in real:
        digest.feed(*row)
    assert digest.hex() == found.hash
    assert found.versions > 3
    journal = Journal(tmp_path / "journal.sqlite", "r", durable=False)
    assert journal.seq == len(simulated)
    journal.close()


@pytest.mark.parametrize("make", MAKERS)
def test_what_the_driver_decided_is_decided_again_in_a_replay(
    make: Callable[[], Strategy], tmp_path: Path
) -> None:
    simulated: Rows = []
    paces = {"a": 0.3, "b": 0.5, "c": 1.1}
    simulate(make(), paces, 60.0, listen=lambda *heard: simulated.append(heard))
    real = asyncio.run(driven(make(), simulated, tmp_path / "journal.sqlite"))
    assert replay(make(), real) == len(real)
