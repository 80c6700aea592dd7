"""What a founder prints when others can join."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.p2p import folder as folders
from atoll.p2p import founding, invite, peer
from atoll.p2p.cli import cli
from atoll.protocols import console
from tests.p2p.people import INVITE
from tests.p2p.test_cli import STATUS, TEXT

HERE = "/ip4/127.0.0.1/tcp/37019/p2p/" + INVITE.addresses[0].rpartition("/")[2]


class Peer:
    """One that finds its port taken, comes up at another, and stops."""

    addresses: tuple[str, ...] = (HERE,)

    def __init__(self, *_: Any, watch: Any, **__: Any) -> None:
        self._told = watch

    async def run(self) -> None:
        self._told({**STATUS, "addresses": list(self.addresses)})
        raise asyncio.CancelledError


async def found(wish: Any, place: Path, listen: tuple[str, ...], **_: Any) -> Any:
    folders.write(place, folders.About(TEXT, "one", listen, "cpu", 1.0))
    return INVITE, SimpleNamespace(run=INVITE.run, name="trial", elements=4, speed=1.0)


@pytest.mark.parametrize("there", [(HERE,), ()])
def test_a_founder_prints_where_it_is_and_not_where_it_meant_to_be(
    there: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another run was founded beside it at once, got the port, and all who joined knocked there."""
    monkeypatch.setattr(founding, "found", found)
    monkeypatch.setattr(peer, "Peer", Peer)
    monkeypatch.setattr(Peer, "addresses", there)
    options = ["init", "--host", "127.0.0.1", "--folder"]
    assert console.run(cli, [*options, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out.split("fl-peer join ")[1].split()[0]
    assert console.run(cli, [*options, str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["data"]
    assert told["invite"] == printed
    assert tuple(told["addresses"]) == invite.read(printed).addresses == (there or INVITE.addresses)
