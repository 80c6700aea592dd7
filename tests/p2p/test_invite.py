"""Invites: text and back; what is not whole is told from what is none."""

import base64
import hashlib
import random
import string
from dataclasses import replace

import pytest

from atoll.p2p import invite
from atoll.p2p.invite import Invite
from atoll.protocols.errors import PeerError
from tests.p2p.people import INVITE


def outcome(text: str) -> Invite | str:
    """What is read, or the error's code."""
    try:
        return invite.read(text)
    except PeerError as error:
        return error.code


def test_an_invite_is_one_line_that_reads_back() -> None:
    text = invite.write(INVITE)
    assert text.startswith("fl1_")
    assert set(text) <= set(string.ascii_lowercase + string.digits + "_")
    assert invite.read(text) == INVITE
    assert invite.read(f"  {text[:70]}\n  {text[70:].upper()}\n") == INVITE
    nobody = replace(INVITE, addresses=())
    assert invite.read(invite.write(nobody)) == nobody


def test_it_does_not_show_its_secret() -> None:
    assert INVITE.secret.hex() not in repr(INVITE)
    assert repr(INVITE.secret) not in repr(INVITE)
    assert "4001" in repr(INVITE)


@pytest.mark.parametrize("text", ["", "fl2_abc", "/ip4/127.0.0.1", "FL1_ab", "fl1_" + "a" * 9000])
def test_what_is_no_invite_is_told(text: str) -> None:
    with pytest.raises(PeerError) as error:
        invite.read(text)
    assert error.value.code == "FL-P301"
    assert "fl-peer init" in error.value.hint


def test_a_truncated_or_mistyped_one_is_told_wherever_it_happened() -> None:
    text = invite.write(INVITE)
    rng = random.Random(5)
    for _ in range(300):
        at = rng.randrange(4, len(text))
        other = rng.choice([c for c in string.ascii_lowercase + "234567" if c != text[at]])
        for wrong in (text[:at], text[:at] + other + text[at + 1 :], text[:at] + text[at + 1 :]):
            if at < len(text) - 1:  # the last digit has bits that say nothing
                assert outcome(wrong) == "FL-P302"


def test_one_of_another_version_says_so() -> None:
    body = bytes([9]) + bytes(100)
    body += hashlib.sha256(body).digest()[: invite.CHECKSUM]
    with pytest.raises(PeerError, match="version 9") as error:
        invite.read(invite.MARK + base64.b32encode(body).decode().rstrip("="))
    assert error.value.code == "FL-P303"


def test_random_bytes_under_a_right_checksum_raise_nothing_else() -> None:
    rng = random.Random(6)
    read = 0
    for _ in range(2000):
        body = bytes([1]) + rng.randbytes(rng.choice([0, 5, 96, 97, 99, 140, 300]))
        if rng.random() < 0.5:
            body = body[:97] + bytes([1, 65, 2, 65, 66])
        body += hashlib.sha256(body).digest()[: invite.CHECKSUM]
        found = outcome(invite.MARK + base64.b32encode(body).decode().rstrip("="))
        if isinstance(found, Invite):
            assert invite.read(invite.write(found)) == found
            read += 1
        else:
            assert found == "FL-P302"
    assert read > 100


@pytest.mark.parametrize(
    "change",
    [
        {"run": ""},
        {"run": "x" * 256},
        {"addresses": ("a",) * 17},
        {"manifest": "ab"},
        {"founder": b"short"},
        {"secret": b"short"},
    ],
)
def test_one_that_cannot_be_written_is_not_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="bytes"):
        replace(INVITE, **change)  # type: ignore[arg-type]
