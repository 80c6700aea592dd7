"""Processes killed without warning, at the worst moments: the run ends at its target all the same.

After each run the journal is gone through: every update was used or discarded exactly once, and
versions came one after another.
"""

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from atoll.client.client import Client
from atoll.client.options import Options, maker
from atoll.protocols import messages

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow


class Witness(Client):
    """A client that writes down which bytes it was told that a version has."""

    seen: dict[int, set[bytes]]

    def _ordered(self, order: messages.Order) -> None:
        self.seen.setdefault(order.version, set()).add(order.model.sha256)
        super()._ordered(order)


def witness(address: str, index: int, folder: Path) -> Witness:
    options = Options(f"w{index}", shard=(index, 2), slowdown=0.004)
    made = Witness(address, maker(options), name=f"w{index}", folder=folder / f"w{index}")
    made.seen = {}
    return made


@pytest.mark.parametrize(
    ("strategy", "save_every", "seed"),
    [("fedavg:steps=10,min_clients=2", 1, 0), ("fedbuff:size=2,steps=8", 3, 1)],
)
def test_a_server_killed_thrice_ends_at_its_target_without_a_fork(
    federation: "Federation", strategy: str, save_every: int, seed: int
) -> None:
    options = [
        "--strategy", strategy, "--target-accuracy", "0.93", "--save-every", str(save_every),
        "--lease", "10", "--keep", "3",
    ]  # fmt: skip
    rng = random.Random(seed)
    server = federation.server(*options)
    witnesses = [witness(federation.address, i, federation.folder) for i in range(2)]
    guests = [federation.guest(one) for one in witnesses]
    for _ in range(3):
        from_version = federation.merged()
        end = time.monotonic() + 30
        while federation.merged() < from_version + rng.randint(1, 3):
            assert server.alive, server.said()
            assert time.monotonic() < end, server.said()
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        server.kill()
        server = federation.server(*options)
    data = server.data()
    assert data["metrics"]["accuracy"] >= 0.93
    for guest in guests:
        guest.ended()
    federation.ledger().check()
    seen: dict[int, set[bytes]] = {}
    for one in witnesses:
        for version, hashes in one.seen.items():
            seen.setdefault(version, set()).update(hashes)
    assert all(len(hashes) == 1 for hashes in seen.values()), "a version was made twice, otherwise"
