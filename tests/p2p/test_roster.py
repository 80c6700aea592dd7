"""The roster: true entries are taken, whoever brings them, and nothing else is."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.aggregation import dylu
from atoll.p2p import roster
from atoll.p2p.identity import RSA_KEY, Identity, base58, id_of, signed_by
from atoll.p2p.roster import Entry, Roster, local_steps, share, weight
from atoll.protocols.errors import RemoteError
from tests.p2p.people import INVITE, MANIFEST, entry_of, key, person

NOW = 1_000_000.0  # Unix time
CLOCK = 500.0  # at NOW, of the clock that nobody sets


@pytest.fixture
def people() -> list[Identity]:
    return [person(i) for i in range(3)]


def refused(found: Entry | RemoteError, code: str, why: str) -> bool:
    assert isinstance(found, RemoteError), found
    assert (found.code, why in found.message) == (code, True), found
    return True


def test_an_entry_is_taken_from_its_peer_and_from_others(people: list[Identity]) -> None:
    a, b, _ = people
    book = Roster(INVITE, a.id)
    entry = entry_of(b, NOW)
    data = roster.write(entry, b, INVITE)
    assert book.hear(data, NOW, CLOCK, caller=b.id) == entry
    assert book.hear(data, NOW, CLOCK) == entry
    assert book.entries() == [entry]
    assert book.letters() == [data]
    assert book.holds(b.id)
    assert book.get(b.id) == entry
    assert book.get("nobody") is None
    assert book.hear(roster.write(entry_of(a, NOW), a, INVITE), NOW, CLOCK) == entry_of(a, NOW)
    assert not book.holds(a.id)  # the own entry is not a member's


def test_the_newest_entry_counts(people: list[Identity]) -> None:
    a, b, _ = people
    book = Roster(INVITE, a.id)
    new, old = entry_of(b, NOW, speed=2.0), entry_of(b, NOW - 5, speed=9.0)
    assert book.hear(roster.write(new, b, INVITE), NOW, CLOCK) == new
    assert book.hear(roster.write(old, b, INVITE), NOW, CLOCK) == new
    assert book.entries() == [new]


def test_what_is_false_is_refused(people: list[Identity]) -> None:
    a, b, c = people
    book = Roster(INVITE, a.id)
    good = roster.write(entry_of(b, NOW), b, INVITE)
    wrong_secret = replace(INVITE, secret=bytes(32))
    another_run = replace(INVITE, run="another")
    assert refused(book.hear(good, NOW, CLOCK, caller=c.id), "FL-P305", "another peer's")
    for other in (wrong_secret, another_run):
        assert refused(
            book.hear(roster.write(entry_of(b, NOW), b, other), NOW, CLOCK), "FL-P304", "shown"
        )
    forged = roster.write(entry_of(b, NOW), c, INVITE)  # b's id, c's key
    assert refused(book.hear(forged, NOW, CLOCK), "FL-P305", "not signed")
    letter = json.loads(good)
    letter["said"] = letter["said"].replace('"speed":5.0', '"speed":6.0')
    assert refused(book.hear(json.dumps(letter).encode(), NOW, CLOCK), "FL-P305", "not signed")
    for at in (NOW - 601, NOW + 61):
        data = roster.write(entry_of(b, at), b, INVITE)
        assert refused(book.hear(data, NOW, CLOCK), "FL-P305", "clocks")
    assert refused(book.hear(b"x" * 5000, NOW, CLOCK), "FL-P305", "5000 bytes")
    assert book.entries() == []
    long = f"/ip4/10.0.0.7/tcp/1/{'q' * 440}/p2p/{b.id}"
    with pytest.raises(ValueError, match="at most"):
        roster.write(entry_of(b, NOW, addresses=(long,) * 8), b, INVITE)


def test_one_who_left_is_not_brought_back_by_an_old_entry(people: list[Identity]) -> None:
    a, b, _ = people
    book = Roster(INVITE, a.id)
    data = roster.write(entry_of(b, NOW), b, INVITE)
    book.hear(data, NOW, CLOCK)
    book.forget(b.id)
    book.forget("nobody")
    assert refused(book.hear(data, NOW, CLOCK), "FL-P305", "left")
    again = entry_of(b, NOW + 1)
    assert book.hear(roster.write(again, b, INVITE), NOW + 1, CLOCK + 1) == again


def test_who_is_not_renewed_is_forgotten(people: list[Identity]) -> None:
    a, b, c = people
    book = Roster(INVITE, a.id)
    for who, at in ((b, NOW), (c, NOW + 500)):
        book.hear(roster.write(entry_of(who, at), who, INVITE), NOW + 500, CLOCK + 500)
    assert book.expire(CLOCK + 599) == []
    assert book.expire(CLOCK + 601) == [b.id]
    assert [e.peer for e in book.entries()] == [c.id]


def test_who_speaks_for_itself_is_believed_whatever_its_clock_says(people: list[Identity]) -> None:
    """One whose clock was set an hour on, or back, lost all others at once, or was lost by them
    after ten minutes; and when its clock was right again it was not taken for an hour more."""
    a, b, c = people
    book = Roster(INVITE, a.id)
    for when in (NOW, NOW + 3600, NOW + 3600.1):  # set an hour on, and back: dates never fall
        entry = entry_of(b, when)
        assert book.hear(roster.write(entry, b, INVITE), NOW, CLOCK, caller=b.id) == entry
    assert refused(book.hear(roster.write(entry, b, INVITE), NOW, CLOCK), "FL-P305", "clocks")
    known = entry_of(c, NOW)
    data = roster.write(known, c, INVITE)
    book.hear(data, NOW, CLOCK)
    assert book.hear(data, NOW + 7200, CLOCK + 590, caller=c.id) == known  # our own clock was set
    former = roster.write(entry_of(b, NOW), b, INVITE)  # it was killed, and has its right clock now
    assert book.hear(former, NOW, CLOCK + 590, caller=b.id) == entry
    assert book.expire(CLOCK + 1180) == []
    assert book.expire(CLOCK + 1191) == sorted([b.id, c.id])


def test_the_own_entry_of_a_life_with_a_wrong_clock_is_heard(people: list[Identity]) -> None:
    """Others have it, and take no older one: who starts again with its clock right, and at another
    address, must date what it says after it."""
    a, b, _ = people
    book = Roster(INVITE, a.id)
    former = entry_of(a, NOW + 3600)
    assert book.hear(roster.write(former, a, INVITE), NOW, CLOCK) == former
    assert refused(
        book.hear(roster.write(entry_of(b, NOW + 3600), b, INVITE), NOW, CLOCK), "FL-P305", "clocks"
    )


def test_who_was_not_heard_for_long_comes_back_by_its_own_word_alone(
    people: list[Identity],
) -> None:
    a, b, _ = people
    book = Roster(INVITE, a.id)
    data = roster.write(entry_of(b, NOW), b, INVITE)
    book.hear(data, NOW, CLOCK, caller=b.id)
    assert book.expire(CLOCK + 601) == [b.id]
    assert refused(book.hear(data, NOW + 601, CLOCK + 601), "FL-P305", "601 s ago")
    assert book.hear(data, NOW + 601, CLOCK + 601, caller=b.id) == entry_of(b, NOW)
    assert book.expire(CLOCK + 602) == []


def test_a_full_roster_takes_nobody_new(
    people: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = people
    monkeypatch.setattr(roster, "MEMBERS", 1)
    book = Roster(INVITE, a.id)
    book.hear(roster.write(entry_of(b, NOW), b, INVITE), NOW, CLOCK)
    assert refused(
        book.hear(roster.write(entry_of(c, NOW), c, INVITE), NOW, CLOCK), "FL-P307", "members"
    )
    newer = entry_of(b, NOW + 1)
    assert book.hear(roster.write(newer, b, INVITE), NOW, CLOCK) == newer
    for who in (b, c):  # and it does not remember all who ever left
        book.hear(roster.write(entry_of(who, NOW + 2), who, INVITE), NOW, CLOCK)
        book.forget(who.id)
    assert isinstance(book.hear(roster.write(newer, b, INVITE), NOW, CLOCK), Entry)


def test_garbage_is_refused_and_never_raises(people: list[Identity]) -> None:
    _, b, _ = people
    rng = random.Random(8)
    good = roster.write(entry_of(b, NOW), b, INVITE)
    for _ in range(500):
        spoilt = bytearray(good)
        for _ in range(rng.choice([1, 2, 30])):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        found = roster.read(bytes(spoilt), INVITE)
        # a hexadecimal digit may be written large
        assert isinstance(found, RemoteError) or bytes(spoilt).lower() == good.lower()
    for wild in (b"", b"[]", b"[" * 4000, b"1e999", b"\xff\xfe", b"{}", b'{"said":1}'):
        assert isinstance(roster.read(wild, INVITE), RemoteError)
    for change in (
        {"at": 10**400},
        {"said": "\ud800"},
        {"key": "zz"},
        {"signature": ""},
        {"proof": "\ud800"},
    ):
        letter = json.loads(good)
        if "at" in change:
            letter["said"] = letter["said"].replace(f'"at":{NOW}', f'"at":{change["at"]}')
        else:
            letter |= change
        assert isinstance(roster.read(json.dumps(letter).encode(), INVITE), RemoteError)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a\nb"},
        {"name": "n" * 65},
        {"bulk": "b" * 513},
        {"addresses": ("/ip4/10.0.0.7/tcp/1/p2p/QmB",) * 9},
        {"speed": -1.0},
        {"key": "5E" * 32},
        {"bandwidth": float("inf")},
        {"at": float("nan")},
    ],
)
def test_values_that_cannot_be_are_no_entry(
    people: list[Identity], change: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"entry|addresses|measure"):
        replace(entry_of(people[0], NOW), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "address",
    [
        "garbage",
        "/ip4/10.0.0.7/tcp/4001",
        "/ip4/10.0.0.7/tcp/4001/p2p/QmAnother",
        "/ip4/10.0.0.777/tcp/4001/p2p/{}",
        "/ip4/::1/tcp/4001/p2p/{}",
        "/ip4/10.0.0.7/tcp/65536/p2p/{}",
        "/ip4/10.0.0.7/tcp/4001,/ip4/10.0.0.8/tcp/4001/p2p/{}",
        "/unix/tmp/socket/p2p/{}",
    ],
)
def test_an_address_that_leads_nowhere_is_no_entry(people: list[Identity], address: str) -> None:
    """A daemon that is started with one of those among its addresses does not start at all."""
    address = address.format(people[0].id)
    with pytest.raises(ValueError, match="is no address of"):
        entry_of(people[0], NOW, addresses=(address,))


def test_shares_are_by_speed_and_nobody_has_more_than_one(people: list[Identity]) -> None:
    found = []
    for speed in (0.0, 0.01, 1.0, 2.5, 4.9, 5.0, 1e9):
        entry = entry_of(people[0], NOW, speed=speed)
        found.append((share(entry, MANIFEST), local_steps(entry, MANIFEST)))
        assert weight(entry, MANIFEST) == found[-1][1] * 8
    assert found == [
        (0.125, 6), (0.125, 6), (0.25, 12), (0.5, 25), (1.0, 50), (1.0, 50), (1.0, 50),
    ]  # fmt: skip
    short = replace(MANIFEST, local_steps=8)
    assert local_steps(entry_of(people[0], NOW, speed=0.1), short) == dylu.LEAST


def test_gossip_reads_back_and_is_bounded(people: list[Identity]) -> None:
    letters = [roster.write(entry_of(who, NOW), who, INVITE) for who in people]
    assert roster.gossiped(roster.gossip(letters)) == letters
    for wrong in (b"[]", b"{}", b"[1]", b"nonsense", b'["' + b"x" * 5000 + b'"]'):
        with pytest.raises(ValueError):  # noqa: PT011  # json's own words, too
            roster.gossiped(wrong)
    assert roster.gossiped(b'["\\ud800"]') == [b"?"]


def test_ids_are_libp2ps() -> None:
    """Known answer: base 58 of Bitcoin's own examples; the rest is held by real nodes."""
    assert base58(b"\0\0Hello World!") == "112NEpo7TZRRrLZSi2U"
    who = person(0)
    assert who.id.startswith("Qm")
    assert len(who.id) == 46
    assert id_of(who.public) == who.id
    signature = who.sign(b"words")
    assert signed_by(who.public, signature, b"words")
    assert not signed_by(who.public, signature, b"other words")
    assert not signed_by(who.public, signature, b"")
    assert not signed_by(b"no key", signature, b"words")
    assert not signed_by(bytes(2000), signature, b"words")


def test_a_file_that_is_no_identity_is_told(tmp_path: Path) -> None:
    file = tmp_path / "identity.key"
    for data in (b"", b"something", key()[:100], RSA_KEY):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r".+"):
            Identity(file)
