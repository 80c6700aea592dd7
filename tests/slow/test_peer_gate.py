"""Admission over real hivemind: who holds the secret is let in, by whatever way it is heard of."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.p2p import roster
from atoll.p2p.gate import HELLO, Gate
from atoll.p2p.invite import Invite
from atoll.p2p.newcomers import MANIFEST, directory_key, fetch_manifest
from atoll.p2p.node import Node
from atoll.p2p.roster import Entry
from atoll.protocols.errors import PeerError, RemoteError
from tests.p2p.people import INVITE, SIGNED, entry_of, person
from tests.slow.nodes import LOOPBACK, MARKS

pytestmark = MARKS
pytest.importorskip("hivemind")


class Swarm:
    def __init__(self, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.nodes: list[Node] = []
        self.admitted: dict[str, list[str]] = {}

    async def node(
        self, bootstrap: tuple[str, ...] = (), listen: tuple[str, ...] = LOOPBACK
    ) -> Node:
        made = Node(self.folder / str(len(self.nodes)), listen=listen, bootstrap=bootstrap)
        await made.start()
        self.nodes.append(made)
        self.stack.push_async_callback(made.stop)
        return made

    async def gate(self, node: Node, invite: Invite = INVITE) -> Gate:
        heard = self.admitted.setdefault(node.id, [])
        made = Gate(
            node, invite, SIGNED, name=f"peer {len(self.nodes)}", schema="ab12", beat=0.3,
            on_admitted=lambda entry: heard.append(entry.peer),
        )  # fmt: skip
        await made.open()
        self.stack.push_async_callback(made.close)
        return made


def play(folder: Path, work: Callable[[Swarm], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with asyncio.timeout(240), contextlib.AsyncExitStack() as stack:
            await work(Swarm(folder, stack))

    asyncio.run(inside())


async def until(true: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s"
        await asyncio.sleep(0.02)


def know_each_other(*all_of: Gate) -> bool:
    ids = {one.me.peer for one in all_of}
    return all({e.peer for e in one.roster.entries()} == ids - {one.me.peer} for one in all_of)


async def invite_to(node: Node) -> Invite:
    return replace(INVITE, addresses=tuple(await node.addresses()))


async def echo(peer: str, said: bytes) -> bytes:
    return said


async def echoes(peer: str, said: bytes) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield said


async def first_of(count: int, stream: AsyncGenerator[bytes, None]) -> list[bytes]:
    """The reader closes."""
    found: list[bytes] = []
    async with contextlib.aclosing(stream) as messages:
        async for message in messages:
            found.append(message)
            if len(found) == count:
                break
    return found


def test_three_meet_and_only_they_are_answered(tmp_path: Path) -> None:
    async def work(swarm: Swarm) -> None:
        a = await swarm.node()
        invite = await invite_to(a)
        first = await swarm.gate(a, invite)
        await first.serve("echo", echo)
        await first.serve_stream("echoes", echoes)
        b, c = await swarm.node(invite.addresses), await swarm.node(invite.addresses)
        assert await fetch_manifest(b, invite) == SIGNED
        second, third = await swarm.gate(b, invite), await swarm.gate(c, invite)
        await until(lambda: know_each_other(first, second, third))
        assert await second.call(a.id, "echo", b"hello") == b"hello"
        assert await first_of(3, third.stream(a.id, "echoes", b"x")) == [b"x"] * 3
        assert sorted(set(swarm.admitted[a.id])) == sorted([b.id, c.id])

        stranger = await swarm.node(invite.addresses)
        for name in ("echo", HELLO, MANIFEST):
            with pytest.raises(RemoteError) as refused:
                await stranger.call(a.id, name, b"[]" if name == HELLO else b"let me in")
            assert refused.value.code in ("FL-P304", "FL-P305")
        with pytest.raises(RemoteError) as refused:
            await first_of(3, stranger.stream(a.id, "echoes", b"x"))
        assert refused.value.code == "FL-P304"
        wrong = replace(invite, secret=bytes(32))
        with pytest.raises(PeerError) as told:
            await fetch_manifest(stranger, wrong)
        assert told.value.code == "FL-P304"
        outside = await swarm.gate(stranger, wrong)
        with pytest.raises(RemoteError) as refused:
            await outside.call(a.id, "echo", b"hello")
        assert refused.value.code == "FL-P304"
        # what another may have overheard is bound to who said it
        letter = first.roster.letters()[0]
        with pytest.raises(RemoteError) as refused:
            await stranger.call(a.id, HELLO, roster.gossip([letter]))
        assert refused.value.code == "FL-P305"
        assert not first.roster.holds(stranger.id)

    play(tmp_path, work)


def test_garbage_in_the_directory_hides_nobody(tmp_path: Path) -> None:
    async def work(swarm: Swarm) -> None:
        a = await swarm.node()
        invite = await invite_to(a)
        first = await swarm.gate(a, invite)
        liar = await swarm.node(invite.addresses)
        key = directory_key(invite)
        forged = roster.write(entry_of(person(1)), person(1), replace(invite, secret=bytes(32)))
        for subkey, record in (("x", b"\xff" * 900), ("y", forged), (a.id, b"overwritten")):
            await liar.note(key, subkey, record, 3600.0)
        second = await swarm.gate(await swarm.node(invite.addresses), invite)
        third = await swarm.gate(await swarm.node(invite.addresses), invite)
        await until(lambda: know_each_other(first, second, third))

    play(tmp_path, work)


def test_a_key_that_cannot_be_read_holds_nobody_up(tmp_path: Path) -> None:
    """A record that is no msgpack makes honest reads of its key hang: hellos are another way."""

    async def work(swarm: Swarm) -> None:
        a = await swarm.node()
        invite = await invite_to(a)
        liar = await swarm.node(invite.addresses)
        key, until_ = directory_key(invite), time.time() + 3600
        from hivemind.dht.routing import DHTID

        raw = liar._up_dht().protocol
        await asyncio.wait_for(
            raw.call_store(
                liar._up_p2p().peer_id.__class__.from_base58(a.id),
                [DHTID.generate(source=key)], [b"\xc1\xff garbage"], until_,
            ), 20,
        )  # fmt: skip
        first = await swarm.gate(a, invite)
        second = await swarm.gate(await swarm.node(invite.addresses), invite)
        third = await swarm.gate(await swarm.node(invite.addresses), invite)
        await until(lambda: know_each_other(first, second, third))

    play(tmp_path, work)


def test_two_directories_become_one(tmp_path: Path) -> None:
    """Peers that started apart share no directory, until one meets whom the invite names."""

    async def work(swarm: Swarm) -> None:
        a, b, c = await swarm.node(), await swarm.node(), await swarm.node()
        invite = await invite_to(a)
        for other in (b, c):
            with pytest.raises(RemoteError):
                await other.call(a.id, HELLO, b"", 5.0)  # no way known
        first = await swarm.gate(a, invite)
        second, third = await swarm.gate(b, invite), await swarm.gate(c, invite)
        await until(lambda: know_each_other(first, second, third))
        assert await b.note("somewhere", "x", b"found", 60.0)

        async def read() -> dict[str, bytes]:
            return dict(await c.look("somewhere"))

        end = time.monotonic() + 60
        while await read() != {"x": b"found"}:
            assert time.monotonic() < end, "still two directories"
            await asyncio.sleep(0.2)

    play(tmp_path, work)


def test_one_that_nobody_can_connect_to_takes_part(tmp_path: Path) -> None:
    async def work(swarm: Swarm) -> None:
        a = await swarm.node()
        invite = await invite_to(a)
        first = await swarm.gate(a, invite)
        hidden = await swarm.node(invite.addresses, listen=())
        assert await hidden.addresses() == []
        second = await swarm.gate(hidden, invite)
        await until(lambda: know_each_other(first, second))
        entry = first.roster.get(hidden.id)
        assert entry is not None
        assert (entry.accepts, entry.addresses) == (False, ())
        await second.serve("echo", echo)
        assert await first.call(hidden.id, "echo", b"over its own connection") == (
            b"over its own connection"
        )

    play(tmp_path, work)


def test_a_member_tells_what_is_new_and_comes_back_after_a_restart(tmp_path: Path) -> None:
    async def work(swarm: Swarm) -> None:
        a = await swarm.node()
        invite = await invite_to(a)
        first = await swarm.gate(a, invite)
        await first.serve("echo", echo)
        b = await swarm.node(invite.addresses)
        second = await swarm.gate(b, invite)
        await until(lambda: know_each_other(first, second))
        await second.tell(speed=3.5, bulk="somewhere:1")

        def heard() -> Entry | None:
            return first.roster.get(b.id)

        await until(
            lambda: (e := heard()) is not None and (e.speed, e.bulk) == (3.5, "somewhere:1")
        )
        # a member that has forgotten everybody hears a hello before the call
        first.roster.forget(b.id)
        first.roster._gone.clear()  # as a process that was started anew
        assert await second.call(a.id, "echo", b"again") == b"again"
        assert first.addresses()[0] == invite.addresses[0]
        assert set(second.me.addresses) <= set(first.addresses())
        # a daemon whose bootstrap is gone comes up alone, and is met again
        await first.close()
        await a.stop()
        b.daemon.kill()
        await until(lambda: b.restarts == 1)
        assert not b.lost.is_set()

    play(tmp_path, work)


def test_of_two_from_one_directory_the_earlier_one_hears_that_it_ends(tmp_path: Path) -> None:
    async def work(swarm: Swarm) -> None:
        founder = await swarm.node()
        invite = await invite_to(founder)
        gate = await swarm.gate(founder, invite)
        (tmp_path / "2").mkdir()
        node = await swarm.node(invite.addresses)
        shutil.copy(tmp_path / "1" / "identity.key", tmp_path / "2")
        earlier = await swarm.gate(node, invite)
        await until(lambda: know_each_other(gate, earlier))
        # Of a place to start from it would hear, now and then, that the other cannot be reached.
        later = await swarm.gate(await swarm.node(), invite)
        assert later.me.peer == earlier.me.peer
        await until(earlier.doubled.is_set)
        assert not later.doubled.is_set()
        assert not gate.doubled.is_set()

    play(tmp_path, work)


def test_a_clock_that_was_set_back_makes_no_double(tmp_path: Path) -> None:
    """What others have of its former life is newer than what it writes, and comes no more."""

    async def work(swarm: Swarm) -> None:
        founder = await swarm.node()
        invite = await invite_to(founder)
        gate = await swarm.gate(founder, invite)
        back = await swarm.gate(await swarm.node(invite.addresses), invite)
        await until(lambda: know_each_other(gate, back))
        former = replace(back.me, at=back.me.at + 30.0)
        gate._hear(roster.write(former, back._identity, invite), None)
        await until(lambda: back.me.at > former.at)
        await until(lambda: gate.roster.entries()[0].at > former.at)
        await asyncio.sleep(2.0)
        assert not back.doubled.is_set()

    play(tmp_path, work)


def test_a_newcomer_and_a_member_whose_clock_is_wrong_get_to_know_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither took the other's entry from a third, and each refused groups with the other in it: no
    round was made in 90 s."""

    async def work(swarm: Swarm) -> None:
        founder = await swarm.node()
        invite = await invite_to(founder)
        gate = await swarm.gate(founder, invite)
        wrong = await swarm.gate(await swarm.node(invite.addresses), invite)
        await until(lambda: know_each_other(gate, wrong))
        hear = wrong.roster.hear
        monkeypatch.setattr(
            wrong.roster, "hear", lambda data, now, *more: hear(data, now + 3600, *more)
        )
        wrong.me = replace(wrong.me, at=wrong.me.at + 3600)
        await wrong._renew()
        assert await wrong._note()  # nor is its former entry in the directory
        await until(lambda: gate.roster.entries()[0].at == wrong.me.at)
        newcomer = await swarm.gate(await swarm.node(invite.addresses), invite)
        await until(lambda: know_each_other(gate, wrong, newcomer), 20.0)

    play(tmp_path, work)


def test_a_gate_wants_the_manifest_of_its_invite(tmp_path: Path) -> None:
    async def work(swarm: Swarm) -> None:
        node = await swarm.node()
        with pytest.raises(PeerError) as wrong:
            Gate(node, replace(INVITE, manifest="0" * 64), SIGNED, name="x", schema="y")
        assert wrong.value.code == "FL-P306"
        with pytest.raises(PeerError) as nobody:
            await fetch_manifest(node, replace(INVITE, addresses=()))
        assert nobody.value.code == "FL-P202"

    play(tmp_path, work)
