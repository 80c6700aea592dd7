"""Settling: state, outbox, acknowledgement, in this order; where the state fails, neither."""

import asyncio
import shutil
from pathlib import Path

import pytest

from atoll.client.outbox import Outbox
from atoll.client.settling import Settling
from atoll.client.work import Workbench
from atoll.protocols.codecs import codec
from atoll.protocols.errors import AtollError
from tests.client.test_keep import dc, opened, values
from tests.client.test_work import MANIFEST, Adding, do, order


class Client:
    """A result that waits for its outcome, with private state where `held`."""

    def __init__(self, folder: Path, held: bool = True) -> None:
        self.folder = folder
        self.outbox, self.keep = Outbox(folder / "out"), opened(folder / "keep")
        fp32 = codec("fp32")
        self.bench = Workbench(Adding(), MANIFEST, fp32, fp32, self.outbox, self.keep)
        self.update = do(self.bench, order()).update
        if held:
            self.keep.hold(self.update, dc(3))
        self.heard: list[str] = []
        self.failed: list[AtollError] = []

    def acknowledged(self, update: str) -> None:
        assert self.outbox.get(update) is None, "the outbox lets go first"
        assert values(self.keep, "variates") == [3], "and the state before that"
        self.heard.append(update)

    async def settled(self) -> Settling:
        made = Settling(self.keep, self.outbox, self.acknowledged, self.failed.append)
        made.begin(self.bench, self.update, "used")
        return made


def test_the_state_comes_first_then_the_outbox_then_the_server(tmp_path: Path) -> None:
    client = Client(tmp_path)

    async def work() -> None:
        settling = await client.settled()
        assert client.update in settling
        assert client.outbox.get(client.update) is not None
        await settling.close()
        assert client.update not in settling

    asyncio.run(work())
    assert client.heard == [client.update]
    assert not client.failed


def test_where_nothing_is_held_the_outbox_lets_go_at_once(tmp_path: Path) -> None:
    client = Client(tmp_path, held=False)

    async def work() -> None:
        settling = await client.settled()
        assert client.update not in settling  # whoever is told again acknowledges it himself
        assert client.outbox.get(client.update) is None
        await settling.close()

    asyncio.run(work())
    assert client.heard == []


def test_a_state_that_cannot_be_written_is_told_and_the_result_stays(tmp_path: Path) -> None:
    client = Client(tmp_path)
    shutil.rmtree(tmp_path / "keep")

    async def work() -> None:
        settling = await client.settled()
        await settling.close()
        assert client.update in settling, "it is not acknowledged when it is told again"

    asyncio.run(work())
    assert client.heard == []
    assert client.outbox.get(client.update) is not None
    with pytest.raises(AtollError):
        raise client.failed[0]
