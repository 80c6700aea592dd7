"""Nodes over real hivemind: what is said arrives, daemons are replaced, nothing is left behind."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from atoll.p2p import bulk, node
from atoll.p2p.calls import MOST
from atoll.p2p.daemon import Daemon
from atoll.p2p.node import RECORD, Node
from atoll.protocols.blobs import Blob, BlobInfo
from atoll.protocols.errors import AtollError, PeerError, RemoteError
from atoll.protocols.frames import checksums
from tests.slow.nodes import LOOPBACK, MARKS, pair

pytestmark = MARKS
pytest.importorskip("hivemind")

NOBODY = "12D3KooWQkLh9T4mXWf8oyRiLb3r4uhcXnVC1Uwqhq1A8wQa1dXb"


def both(folder: Path, work: Callable[[Node, Node], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with asyncio.timeout(120), pair(folder) as (first, second):
            await work(first, second)

    asyncio.run(inside())


async def echo(peer: str, said: bytes) -> bytes:
    if said == b"refuse":
        raise RemoteError("FL-W107", "no such thing here", "ask another")
    if said == b"fail":
        raise ZeroDivisionError
    return peer.encode() + b" " + said


async def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s"
        await asyncio.sleep(0.005)


async def answered(node: Node, peer: str, said: bytes, seconds: float = 30.0) -> bytes:
    """Ask until there is an answer."""
    end = time.monotonic() + seconds
    while True:
        try:
            return await node.call(peer, "echo", said, 3.0)
        except RemoteError:
            assert time.monotonic() < end, f"no answer in {seconds} s"
            await asyncio.sleep(0.1)


def blob(name: str, size: int) -> Blob:
    data = os.urandom(size)
    info = BlobInfo(name, size, hashlib.sha256(data).digest(), ())
    return Blob(info, memoryview(data), checksums(memoryview(data)))


def shelf_of(node: Node, *blobs: Blob) -> bulk.Shelf:
    async def find(_: str, name: str) -> Blob:
        for one in blobs:
            if one.info.id == name:
                return one
        raise RemoteError("FL-W107", f"no blob {name!r}", "ask for another")

    return bulk.Shelf(node, find)


def test_a_port_has_one_daemon_and_who_comes_second_takes_another(tmp_path: Path) -> None:
    """Two `fl-peer join` at the same moment found 7448 free, and libp2p had both daemons listen on
    it: who connected met the one or the other, so the two never heard of each other, and each round
    of three waited for whom it could not reach (20 s instead of 0.2)."""

    async def inside() -> None:
        first = await node.started(tmp_path / "a", LOOPBACK)
        try:
            refused = Node(tmp_path / "b", listen=first.listen)
            with pytest.raises(PeerError, match="in use") as caught:
                await refused.start()
            assert caught.value.code == "FL-P201"
            second = await node.started(tmp_path / "c", first.listen, await first.addresses())
            try:
                assert second.listen != first.listen
                await first.serve("echo", echo)
                assert await answered(second, first.id, b"hi") == f"{second.id} hi".encode()
            finally:
                await second.stop()
        finally:
            await first.stop()

    asyncio.run(inside())


def test_calls_arrive_with_the_callers_id_and_refusals_with_their_reason(tmp_path: Path) -> None:
    async def work(first: Node, second: Node) -> None:
        await first.serve("echo", echo)
        await second.serve("echo", echo)
        assert await second.call(first.id, "echo", b"hello") == f"{second.id} hello".encode()
        assert await first.call(second.id, "echo", b"") == f"{first.id} ".encode()
        with pytest.raises(RemoteError, match="no such thing") as refused:
            await second.call(first.id, "echo", b"refuse")
        assert (refused.value.code, refused.value.hint) == ("FL-W107", "ask another")
        for peer, name, said in (
            (first.id, "echo", b"fail"),
            (first.id, "nothing", b""),
            (NOBODY, "echo", b""),
        ):
            with pytest.raises(RemoteError) as silent:
                await second.call(peer, name, said, 10.0)
            assert silent.value.code == "FL-P203"
        with pytest.raises(ValueError, match="in bulk"):
            await second.call(first.id, "echo", bytes(MOST + 1))

    both(tmp_path, work)


def test_records_of_several_writers_stand_under_one_key(tmp_path: Path) -> None:
    async def work(first: Node, second: Node) -> None:
        assert await first.note("run/peers", "a", b"1", 30.0)
        assert await second.note("run/peers", "b", b"2", 30.0)
        assert dict(await first.look("run/peers")) == {"a": b"1", "b": b"2"}
        assert dict(await second.look("run/peers")) == {"a": b"1", "b": b"2"}
        assert dict(await second.look("another")) == {}
        await second._dht.store("run/odd", [1, 2], time.time() + 30, subkey="c")
        await second._dht.store("run/plain", b"no dictionary", time.time() + 30)
        assert dict(await first.look("run/odd")) == {}  # garbage of a peer that means no good
        assert dict(await first.look("run/plain")) == {}
        with pytest.raises(ValueError, match="record of"):
            await first.note("run/peers", "a", bytes(RECORD + 1), 30.0)

    both(tmp_path, work)


def test_a_blob_arrives_whole_or_not_at_all(tmp_path: Path) -> None:
    big, empty = blob("v7/fp32", (5 << 20) + 3), blob("v0/fp32", 0)
    bad = Blob(BlobInfo("bad", 9, b"\1" * 32, ()), memoryview(b"not those"), [])

    async def work(first: Node, second: Node) -> None:
        await shelf_of(first, big, empty, bad).open()
        dest = memoryview(bytearray(len(big.view)))
        assert (await bulk.fetch(second, first.id, "v7/fp32", dest))[:2] == (
            big.info.sha256,
            len(dest),
        )
        assert dest == big.view
        none = memoryview(bytearray(0))
        assert (await bulk.fetch(second, first.id, "v0/fp32", none))[:2] == (empty.info.sha256, 0)
        room = memoryview(bytearray(len(big.view) + 9))
        shorter = await bulk.fetch(second, first.id, "v7/fp32", room, shorter=True)
        assert shorter[:2] == (big.info.sha256, len(big.view))
        assert room[: len(big.view)] == big.view
        for name, size, sha, code in (
            ("other", 9, b"", "FL-W107"),
            ("v7/fp32", 1 << 20, b"", "FL-W103"),
            ("v7/fp32", len(big.view) + 1, b"", "FL-W103"),
            ("v7/fp32", len(big.view), b"\2" * 32, "FL-W105"),
            ("bad", 9, b"", "FL-W105"),
        ):
            with pytest.raises(RemoteError) as refused:
                await bulk.fetch(second, first.id, name, memoryview(bytearray(size)), sha256=sha)
            assert refused.value.code == code, name
        for said in (b"", b"{}", b'{"blob": 1, "offset": 0}', b'{"blob": "v7/fp32", "offset": -1}'):
            with pytest.raises(RemoteError) as malformed:
                await anext(second.stream(first.id, bulk.NAME, said))
            assert malformed.value.code == "FL-W101"

    both(tmp_path, work)


def test_a_transfer_goes_on_where_its_giver_broke_off(tmp_path: Path) -> None:
    big = blob("v7/fp32", 40 << 20)

    async def work(first: Node, second: Node) -> None:
        await shelf_of(first, big).open()
        dest = memoryview(bytearray(len(big.view)))
        fetching = asyncio.create_task(bulk.fetch(second, first.id, "v7/fp32", dest, seconds=5.0))
        await until(lambda: bytes(dest[4 << 20 : (4 << 20) + 16]) != bytes(16))  # on its way
        assert not fetching.done()
        first.daemon.kill()
        await until(lambda: first.restarts == 1)
        assert (await fetching)[:2] == (big.info.sha256, len(dest))
        assert dest == big.view

    both(tmp_path, work)


def test_a_daemon_that_is_killed_or_frozen_is_replaced_and_the_peer_is_itself_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "PING_SECONDS", 1.0)

    async def work(first: Node, second: Node) -> None:
        await first.serve("echo", echo)
        name, where = first.id, await first.addresses()
        first.daemon.kill()
        await until(lambda: first.restarts == 1)
        assert (first.id, await first.addresses()) == (name, where)
        assert await answered(second, name, b"1") == f"{second.id} 1".encode()
        os.kill(first.daemon.pid, signal.SIGSTOP)
        began = time.monotonic()
        await until(lambda: first.restarts == 2)
        assert time.monotonic() - began < 30
        assert await answered(second, name, b"2") == f"{second.id} 2".encode()
        assert not first.lost.is_set()

    both(tmp_path, work)


def test_a_line_to_the_daemon_that_is_lost_is_found_out_and_the_peer_hears_again(
    tmp_path: Path,
) -> None:
    """The daemon answers all the while: only what carries the calls is gone."""

    async def work(a: Node, b: Node) -> None:
        await b.serve("echo", echo)
        b._p2p._client.control._read_task.cancel()
        with pytest.raises(RemoteError):
            await a.call(b.id, "echo", b"1", 1.0)
        await until(lambda: b.restarts == 1)
        assert await answered(a, b.id, b"2") == f"{a.id} 2".encode()

    both(tmp_path, work)


def test_an_answer_to_a_call_that_was_given_up_in_the_same_turn_ends_nothing(
    tmp_path: Path,
) -> None:
    async def work(a: Node, b: Node) -> None:
        await b.serve("echo", echo)
        loop = asyncio.get_running_loop()
        for i in range(60):  # somewhere here the answer lies there when the loop wakes up
            loop.call_later((i % 15) * 0.0002, time.sleep, 0.06)
            with contextlib.suppress(RemoteError):
                await a.call(b.id, "echo", b"1", 0.03)
            await asyncio.sleep(0.05)
        assert await a.call(b.id, "echo", b"2", 5.0) == f"{a.id} 2".encode()
        assert (a.restarts, b.restarts) == (0, 0)

    both(tmp_path, work)


def test_a_peer_that_finds_nobody_or_no_port_says_so(tmp_path: Path) -> None:
    async def alone(**told: object) -> AtollError:
        node = Node(tmp_path / "x", **{"listen": LOOPBACK, **told})  # type: ignore[arg-type]
        with pytest.raises(PeerError) as failed:
            await node.start()
        await node.stop()
        return failed.value

    async def work() -> tuple[AtollError, AtollError]:
        dead = f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"
        return await alone(bootstrap=[dead]), await alone(listen=("/ip4/127.0.0.1/nonsense",))

    nobody, nothing = asyncio.run(work())
    assert (nobody.code, nothing.code) == ("FL-P202", "FL-P201")
    assert NOBODY in nobody.message


def test_a_key_that_is_none_is_named_with_what_to_do(tmp_path: Path) -> None:
    """The daemon does not start with it, and the hint was to look at the port."""
    (tmp_path / "identity.key").write_bytes(b"garbage")
    with pytest.raises(PeerError) as failed:
        asyncio.run(Node(tmp_path, listen=LOOPBACK).start())
    assert failed.value.code == "FL-P405"
    assert str(tmp_path / "identity.key") in failed.value.message
    assert "remove it" in failed.value.hint


def test_a_folder_with_a_long_path_is_no_obstacle_and_stays_private(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)

    async def work() -> None:
        node = Node(deep, listen=LOOPBACK)
        await node.start()
        sockets = node.daemon.sockets
        assert sockets != deep
        for folder in (deep, sockets):
            assert folder.stat().st_mode & 0o077 == 0
        await node.stop()
        assert not sockets.exists()

    asyncio.run(work())


def test_sockets_of_a_long_path_are_removed_after_a_kill_too(tmp_path: Path) -> None:
    """Each SIGKILL left a directory with two sockets among the temporary ones. A copy of the folder
    leaves those alone that are in use."""
    deep, copy = tmp_path / ("d" * 90), tmp_path / ("c" * 90)

    async def work() -> None:
        node = Node(deep, listen=LOOPBACK)
        await node.start()
        sockets = node.daemon.sockets
        copy.mkdir()
        shutil.copy(deep / "sockets", copy)
        other = Daemon(copy, LOOPBACK)
        assert other.sockets != sockets
        await other.stop()
        assert (sockets / "p2pd.sock").exists()
        node.daemon.kill()
        await node.daemon.gone.wait()
        daemon = Daemon(deep, LOOPBACK)  # what the next life has
        assert daemon.sockets != sockets
        assert not sockets.exists()
        await daemon.stop()
        assert not (deep / "sockets").exists()
        await node.stop()

    asyncio.run(work())


def test_a_process_that_is_killed_leaves_no_daemon(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from atoll.p2p.node import Node\n"
        "async def main():\n"
        f"    node = Node(pathlib.Path(sys.argv[1]), listen={LOOPBACK!r})\n"
        "    await node.start()\n"
        "    print(node.daemon.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    for number in (signal.SIGKILL, signal.SIGTERM):
        command = [sys.executable, "-c", code, str(tmp_path / number.name)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
            assert peer.stdout is not None
            daemon = psutil.Process(int(peer.stdout.readline()))
            peer.send_signal(number)
        assert psutil.wait_procs([daemon], timeout=10)[1] == [], number.name
