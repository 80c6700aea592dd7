"""The workshop, and what a restart makes of what it left: no version lost, none made otherwise."""

import asyncio
import hashlib
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atoll.aggregation.aggregator import aggregator
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.outer import outer
from atoll.aggregation.strategy import Strategy
from atoll.protocols import frames, tensors
from atoll.protocols.blobs import INLINE, BlobInfo, Section
from atoll.protocols.codecs import FP32
from atoll.protocols.codecset import Codecs
from atoll.protocols.errors import ServerError
from atoll.protocols.events import ClientInfo, ClientJoined, Evaluated, Merged
from atoll.protocols.ids import ulid
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.messages import Hello, Result
from atoll.server.assembly import Assembly
from atoll.server.merge import Merger
from atoll.server.rules import Rules
from atoll.server.run import Merge
from atoll.server.spec import RunSpec
from atoll.server.uploads import StoredUpdate, Uploads
from atoll.server.versions import VersionStore
from atoll.server.workshop import Stock, Workshop

MANIFEST = Manifest((TensorSpec("w", (4,), "float32", "trainable"),))


def packed(manifest: Manifest, value: float) -> tuple[BlobInfo, bytes]:
    """An update whose delta is `value` everywhere."""
    data = torch.full((manifest.counts["trainable"],), value).numpy().tobytes()
    return blob(tensors.sections_of(manifest, FP32), data), data


def blob(sections: tuple[Section, ...], data: bytes) -> BlobInfo:
    return BlobInfo("u", len(data), hashlib.sha256(data).digest(), sections)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    store = VersionStore(tmp_path / "versions", MANIFEST)
    merger = Merger(MANIFEST, aggregator("mean"), outer("momentum"), "weighted_mean")
    uploads = Uploads(tmp_path / "updates", min_free=0)
    uploads.sweep(())
    store.save(store.initial({"w": torch.zeros(4)}))
    yield Workshop(store, merger, uploads, Codecs((), store.manifest), keep=2)
    merger.close()


def hold(shop: Workshop, update: str, value: float) -> None:
    shop.infos[update], data = packed(MANIFEST, value)
    shop.uploads.keep(update, data)


def merge(shop: Workshop, version: int, *updates: str) -> Merged:
    asked = Merge(version, tuple((u, 1.0 / len(updates)) for u in updates), "main", True)
    shop.stock.merges.append(asked)
    merged = shop.make(asked)
    shop.stock.published(merged)
    return merged


def values(shop: Workshop, version: int) -> list[float]:
    return [float(v) for v in shop.store.open(version).flat("trainable")]


def test_a_version_is_made_from_the_one_before_it(shop: Workshop) -> None:
    for number, value in ((1, 1.0), (2, 3.0)):
        hold(shop, f"o{number}.0", value)
        merged = merge(shop, number, f"o{number}.0")
        assert (merged.version, merged.used, merged.dropped) == (number, (f"o{number}.0",), ())
    assert values(shop, 1) == [-1.0] * 4
    assert values(shop, 2) == pytest.approx([-1.0 - (0.9 * 1.0 + 3.0)] * 4)


def test_what_cannot_be_used_is_dropped_with_its_reason(shop: Workshop) -> None:
    hold(shop, "o1.0", 1.0)
    merged = merge(shop, 1, "o1.0", "o2.0")
    assert merged.used == ("o1.0",)
    assert merged.dropped == (("o2.0", "its bytes are lost"),)
    assert [update for update, _ in shop.stock.merges[0].items] == ["o1.0"]


def test_a_merge_that_fails_leaves_no_draft(shop: Workshop) -> None:
    hold(shop, "o1.0", 1.0)
    shop.merger.close()
    shop.store.shelf.folder.joinpath("1.tmp").write_text("in the way")

    class Failing(Merger):
        def merge(self, *_: Any) -> Any:
            raise ZeroDivisionError

    shop.merger = Failing(MANIFEST, aggregator("mean"), outer("sgd"), "weighted_mean")
    with pytest.raises(ZeroDivisionError):
        merge(shop, 1, "o1.0")
    assert shop.store.numbers() == [0]


def test_bytes_are_kept_until_their_version_lies_on_disk_with_another_after_it(
    shop: Workshop,
) -> None:
    for number in (1, 2, 3):
        hold(shop, f"o{number}.0", 1.0)
        merge(shop, number, f"o{number}.0")
    assert shop.settle() == []
    shop.save(1)
    assert shop.settle() == []  # one that is damaged must be made again from the one before
    shop.save(2)
    assert shop.settle() == ["o1.0"]
    assert shop.settle() == []
    assert [m.version for m in shop.stock.merges] == [2, 3]
    shop.forget(["o1.0", "unknown"])
    assert shop.uploads.stored("o1.0") is None
    assert set(shop.infos) == {"o2.0", "o3.0"}


def test_a_version_that_was_only_sealed_frees_nothing(shop: Workshop) -> None:
    """Large versions lie in files from the start, but not for good: a power cut may take them."""
    small = shop.store
    shop.store = VersionStore(small.shelf.folder, MANIFEST, memory_limit=0)
    for number in (1, 2, 3):
        hold(shop, f"o{number}.0", 1.0)
        merge(shop, number, f"o{number}.0")
    assert shop.store.saved() == [0, 1, 2, 3]
    assert shop.settle() == []
    shop.save(2)
    shop.save(3)
    assert shop.settle() == ["o1.0", "o2.0"]


def test_old_versions_go_but_those_that_are_needed_stay(shop: Workshop) -> None:
    for number in range(1, 10):
        hold(shop, f"o{number}.0", 1.0)
        merge(shop, number, f"o{number}.0")
        shop.save(number)
    shop.forget(shop.settle())
    shop.best = 3
    shop.pin(5)
    shop.prune({"slow": 6})
    assert shop.store.numbers() == [0, 3, 5, 6, 8, 9]
    shop.unpin(5, best=None)
    shop.prune()
    assert shop.store.numbers() == [0, 3, 8, 9]
    hold(shop, "o10.0", 1.0)
    merge(shop, 10, "o10.0")
    shop.prune()  # 10 is on no disk yet: 8 and 9 must be there to make it again
    assert shop.store.numbers() == [0, 3, 8, 9, 10]
    shop.prune()
    assert shop.store.numbers() == [0, 3, 8, 9, 10]


def test_the_best_stays_pinned_until_it_is_kept_as_such(shop: Workshop) -> None:
    for number in range(1, 6):
        hold(shop, f"o{number}.0", 1.0)
        merge(shop, number, f"o{number}.0")
        shop.save(number)
    shop.settle()
    for number in (1, 2):
        shop.pin(number)
        shop.unpin(number, best=1)
    shop.prune()
    assert shop.store.numbers() == [0, 1, 4, 5]


def test_a_version_that_is_sealed_while_old_ones_are_chosen_stays(shop: Workshop) -> None:
    """It was made in the merging thread meanwhile, and was gone when it was to be judged."""
    for number in range(1, 6):
        hold(shop, f"o{number}.0", 1.0)
        merge(shop, number, f"o{number}.0")
        shop.save(number)
    shop.settle()
    hold(shop, "o6.0", 1.0)

    class Meanwhile(dict[str, int]):
        def values(self) -> Any:
            merge(shop, 6, "o6.0")
            return super().values()

    shop.prune(Meanwhile())
    assert shop.store.numbers() == [0, 4, 5, 6]


def test_a_version_is_made_again_with_the_same_bytes(shop: Workshop) -> None:
    hold(shop, "o1.0", 0.3)
    hold(shop, "o2.0", 0.7)
    merge(shop, 1, "o1.0", "o2.0", "o3.0")
    before = shop.store.open(1).sha256
    shop.store.prune([0])
    shop.rebuild(shop.stock.merges)
    assert shop.store.open(1).sha256 == before


def test_a_version_whose_bytes_are_gone_is_not_made_otherwise(shop: Workshop) -> None:
    hold(shop, "o1.0", 0.3)
    hold(shop, "o2.0", 0.7)
    merge(shop, 1, "o1.0", "o2.0")
    shop.forget(["o2.0"])
    shop.store.prune([0])
    with pytest.raises(ServerError, match=r"update o2\.0 is gone") as lost:
        shop.rebuild(shop.stock.merges)
    assert lost.value.code == "FL-S206"


def test_a_merge_of_nothing_that_can_be_used_changes_only_itself() -> None:
    merges = [Merge(v, ((f"o{v}.0", 1.0), (f"p{v}.0", 1.0)), "main", True) for v in (1, 2)]
    stock = Stock(list(merges))
    stock.published(Merged(2, ("o2.0",)))
    assert stock.merges == merges
    stock.published(Merged(2, (), (("o2.0", "x"), ("p2.0", "y"))))
    assert stock.merges == [merges[0], replace(merges[1], items=())]


# ---- a whole run, dead and alive again -------------------------------------------------------

SPEC = RunSpec("01HZX0000000000000000RVN00", data="", save_every=1)
BIG = INLINE // 4 + 8  # elements: such a version lies in a file from the start


class Life:
    """One life of a server without its port: inputs are posted, and it may die at any moment."""

    def __init__(
        self,
        folder: Path,
        elements: int = 4,
        rules: Rules | None = None,
        strategy: Strategy | None = None,
        **spec: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(elements))
        self.rules = rules or Rules()
        uploads = Uploads(folder / "updates", min_free=0)
        slots = {"strategy": strategy or FedBuff(size=1, steps=1), "model": model}
        made = replace(SPEC, **spec)
        self.assembly = Assembly(made, folder, self.rules, uploads, slots, None, None)
        self.host, self.driver = self.assembly.host, self.assembly.driver

    def live(self, *steps: "int | Callable[[], Awaitable[None]]") -> None:
        """Run until all steps are done: so many updates merged and saved, or what is given."""
        asyncio.run(self._live(steps))

    async def _live(self, steps: "tuple[int | Callable[[], Awaitable[None]], ...]") -> None:
        await self.assembly.begin()
        serving = asyncio.create_task(self.driver.serve())
        if not self.host.run.members:
            self.join()
        async with asyncio.timeout(10):
            for step in steps:
                await (self.merge(step) if isinstance(step, int) else step())
            await self.until(lambda: not self.host._saver.busy)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    def join(self) -> None:
        """The first client comes."""
        self.driver.post(ClientJoined("c", ClientInfo(1)))

    async def merge(self, updates: int) -> None:
        wanted = self.host.run.published + updates
        for _ in range(updates):
            await self.until(lambda: self.order() is not None)
            await self.send(str(self.order()), 0.25)
        await self.until(lambda: self.host.run.published >= wanted)
        noted = asyncio.Event()
        self.driver.after(noted.set)
        await noted.wait()

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)

    def order(self, client: str = "c") -> str | None:
        """The client's, once it can be fetched."""
        order = self.host.run.open.get(client)
        return None if order is None or order.started is None else order.id

    def packed(self, order: str, value: float) -> tuple[BlobInfo, bytes]:
        return packed(self.assembly.manifest, value)

    async def send(self, order: str, value: float, client: str = "c") -> None:
        info, data = self.packed(order, value)
        result = Result(order, 0, 1, 1, 0.1, info)
        update = self.host.intake.may_upload(client, result)
        assert update == result.update
        await self.host.intake.accepted(client, result, self.stored(result.update, info, data))

    def stored(self, update: str, info: BlobInfo, data: bytes) -> StoredUpdate:
        """Bytes that came in."""
        uploads = self.assembly.workshop.uploads
        if len(data) <= INLINE:
            return uploads.keep(update, data)
        uploads.open(update, len(data))
        for frame in frames.chunks(memoryview(data), "u", 0, digest=info.sha256):
            uploads.put(update, frames.parse(frame))
        return uploads.commit(update, info.sha256)

    def hashes(self) -> dict[int, bytes]:
        store = self.assembly.store
        return {number: store.open(number).sha256 for number in store.numbers()}

    def die(self) -> None:
        """As a killed process: nothing is flushed, everything is let go."""
        self.assembly.journal.abandon()
        self.host._merging.shutdown()
        self.host._saver._thread.shutdown()
        self.assembly.ledger.close()
        self.assembly.workshop.merger.close()


@pytest.mark.parametrize("elements", [4, BIG])
def test_versions_that_were_not_saved_are_made_again(tmp_path: Path, elements: int) -> None:
    life = Life(tmp_path, elements, save_every=100, keep=9)
    life.live(5)
    before = life.hashes()
    life.die()
    for number in (3, 4, 5):
        shutil.rmtree(tmp_path / "versions" / str(number), ignore_errors=True)
    again = Life(tmp_path, elements, save_every=100, keep=9)
    assert again.host.run.published == 5
    assert again.assembly.resumed
    made = again.hashes()
    assert {n: made[n] for n in (0, 3, 4, 5)} == {n: before[n] for n in (0, 3, 4, 5)}
    again.live(2)
    assert again.host.run.published == 7
    again.die()


def test_a_client_that_hangs_up_before_it_is_greeted_harms_nobody(tmp_path: Path) -> None:
    life = Life(tmp_path, 4)
    known = ("fp32", "fp16", "bf16")

    async def hang_up() -> None:
        hello = Hello(1, "", "hasty", ulid(), ClientInfo(1, None, known))
        waiting = asyncio.create_task(life.host.reception.greet(hello))
        await asyncio.sleep(0)  # it has asked
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    async def stay() -> None:
        session = await life.host.reception.greet(
            Hello(1, "", "c2", ulid(), ClientInfo(1, None, known))
        )
        assert life.host.sessions.of == {"c2": session}

    life.live(1, hang_up, 1, stay)
    assert life.host.run.published == 2
    life.die()


def test_a_version_sealed_but_not_journaled_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passed for the newest, was never published, and the run waited for it for ever."""
    life = Life(tmp_path, BIG)

    def sealed_and_no_more(asked: Merge) -> None:
        life.assembly.workshop.stock.merges.append(asked)
        life.assembly.workshop.make(asked)

    async def killed() -> None:
        monkeypatch.setattr(life.host, "merge", sealed_and_no_more)
        await life.until(lambda: life.order() is not None)
        await life.send(str(life.order()), 0.25)
        await life.until(lambda: life.assembly.store.saved()[-1] == 3)

    life.live(2, killed)
    before = life.hashes()[3]
    life.die()
    again = Life(tmp_path, BIG)
    assert again.host.run.published == 2

    async def redone() -> None:
        await again.until(lambda: again.host.run.published == 3)

    again.live(redone)
    assert again.host.run.published == 3
    assert again.hashes()[3] == before
    again.die()


def test_a_damaged_newest_version_is_set_aside_and_made_again(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.live(4)
    before = life.hashes()[4]
    life.die()
    path = tmp_path / "versions" / "4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"\0\0\1")
    again = Life(tmp_path)
    assert again.hashes()[4] == before
    assert (tmp_path / "versions" / "4.corrupt").exists()
    again.live(1)
    assert again.host.run.published == 5
    again.die()


def test_a_state_directory_without_a_whole_version_is_told(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.live(1)
    life.die()
    shutil.rmtree(tmp_path / "versions")
    with pytest.raises(ServerError, match="no whole version") as lost:
        Life(tmp_path)
    assert lost.value.code == "FL-S206"


def test_a_run_goes_on_with_the_limits_it_was_given_before(tmp_path: Path) -> None:
    first = Life(tmp_path, rules=Rules(versions=7, target=0.9))
    first.die()
    second = Life(tmp_path, rules=Rules(versions=9))
    assert (second.rules.versions, second.rules.target) == (9, 0.9)
    second.die()
    third = Life(tmp_path)
    assert (third.rules.versions, third.rules.target) == (9, 0.9)
    third.die()


def test_a_metric_heard_before_the_end_is_known_after_it(tmp_path: Path) -> None:
    life = Life(tmp_path)

    async def judged() -> None:
        life.driver.post(Evaluated(0, {"accuracy": 0.5}))

    life.live(judged, 2)
    life.die()
    again = Life(tmp_path)
    assert (again.rules.best, again.rules.best_version, again.assembly.workshop.best) == (0.5, 0, 0)
    again.die()


def test_a_slow_client_finds_the_version_of_its_order_whatever_came_since(tmp_path: Path) -> None:
    """Some versions later it was pruned, and the client was sent away with FL-W107."""
    life = Life(tmp_path, keep=2)

    async def joins() -> None:
        life.driver.post(ClientJoined("slow", ClientInfo(1)))
        await life.until(lambda: "slow" in life.host.run.open)

    async def saved() -> None:
        await life.until(lambda: not life.host._saver.busy)

    life.live(2, joins, saved, 1, saved, 1, saved, 1, saved, 1)
    assert life.host.run.open["slow"].version == 2
    assert life.assembly.store.numbers() == [0, 2, 5, 6]
    life.die()


def test_half_an_upload_stays_as_long_as_its_order_is_awaited(tmp_path: Path) -> None:
    """Its file stayed until the next start, and was the next one's when a server was restarted."""
    life = Life(tmp_path, keep=2)

    async def half() -> None:
        life.driver.post(ClientJoined("slow", ClientInfo(1)))
        await life.until(lambda: "slow" in life.host.run.open)
        life.assembly.workshop.uploads.open(f"{life.host.run.open['slow'].id}.0", 2 * INLINE)
        life.assembly.workshop.uploads.open("o99.0", 2 * INLINE)

    async def saved() -> None:
        await life.until(lambda: not life.host._saver.busy)

    life.live(2, saved, half, 1, saved)
    assert life.assembly.workshop.uploads.unfinished() == {f"{life.host.run.open['slow'].id}.0"}
    life.die()
