"""Donors: a model in pieces from several peers, whoever of them fails, lies or has gone on."""

import asyncio

import pytest
import torch

from atoll.aggregation.sync_engine import SyncState
from atoll.p2p import donor
from atoll.p2p.donor import Found, Shelved, download
from atoll.protocols.errors import RemoteError


def model(seed: int) -> SyncState:
    generator = torch.Generator().manual_seed(seed)
    outer = {"steps": torch.tensor([seed]), "velocity": torch.randn(3000, generator=generator)}
    return SyncState(torch.randn(3000, generator=generator), outer, seed)


class Donors:
    """Shelves by name; `fault[name]` is raised, `lies` flip a bit."""

    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.model = model(1)
        self.shelves = {name: Shelved(lambda: self.now) for name in names}
        for shelf in self.shelves.values():
            shelf.put("c", self.model)
        self.fault: dict[str, RemoteError] = {}
        self.lies: set[str] = set()
        self.asked: list[str] = []

    async def fetch(self, peer: str, name: str, dest: memoryview) -> None:
        await asyncio.sleep(0)
        self.asked.append(peer)
        if peer in self.fault:
            raise self.fault[peer]
        dest[:] = self.shelves[peer].find(name).view
        if peer in self.lies:
            dest[0] ^= 1

    async def get(self) -> Found:
        like = model(2)
        names = tuple(self.shelves)
        return await download(self.fetch, like, "c", 7, names, self.model.digest)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(donor, "PIECE", 1024)


def test_all_donors_give_and_the_bits_are_theirs() -> None:
    donors = Donors("a", "b", "c")
    found = asyncio.run(donors.get())
    assert found.model is not None
    assert found.model.digest == donors.model.digest
    assert found.model.round == 7
    assert not found.doubted
    assert {*donors.asked} == {"a", "b", "c"}
    assert len(donors.asked) == 25  # 12 pieces of each vector, and one of the steps


def test_a_donor_that_dies_costs_nothing_but_its_pieces() -> None:
    donors = Donors("a", "b")
    donors.fault["b"] = RemoteError("FL-P203", "b does not answer", "")
    found = asyncio.run(donors.get())
    assert found.model is not None
    assert found.doubted == ["b"]


def test_a_donor_that_has_gone_on_is_not_blamed() -> None:
    donors = Donors("a")
    donors.shelves["b"] = Shelved(lambda: 0.0)
    found = asyncio.run(donors.get())
    assert found.model is not None
    assert not found.doubted


def test_a_donor_that_gives_other_bits_is_found_out_and_doubted() -> None:
    donors = Donors("b", "a")
    donors.lies = {"b"}
    found = asyncio.run(donors.get())
    assert found.model is not None
    assert found.model.digest == donors.model.digest
    assert found.doubted == ["b"]


def test_where_nobody_gives_the_right_bits_there_is_no_model() -> None:
    donors = Donors("a", "b")
    donors.lies = {"a", "b"}
    found = asyncio.run(donors.get())
    assert found.model is None
    assert found.doubted == ["a", "b"]
    alone = Donors("a")
    alone.fault["a"] = RemoteError("FL-P203", "it does not answer", "")
    assert asyncio.run(alone.get()).model is None


@pytest.mark.parametrize(
    "name", ["state/c/99", "state/c/-1", "state/c/x", "state/c", "state/z/0", "state/c/" + "9" * 99]
)
def test_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RemoteError) as refused:
        Donors("a").shelves["a"].find(name)
    assert refused.value.code == "FL-P402"


def test_an_old_model_is_kept_while_somebody_fetches_it() -> None:
    donors = Donors("a")
    shelf = donors.shelves["a"]
    shelf.find("state/c/0")
    donors.now = 5.0
    shelf.put("d", model(2))
    shelf.find("state/c/1")  # asked for 5 s ago
    donors.now = 14.0
    shelf.put("e", model(3))
    shelf.find("state/c/2")
    with pytest.raises(RemoteError):
        shelf.find("state/d/0")  # nobody wanted it
    donors.now = 25.0
    shelf.put("f", model(4))
    with pytest.raises(RemoteError):
        shelf.find("state/c/3")
