"""Post: bytes and back, what is refused, and that a peer which does not answer stalls nobody."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest

from atoll.aggregation.allreduce import Part as Share
from atoll.aggregation.allreduce import PartReady, Plan
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Accepted,
    Announce,
    Begin,
    Commit,
    Failed,
    Goodbye,
    Left,
    Message,
    Path,
    Prepare,
    Promise,
    Reduced,
    Refuse,
    Stand,
    Step,
    Value,
    Whence,
)
from atoll.p2p import post
from atoll.p2p.post import KEPT, KINDS, NAME, Letter, Part, Post, read, write
from atoll.protocols.errors import RemoteError

ONE = (1, "a")
PLAN = Plan(("a", "b"), (1.0, 0.5), (Share("a", 0, 6), Share("b", 6, 10)))
STAND = Stand(3, "c" * 32, 4.5)
LEFT = Left("c", STAND, "5ea1")
VALUE = Value(ONE, ("a", "b"), (1.0, 0.5), "d" * 64, (("a", "5ea1"), ("b", "")), (LEFT,))
LETTERS: list[Letter] = [
    Announce(STAND, True, Commit("e" * 32, VALUE), "f" * 64),
    Announce(Stand(), False, None),
    Prepare("c", ONE),
    Promise("c", ONE, True, (ONE, VALUE)),
    Promise("c", ONE, False, None),
    Refuse("c", ONE),
    Begin("c", ONE, PLAN),
    Reduced("c", ONE, "d", "5ea1"),
    Failed("c", ONE, "still without b", ("b",), ()),
    Accept("c", ONE, VALUE, ("a", "b")),
    Accepted("c", ONE),
    Commit("c", VALUE),
    Goodbye(STAND, (ONE, VALUE), "5ea1"),
    Whence(4.5),
    Path((Step(STAND, Commit("c", VALUE)),)),
    Path(()),
    Part.of("c/1/a", PartReady("a", 1, "d")),
]


@pytest.mark.parametrize("letter", LETTERS, ids=lambda one: type(one).__name__)
def test_a_letter_is_read_as_it_was_written(letter: Letter) -> None:
    assert read(write(letter)) == letter


def test_every_message_of_a_rendezvous_is_a_letter() -> None:
    assert set(KINDS.values()) == set(get_args(Message))
    assert {type(one) for one in LETTERS} == {*KINDS.values(), Part}


def changed(**says: object) -> bytes:
    plain = json.loads(write(LETTERS[0]))
    plain["says"].update(says)
    return json.dumps(plain).encode()


def replaced(seals: tuple[tuple[str, str], ...], gone: tuple[Left, ...]) -> bytes:
    return write(Commit("c", replace(VALUE, seals=seals, gone=gone)))


NOT_LETTERS = {
    "nothing": b"",
    "no JSON": b"\xff\x00",
    "a list": b"[]",
    "another kind": b'{"kind":"Shutdown","says":{}}',
    "a kind that is none": b'{"kind":["Announce"],"says":{}}',
    "a field too many": b'{"kind":"Prepare","says":{"chain":"c","ballot":[1,"a"]},"more":1}',
    "a field missing": b'{"kind":"Prepare","says":{"chain":"c"}}',
    "an unknown field": changed(more=1),
    "another type": changed(ready=1),
    "a text too long": changed(bits="f" * 600),
    "half of a character": write(LETTERS[0]).replace(b"e" * 32, b"\\ud800"),
    "a chain that is a path": changed(stand={"epoch": 0, "chain": "a/../../b", "heavy": 0.0}),
    "one that has sealed twice": replaced(VALUE.seals * 2, ()),
    "one that has left twice": replaced((), (LEFT, LEFT)),
    "not a number": changed(stand={"epoch": 1, "chain": "c", "heavy": "nan"}),
    "no end of a number": changed(stand={"epoch": 1, "chain": "c", "heavy": "inf"}),
    "a number beyond all": b'{"kind":"Prepare","says":{"chain":"c","ballot":[1'
    + b"0" * 30
    + b',"a"]}}',
    "a number beyond floats": changed(stand={"epoch": 1, "chain": "c", "heavy": 10**400}),
    "digits without end": b'{"kind":"Prepare","says":{"chain":"c","ballot":['
    + b"9" * 5000
    + b',"a"]}}',
    "too deep": b'{"kind":"Prepare","says":' + b"[" * 100_000 + b"}",
    "too long": b" " * (post.LETTER + 1),
    "weights without peers": changed(
        last={
            "base": "e",
            "value": {"ballot": [1, "a"], "group": ["a"], "weights": [1, 1], "digest": "d"},
        }
    ),
    "a weight below 0": changed(
        last={
            "base": "e",
            "value": {"ballot": [1, "a"], "group": ["a"], "weights": [-1], "digest": "d"},
        }
    ),
    "a peer twice": changed(
        last={
            "base": "e",
            "value": {"ballot": [1, "a"], "group": ["a", "a"], "weights": [1, 1], "digest": "d"},
        }
    ),
}


@pytest.mark.parametrize("said", NOT_LETTERS.values(), ids=NOT_LETTERS.keys())
def test_what_is_no_letter_is_refused(said: bytes) -> None:
    with pytest.raises(RemoteError) as refused:
        read(said)
    assert refused.value.code == "FL-W101"
    assert len(refused.value.message) < 300


class Network:
    """What is called, and peers that never answer or refuse."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Letter]] = []
        self.frozen: set[str] = set()
        self.dead: set[str] = set()
        self.calls = 0

    async def call(self, peer: str, name: str, said: bytes, seconds: float) -> bytes:
        assert name == NAME
        self.calls += 1
        if peer in self.frozen:
            await asyncio.Event().wait()
        if peer in self.dead:
            raise RemoteError("FL-P203", "it does not answer", "")
        self.heard += [(peer, read(line)) for line in said.split(b"\n")]
        return b""


async def until(true: Callable[[], bool]) -> None:
    end = asyncio.get_running_loop().time() + 10
    while not true():
        assert asyncio.get_running_loop().time() < end, "not in 10 s"
        await asyncio.sleep(0)


def test_a_frozen_peer_and_a_dead_one_stall_nobody() -> None:
    async def work() -> None:
        network = Network()
        network.frozen, network.dead = {"b"}, {"c"}
        sent = Post(network.call, lambda peer, letter: None)
        for i in range(10):
            for peer in "abcd":
                sent.send(peer, Prepare("c", (i, "a")))
        await until(lambda: len(network.heard) == 20 and sent.lost == 10)
        assert {peer for peer, _ in network.heard} == {"a", "d"}
        for peer in "ad":
            assert [m for p, m in network.heard if p == peer] == [
                Prepare("c", (i, "a")) for i in range(10)
            ]  # in order
        await sent.close()

    asyncio.run(work())


def test_what_waits_is_bounded_and_of_announcements_the_last_is_enough() -> None:
    async def work() -> None:
        network = Network()
        sent = Post(network.call, lambda peer, letter: None)
        for i in range(KEPT + 10):
            sent.send("a", Prepare("c", (i, "a")))
            sent.send("a", Announce(Stand(i, "c", 1.0), False, None))
        await sent.flush(10)
        letters = [letter for _, letter in network.heard]
        assert len(letters) == KEPT
        assert letters[-1] == Announce(Stand(KEPT + 9, "c", 1.0), False, None)
        assert sum(isinstance(letter, Announce) for letter in letters) == 1
        assert network.calls == 1
        sent.forget("a")
        sent.forget("nobody")
        await sent.close()

    asyncio.run(work())


def test_a_flush_ends_though_a_peer_is_frozen() -> None:
    async def work() -> None:
        network = Network()
        network.frozen = {"b"}
        sent = Post(network.call, lambda peer, letter: None)
        sent.send("b", Prepare("c", ONE))
        async with asyncio.timeout(10):
            await sent.flush(0.05)
        assert not network.heard, "it is frozen"
        await sent.close()

    asyncio.run(work())


def test_more_than_goes_into_one_call_goes_into_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "BATCH", 200)

    async def work() -> None:
        network = Network()
        sent = Post(network.call, lambda peer, letter: None)
        for i in range(6):
            sent.send("a", Prepare("c" * 32, (i, "a")))
        await sent.flush(10)
        assert len(network.heard) == 6
        assert network.calls == 3
        await sent.close()

    asyncio.run(work())


def test_letters_beside_one_that_is_none_are_heard_and_it_is_told_to_the_sender() -> None:
    async def work() -> None:
        heard: list[tuple[str, Letter]] = []
        got = Post(Network().call, lambda peer, letter: heard.append((peer, letter)))
        said = b"\n".join([write(LETTERS[2]), b"garbage", write(LETTERS[5])])
        with pytest.raises(RemoteError, match="malformed letter"):
            await got.answer("b", said)
        assert heard == [("b", LETTERS[2]), ("b", LETTERS[5])]
        assert got.refused == 1
        assert await got.answer("b", write(LETTERS[3])) == b""

    asyncio.run(work())
