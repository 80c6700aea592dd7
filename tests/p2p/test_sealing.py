"""Sealing: Ed25519 keys out of the peers' own, and whose seal is believed."""

import pytest

from atoll.p2p.sealing import KNOWN, Sealing
from tests.p2p.people import person


@pytest.fixture(scope="module")
def pair() -> tuple[Sealing, Sealing]:
    return Sealing(person(0)), Sealing(person(1))


def test_a_seal_is_its_peers_and_of_one_text(pair: tuple[Sealing, Sealing]) -> None:
    a, b = pair
    me, other = person(0).id, person(1).id
    seal = a.seal("made x")
    assert a.holds(me, "made x", seal)
    assert not b.holds(me, "made x", seal), "its key is not known"
    b.know(me, a.public)
    assert b.holds(me, "made x", seal)
    assert not b.holds(me, "made y", seal)
    assert not b.holds(other, "made x", seal)
    b.know(me, b.public)  # who calls vouches for the key
    assert not b.holds(me, "made x", seal)


def test_the_key_is_the_same_in_each_life_and_not_the_identity_itself() -> None:
    one, again = Sealing(person(0)), Sealing(person(0))
    assert one.public == again.public
    assert bytes.fromhex(one.public) not in person(0).public
    assert Sealing(person(1)).public != one.public


@pytest.mark.parametrize("seal", ["", "no base 64", "AAAA", "A" * 88, "\ud800"])
def test_garbage_is_no_seal(pair: tuple[Sealing, Sealing], seal: str) -> None:
    a, b = pair
    b.know(person(0).id, a.public)
    assert not b.holds(person(0).id, "made x", seal)
    b.know(person(0).id, "zz")
    assert not b.holds(person(0).id, "made x", a.seal("made x"))


def test_keys_are_kept_of_so_many_peers_and_first_of_those_that_live(
    pair: tuple[Sealing, Sealing],
) -> None:
    """The first to be forgotten were members since the beginning, and what they sealed was none."""
    a, _ = pair
    names = ["who lives", "who is gone", *(f"peer {i}" for i in range(KNOWN - 2))]
    for name in (*names, "who lives", "one more"):
        a.know(name, a.public)
    assert len(a.keys) == KNOWN
    assert not a.holds("who is gone", "x", a.seal("x"))
    assert a.holds("who lives", "x", a.seal("x"))
