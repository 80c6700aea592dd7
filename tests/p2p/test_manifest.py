"""Manifests: one text of each, by its hash and its founder; nothing else passes for it."""

import contextlib
import json
import random
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.p2p import manifest
from atoll.protocols.errors import PeerError
from tests.p2p.people import FOUNDER, INVITE, MANIFEST, PUBLIC, SIGNED


def test_it_reads_back_and_its_founder_has_signed_it() -> None:
    data = manifest.dump(MANIFEST)
    assert manifest.parse(data) == MANIFEST
    assert manifest.verify(SIGNED, INVITE.manifest, PUBLIC) == MANIFEST


def test_another_is_refused_with_the_reason() -> None:
    other = manifest.dump(replace(MANIFEST, lr=0.5))
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    named = manifest.dump(replace(MANIFEST, founder="0" * 64))
    data = manifest.dump(MANIFEST)
    for signed, hashed, why in (
        (manifest.sign(other, FOUNDER), INVITE.manifest, "hashes to"),
        (manifest.sign(data, stranger), INVITE.manifest, "its signature is wrong"),
        (manifest.sign(named, FOUNDER), manifest.digest(named), "another founder"),
        (manifest.sign(b"{}", FOUNDER), manifest.digest(b"{}"), "missing"),
        (b"", INVITE.manifest, "hashes to"),
    ):
        with pytest.raises(PeerError, match=why) as error:
            manifest.verify(signed, hashed, PUBLIC)
        assert error.value.code == "FL-P306"


@pytest.mark.parametrize(
    "change",
    [
        {"local_steps": 0},
        {"lr": float("nan")},
        {"lr": -1.0},
        {"speed": 0.0},
        {"rounds": -1},
        {"elements": 1 << 60},
        {"name": ""},
        {"name": "a\x1b[2J"},
        {"model": "m" * 1001},
        {"init": "xyz"},
        {"founder": "AB" * 32},
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is|are"):
        replace(MANIFEST, **change)  # type: ignore[arg-type]


def test_only_the_one_text_of_it_is_read() -> None:
    data = manifest.dump(MANIFEST)
    plain = json.loads(data)
    for other in (
        json.dumps(plain).encode(),
        data.replace(b'"lr":0.001', b'"lr":1e-3'),
        data.replace(b'"rounds":0', b'"rounds":0,"rounds":0'),
        data.replace(b'"lr":0.001', b'"lr":1' + b"0" * 400),
        data.replace(b'"rounds":0', b'"rounds":0,"more":1'),
        b"[" * 50_000,
        b" " * 70_000,
        b"\xff",
        b'"\\ud800"',
        b"null",
    ):
        with pytest.raises((ValueError, OverflowError)):
            manifest.parse(other)


def test_spoilt_bytes_raise_nothing_else() -> None:
    data = manifest.dump(MANIFEST)
    rng = random.Random(7)
    for _ in range(1000):
        spoilt = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            assert manifest.dump(manifest.parse(bytes(spoilt))) == bytes(spoilt)
