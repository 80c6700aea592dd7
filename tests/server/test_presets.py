"""DiLoCo as a preset of a server, and its model the same, bit by bit, as peers make of it."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.aggregation.averager import Loopback
from atoll.aggregation.diloco import DiLoCo
from atoll.aggregation.outer import outer
from atoll.aggregation.sync_engine import SyncEngine
from atoll.protocols.codecs import codec
from atoll.protocols.events import Aggregate, ClientInfo, ClientJoined, Update, UpdateReceived
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import parse
from atoll.protocols.tensors import pack
from atoll.server.items import UpdateBytes
from atoll.server.merge import Merger
from atoll.server.presets import PRESETS, preset_of
from atoll.server.server import Server
from atoll.server.versions import VersionStore

COUNT = 70_001  # several tiles of a merge, with a rest
MANIFEST = Manifest((TensorSpec("w", (COUNT,), "float32", "trainable"),))
CLIENTS = {"a": 48, "b": 16, "c": 40}  # examples seen in a round


def deltas(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {c: torch.randn(COUNT, generator=generator) * 10.0**i for i, c in enumerate(CLIENTS)}


def by_server(folder: Path, start: Tensor, rounds: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Anchors of each version, by the strategy's own weights and the server's merge of them."""
    strategy = DiLoCo(steps=6, min_clients=3)
    for name in CLIENTS:
        strategy.handle(ClientJoined(name, ClientInfo(100, 1.0, ())), 0.0)
    store = VersionStore(folder, MANIFEST)
    merger = Merger(MANIFEST, outer=outer(PRESETS["diloco"].outer), tile=4096)
    version, made = store.initial({"w": start}), [start]
    for number in range(rounds):
        actions = []
        for name in ("c", "a", "b"):  # in whatever order they come
            update = Update(
                name, f"{name}{number}", name, number, 6, CLIENTS[name], 0.0, 1.0, {}, True, True
            )
            actions += strategy.handle(UpdateReceived(update), 1.0)
        [merge] = [action for action in actions if isinstance(action, Aggregate)]
        items = []
        for name, weight in merge.items:
            sections, data = pack(MANIFEST, {"trainable": deltas(number)[name]}, codec("fp32"))
            read = parse(MANIFEST, sections, data.toreadonly(), codec("fp32"), "update")
            items.append((UpdateBytes(name, read), weight))
        draft = store.draft(number + 1, number, merger.vectors)
        assert not merger.merge(version, draft, items).dropped
        version = draft.seal()
        made.append(version.flat("trainable").clone())
    merger.close()
    return made, dict(version.outer)


def by_peers(start: Tensor, rounds: int, shares: tuple[int, ...] | None) -> SyncEngine:
    """Each with an engine of its own and the weights of its examples; all hold the same."""
    engines = {name: SyncEngine(outer(PRESETS["diloco"].outer), start) for name in CLIENTS}

    async def play() -> None:
        group = Loopback(list(CLIENTS), shares)
        for number in range(rounds):
            given = deltas(number)
            found = await asyncio.gather(
                *(
                    group.seat(name).average(number, given[name], float(CLIENTS[name]))
                    for name in CLIENTS
                )
            )
            for engine, average in zip(engines.values(), found, strict=True):
                engine.commit(average.mean)

    asyncio.run(play())
    assert len({engine.state.digest for engine in engines.values()}) == 1
    return engines["a"]


@pytest.mark.parametrize("shares", [None, (1, 30_000, 40_000), (33_333, 36_668)])
def test_server_and_peers_make_the_same_model(
    tmp_path: Path, shares: tuple[int, ...] | None
) -> None:
    start = torch.randn(COUNT, generator=torch.Generator().manual_seed(99))
    anchors, state = by_server(tmp_path, start, 3)
    engine = by_peers(start, 3, shares)
    assert torch.equal(engine.state.anchor, anchors[-1])
    assert torch.equal(engine.state.outer["momentum"], state["momentum"])
    assert not torch.equal(anchors[-1], anchors[-2])


def test_the_preset_fills_what_nobody_said(tmp_path: Path) -> None:
    diloco = Server(strategy="diloco:steps=50", data="digits", folder=tmp_path / "a").spec
    assert diloco.outer == "nesterov:lr=0.7,momentum=0.9"
    assert diloco.local["optimizer"] == "adamw"
    assert diloco.local["keep_optimizer_state"] is True
    said = Server(
        strategy="diloco", outer="sgd", local={"lr": 0.5}, data="digits", folder=tmp_path / "b"
    ).spec
    assert (said.outer, said.local["lr"], said.local["optimizer"]) == ("sgd", 0.5, "adamw")
    fedavg = Server(strategy="fedavg", data="digits", folder=tmp_path / "c").spec
    assert (fedavg.outer, fedavg.local) == ("sgd", {})
    assert preset_of("my.own:diloco") == preset_of(DiLoCo()) == preset_of("fedavg")
