"""A run's papers and some identities, for tests."""

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.p2p import manifest, roster
from atoll.p2p.identity import Identity, make
from atoll.p2p.invite import Invite
from atoll.p2p.manifest import Manifest

FOUNDER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = FOUNDER.public_key().public_bytes_raw()
MANIFEST = Manifest(
    run="01M87EYYSB365F7S3CKYSEMWVC", name="brave otter", model="charlm", data="topics", seed=0,
    local_steps=50, batch=8, lr=1e-3, outer="nesterov:0.7,0.9", codec="fp32", rounds=0,
    elements=100, schema="ab12", init="0" * 64, speed=5.0, founder=PUBLIC.hex(), peer="QmFounder",
)  # fmt: skip
SIGNED = manifest.sign(manifest.dump(MANIFEST), FOUNDER)
SECRET = bytes(range(100, 132))
INVITE = Invite(
    ("/ip4/127.0.0.1/tcp/4001/p2p/QmTheFirst", "/ip6/::1/tcp/4001/p2p/QmTheFirst"),
    MANIFEST.run, manifest.digest(manifest.dump(MANIFEST)), PUBLIC, SECRET,
)  # fmt: skip


def key() -> bytes:
    """A libp2p identity file's bytes."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "identity.key"
        make(file)
        return file.read_bytes()


@cache
def person(number: int) -> Identity:
    """Of so many different ones: a key takes 0.1 s to make and 30 ms to read."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "identity.key"
        make(file)
        return Identity(file)


def entry_of(who: Identity, at: float | None = None, **changes: Any) -> roster.Entry:
    addresses = tuple(a.replace("QmTheFirst", who.id) for a in INVITE.addresses)
    made = roster.Entry(
        who.id, "otter", True, 1e6, 5.0, "ab12", addresses, "", "5e" * 32,
        time.time() if at is None else at,
    )  # fmt: skip
    return replace(made, **changes)
