"""Runs whose server keeps a row for each client: dead and alive again, with the same bits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.protocols import tensors, wire_pb2
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.codecs import Fp32
from atoll.protocols.errors import RemoteError, ServerError
from atoll.server.run import Merge
from atoll.server.sessions import Session
from atoll.server.table import Table
from tests.server.test_workshop import BIG, Life, blob


class Scaffolding(Life):
    """SCAFFOLD's server; its client's gradients are half of what its model moved by."""

    def __init__(self, folder: Path, elements: int = 4, **spec: Any) -> None:
        super().__init__(folder, elements, **{"algorithm": "scaffold:table=server", **spec})

    def packed(self, order: str, value: float) -> tuple[BlobInfo, bytes]:
        """An update whose delta is `value` everywhere."""
        manifest, found = self.assembly.manifest, self.host.run.order("c", order)
        assert found is not None
        count, up = manifest.counts["trainable"], self.assembly.workshop.extras.up
        numbers = self.assembly.store.open(found.version).facts.numbers
        row = self.table.row(numbers, "c")
        mean = torch.full((count,), value / 2 + int(order[1:]))
        vectors = {"dc": mean if row is None else mean - row}
        said = {"steps": 1.0, "lr": 0.1, "commits": numbers.get("commits/c", 0.0)}
        groups = {"trainable": torch.full((count,), value)}
        groups |= tensors.extra_groups(up, vectors, said, ("steps", "lr", "commits"))
        sections, view = tensors.pack(manifest, groups, Fp32(), extras=up)
        return blob(sections, bytes(view)), bytes(view)

    @property
    def table(self) -> Table:
        table = self.assembly.workshop.merger.table
        assert table is not None
        return table

    def rows(self, *versions: int) -> list[Tensor]:
        """The client's in these versions."""
        found = []
        for version in versions:
            row = self.table.row(self.assembly.store.open(version).facts.numbers, "c")
            assert row is not None
            found.append(row.clone())
        return found

    def saving(self, versions: int) -> list[Any]:
        """Steps of `live`: every version is saved before the next is made."""

        async def saved() -> None:
            shop, run = self.assembly.workshop, self.host.run
            await self.until(lambda: shop._durable[-1:] == [run.published])
            await self.until(lambda: not self.host._saver.busy)

        return [1, saved] * versions

    def files(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "rows").iterdir())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("elements", [4, BIG])
def test_versions_and_rows_that_were_not_saved_are_made_again(
    tmp_path: Path, elements: int
) -> None:
    life = Scaffolding(tmp_path, elements, save_every=100, keep=9)
    life.live(5)
    before, rows = life.hashes(), life.rows(3, 4, 5)
    assert not torch.equal(rows[0], rows[2])
    life.die()
    for number in (3, 4, 5):
        shutil.rmtree(tmp_path / "versions" / str(number), ignore_errors=True)
    (tmp_path / "rows" / "c.4").write_bytes(b"torn")
    (tmp_path / "rows" / "c.5").unlink()
    (tmp_path / "rows" / "c.6.part").write_bytes(b"half")
    again = Scaffolding(tmp_path, elements, save_every=100, keep=9)
    made = again.hashes()
    assert {n: made[n] for n in (0, 3, 4, 5)} == {n: before[n] for n in (0, 3, 4, 5)}
    assert same(again.rows(3, 4, 5), rows)
    again.live(2)
    assert again.host.run.published == 7
    again.die()


def test_a_run_killed_between_a_row_and_its_version_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row that no version speaks of is written over."""
    whole = Scaffolding(tmp_path / "whole", BIG)
    whole.live(3)
    life = Scaffolding(tmp_path / "killed", BIG)

    def rows_and_no_more(asked: Merge) -> None:
        life.assembly.workshop.stock.merges.append(asked)
        with monkeypatch.context() as patch:
            patch.setattr("atoll.server.draft.Draft.seal", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                life.assembly.workshop.make(asked)

    async def killed() -> None:
        monkeypatch.setattr(life.host, "merge", rows_and_no_more)
        await life.until(lambda: life.order() is not None)
        await life.send(str(life.order()), 0.25)
        await life.until(lambda: "c.3" in life.files())

    life.live(2, killed)
    assert life.assembly.store.saved()[-1] == 2
    life.die()
    (tmp_path / "killed" / "rows" / "c.3").write_bytes(b"whatever a killed process leaves")
    again = Scaffolding(tmp_path / "killed", BIG)

    async def redone() -> None:
        await again.until(lambda: again.host.run.published == 3)

    again.live(redone)
    assert again.hashes()[3] == whole.hashes()[3]
    assert same(again.rows(3), whole.rows(3))
    again.die()
    whole.die()


def test_a_damaged_row_is_made_again_with_its_version(tmp_path: Path) -> None:
    life = Scaffolding(tmp_path)
    life.live(4)
    before, rows = life.hashes()[4], life.rows(4)
    life.die()
    (tmp_path / "rows" / "c.4").write_bytes(b"\0" * 16)
    again = Scaffolding(tmp_path)
    assert again.hashes()[4] == before
    assert same(again.rows(4), rows)
    again.live(1)
    again.die()


def test_a_row_that_cannot_be_made_again_is_told_and_nothing_else_is_lost(tmp_path: Path) -> None:
    life = Scaffolding(tmp_path)
    life.live(*life.saving(5))
    life.die()
    left = life.files()
    for name in left:
        (tmp_path / "rows" / name).write_bytes(b"\0" * 16)
    with pytest.raises(ServerError, match=r"no whole version .* row 5 of client c .*damaged") as no:
        Scaffolding(tmp_path)
    assert no.value.code == "FL-S206"
    assert life.files() == left


def test_former_rows_are_forgotten_but_for_who_still_needs_them(tmp_path: Path) -> None:
    life = Scaffolding(tmp_path)
    life.live(*life.saving(9))
    life.die()
    assert life.files()[-1] == "c.9"
    assert 2 <= len(life.files()) <= 3  # the newest, and what it could be made again from


class Hearing(Session):
    """What a client is sent, without a stream."""

    def orders(self) -> list[wire_pb2.Order]:
        found = []
        for parts in self.out.rest():
            assert parts is not None
            message = wire_pb2.ServerMessage.FromString(b"".join(parts))
            found.append(message.order)
        return found


def test_an_order_brings_its_client_its_own_row_and_no_other(tmp_path: Path) -> None:
    life = Scaffolding(tmp_path)

    async def ordered() -> None:
        await life.until(lambda: life.order() is not None)
        outgoing, order, session = life.host.outgoing, life.host.run.open["c"], Hearing("c", 1)
        outgoing.order(session, order)
        [heard] = session.orders()
        assert [s.group for blob in heard.extras for s in blob.sections] == [
            "extra:control", "extra:variate",
        ]  # fmt: skip
        own = heard.extras[1]
        assert own.inline == life.rows(2)[0].numpy().tobytes()
        assert dict(heard.extra)["commits"] == 2.0
        assert not any("/" in name for name in heard.extra)
        assert outgoing.size(order) == outgoing.counted("c").down == 3 * 16
        assert bytes(outgoing.find_blob("c", own.id).view) == own.inline
        with pytest.raises(RemoteError, match="FL-W107"):
            outgoing.find_blob("d", own.id)
        (tmp_path / "rows" / "c.2").unlink()
        outgoing.order(session, order)
        assert session.orders() == []

    life.live(2, ordered)
    assert life.driver.error is not None
    assert life.driver.error.code == "FL-S206"
    assert "row 2 of client c" in life.driver.error.message
    life.die()


def test_a_run_whose_clients_have_no_rows_has_no_folder_for_them(tmp_path: Path) -> None:
    life = Life(tmp_path, algorithm="scaffold")
    life.die()
    assert not (tmp_path / "rows").exists()
