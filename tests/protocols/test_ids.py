"""ULIDs: sortable by time, never twice, in an alphabet without look-alikes."""

import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols.bounds import CLIENT, ULID
from atoll.protocols.ids import ALPHABET, machine_name, ulid


def decoded(text: str) -> int:
    value = 0
    for letter in text:
        value = value * 32 + ALPHABET.index(letter)
    return value


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_a_ulid_is_its_time_and_its_random_bits(stamp: int, random: bytes) -> None:
    made = ulid(stamp, random)
    assert ULID.fullmatch(made)
    assert decoded(made) == stamp << 80 | int.from_bytes(random)


@given(st.lists(st.integers(0, 2**48 - 1), min_size=2, max_size=9, unique=True))
def test_ulids_sort_by_time(stamps: list[int]) -> None:
    made = [ulid(stamp) for stamp in stamps]
    assert sorted(made) == [text for _, text in sorted(zip(stamps, made, strict=True))]


def test_the_alphabet_has_no_look_alikes() -> None:
    assert len(set(ALPHABET)) == 32
    assert not set("ILOU") & set(ALPHABET)
    assert list(ALPHABET) == sorted(ALPHABET)


def test_two_of_one_moment_differ_and_tell_the_time() -> None:
    first, second = ulid(), ulid()
    assert first != second
    assert abs((decoded(first) >> 80) / 1000 - time.time()) < 60
    assert ulid(5) != ulid(5)
    assert ulid(0, bytes(10)) == "0" * 26  # ten zero bytes are ten random bytes like any other


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Anna's-MacBook.local", "anna-s-macbook.local"),
        ("___", "client"),
        ("", "client"),
        ("-._x", "x"),
        ("ü" * 80, "client"),
        ("A" * 80, "a" * 63),
    ],
)
def test_a_machine_is_called_as_a_client_may_be(
    host: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert machine_name() == name
    assert CLIENT.fullmatch(machine_name())
