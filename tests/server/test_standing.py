"""Where a run stands, as its server tells it."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.aggregation.fedcompass import FedCompass
from atoll.protocols import wire_pb2
from atoll.protocols.events import ClientInfo, ClientJoined, Evaluated
from atoll.protocols.ids import ulid
from atoll.protocols.messages import Hello
from atoll.server.assembly import FLUSH
from atoll.server.server import Server
from tests.conftest import Logged
from tests.server.test_workshop import SPEC, Life

NODE = ulid()


def greeted(life: Life) -> Callable[[], Awaitable[None]]:
    """To come as a client that hears."""

    async def come() -> None:
        info = ClientInfo(1, None, ("fp32",))
        await life.host.reception.greet(Hello(1, "", "c", NODE, info))

    life.join = lambda: None  # type: ignore[method-assign]
    return come


def test_steps_are_those_of_the_order_in_training(tmp_path: Path) -> None:
    """An order just sent had 99 of 94 steps done, those of the one before, and was being sent."""
    life = Life(tmp_path)

    def told() -> tuple[str, Any]:
        clients: Any = life.assembly.status()["clients"]
        return clients[0]["order"], clients[0]["step"]

    def beat(order: str, step: int) -> None:
        heartbeat = wire_pb2.Heartbeat(order=order, step=step)
        life.host.message(life.host.sessions.of["c"], wire_pb2.ClientMessage(heartbeat=heartbeat))

    async def first() -> None:
        await life.until(lambda: life.order() is not None)
        assert told() == (life.order(), 0)
        beat(str(life.order()), 1)
        assert told() == (life.order(), 1)

    async def late() -> None:
        assert told() == (life.order(), 0)
        beat("o0", 1)  # it was on its way
        assert told() == (life.order(), 0)
        beat(str(life.order()), 1 << 60)
        assert told() == (life.order(), 1)

    life.live(greeted(life), first, 1, late)
    life.die()


def test_no_row_is_missing_after_a_kill_behind_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tenth of a second before it was not in the file yet, and the journal is read from
    there on: up to 19 versions were never told of, and status counted too few updates for ever."""
    monkeypatch.setattr("atoll.server.assembly.FLUSH", 60.0)
    life = Life(tmp_path)
    life.driver.snapshot_every = 4
    life.live(9)
    life.die()
    again = Life(tmp_path)
    again.live(1)
    again.assembly._flush()
    again.die()
    rows = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    merged = [row["version"] for row in rows if row["kind"] == "merged"]
    assert merged == list(range(1, 11))
    assert again.assembly.history.clients["c"].merged == 10


def test_a_history_that_was_cut_before_a_snapshot_is_told(tmp_path: Path, logged: Logged) -> None:
    life = Life(tmp_path)
    life.driver.snapshot_every = 4
    life.live(9)
    life.assembly._flush()
    life.die()
    again = Life(tmp_path)
    again.die()
    assert "history.jsonl" not in logged.text
    path = tmp_path / "history.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    cut = Life(tmp_path)
    cut.die()
    told = cut.assembly.history.versions
    assert 0 < told < 9
    published = cut.assembly.host.run.published
    assert f"history.jsonl tells of {told} versions of {published}: it was cut" in logged.text


def test_no_timer_is_left_of_rows_that_a_snapshot_wrote(tmp_path: Path) -> None:
    """It came when the file was closed: a traceback at the end of every eighth run."""
    life = Life(tmp_path)
    life.driver.snapshot_every = 2
    came: list[float] = []

    async def ending() -> None:
        loop, later = asyncio.get_running_loop(), life.assembly._in_time
        life.assembly._in_time = lambda: came.append(loop.time()) or later()  # type: ignore
        await life.merge(9)
        await life.assembly.end(over=False)
        ended = loop.time()
        await asyncio.sleep(2 * FLUSH)
        assert [at for at in came if at > ended] == []

    life.live(ending)
    life.assembly.close()


def test_a_server_that_is_stopped_while_it_writes_tells_of_what_was_written(tmp_path: Path) -> None:
    """The driver was cancelled: the history ended a round before the journal."""
    life = Life(tmp_path)
    server = Server.of(SPEC, tmp_path)
    begun, free = threading.Event(), threading.Event()
    journal = life.assembly.journal
    write = journal.write

    def slowly() -> None:
        begun.set()
        assert free.wait(10)
        write()

    async def stopped() -> None:
        server._loop, server._stop = asyncio.get_running_loop(), asyncio.Event()
        await life.assembly.begin()
        driving = asyncio.create_task(server._drive(life.assembly, None))
        life.join()
        await life.until(lambda: life.order() is not None)
        journal.write = slowly  # type: ignore[method-assign]
        sending = asyncio.create_task(life.send(str(life.order()), 0.25))
        await life.until(begun.is_set)
        server._stop.set()
        asyncio.get_running_loop().call_later(0.05, free.set)
        assert (await driving).updates == 1
        sending.cancel()

    asyncio.run(stopped())
    rows = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert [row["kind"] for row in rows if row["kind"] in ("update", "merged")] == [
        "update", "merged",
    ]  # fmt: skip


def test_a_summary_has_the_metrics_of_the_best_version_and_ends_with_the_run(
    tmp_path: Path,
) -> None:
    life = Life(tmp_path)

    async def judged() -> None:
        for version, accuracy in ((1, 0.5), (2, 0.75), (3, 0.25)):
            metrics = {"accuracy": accuracy, "loss": 1 / (version + 1)}
            life.driver.post(Evaluated(version, metrics))
        life.driver.stop("enough")
        await life.until(lambda: life.host.run.finished is not None)
        await asyncio.sleep(0.05)  # what it waits for after its end

    life.live(3, judged)
    told = life.assembly.summary()
    status = life.assembly.status()
    assert (status["latest"], status["latest_version"]) == (0.25, 3)
    life.die()
    assert (told.best_version, told.metrics) == (2, {"accuracy": 0.75, "loss": 1 / 3})
    assert told.seconds == life.assembly.history.ended
    assert told.seconds <= life.assembly.clock.now() - 0.05
    again = Life(tmp_path)
    again.die()
    assert again.assembly.summary().metrics == told.metrics
    assert again.assembly.summary().seconds == told.seconds


def test_arrival_groups_are_in_the_history_once_while_they_stay_the_same(tmp_path: Path) -> None:
    strategy = FedCompass(min_steps=1, max_steps=4)
    life = Life(tmp_path, strategy=strategy)
    found: list[Any] = []

    def groups(now: float) -> list[Any]:
        return found

    life.host._groups_of = groups
    found.append(("g1", ("b", "a"), None, 1.0, 2.0))
    noted: list[Any] = []
    life.host._note = noted.extend
    for _ in range(2):
        life.host.heard(0.5, ClientJoined("c", ClientInfo(1)), [], [])()
    found[0] = ("g1", ("a",), None, 1.5, 2.0)
    life.host.heard(0.5, ClientJoined("d", ClientInfo(1)), [], [])()
    life.die()
    assert [r for r in noted if r["kind"] == "group"] == [
        {"t": 0.5, "kind": "group", "group": "g1", "arrival": at, "latest": 2.0, "members": who}
        for at, who in ((1.0, ["a", "b"]), (1.5, ["a"]))
    ]


def test_bytes_are_those_of_the_run_whoever_served_it(tmp_path: Path) -> None:
    """After a restart they began at 0, and were the whole run's again when it was over."""
    life = Life(tmp_path)
    life.live(greeted(life), 3)
    life.die()
    again = Life(tmp_path)
    again.live(greeted(again), 2)
    clients: Any = again.assembly.status()["clients"]
    rows = again.assembly.history.clients["c"]
    again.die()
    assert (clients[0]["updates"], rows.bytes_up) == (5, 5 * 16)
    assert clients[0]["bytes_up"] == rows.bytes_up
    assert clients[0]["bytes_down"] >= rows.bytes_down >= 5 * 16
