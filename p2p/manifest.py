"""Manifest: what all peers of a run share, decided once by its founder and signed by it.

A newcomer gets it from any member and checks it against the hash in its invite, so that nobody has
to be believed. It holds no weights: every peer makes the first model itself, from `model`, `data`
and `seed`, and compares it with `init`.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from atoll.aggregation.circle import Patience
from atoll.protocols import state
from atoll.protocols.errors import PeerError

LARGEST = 64 << 10  # bytes of a manifest
DOMAIN = b"atoll-manifest-v1\0"  # so that no other signature of the key passes for one of these
SIGNATURE = 64  # bytes
PRINTED = 1000  # characters of a text in it
HASH = re.compile(r"[0-9a-f]{64}")
COUNTS = {"local_steps": 1, "batch": 1, "elements": 1, "rounds": 0, "seed": 0}  # and their least


@dataclass(frozen=True)
class Manifest:
    """ValueError where a value cannot be."""

    run: str  # ULID
    name: str  # for people
    model: str
    data: str
    seed: int
    local_steps: int  # H, of a peer as fast as the founder, between two rounds
    batch: int  # examples in a step
    lr: float
    outer: str  # "nesterov:0.7,0.9"
    codec: str  # "fp32", "int8", "up=...,down=..."
    rounds: int  # 0: no end
    elements: int  # of the flat vector
    schema: str  # hash of names, shapes and dtypes
    init: str  # SHA-256 of the flat fp32 vector all start from, hex
    speed: float  # the founder's steps a second: what one share is
    founder: str  # its Ed25519 public key, hex
    peer: str  # libp2p id of the founder's own peer: it decides the first commit
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        texts = ("run", "name", "model", "data", "outer", "codec", "schema", "peer")
        for name in texts:
            text = getattr(self, name)
            if not 0 < len(text) <= PRINTED or not text.isprintable():
                raise ValueError(f"{name} is 1 to {PRINTED} printable characters")
        for name, least in COUNTS.items():
            if not least <= getattr(self, name) < 1 << 53:
                raise ValueError(f"{name} is from {least} to 2**53, not {getattr(self, name)}")
        if not HASH.fullmatch(self.init) or not HASH.fullmatch(self.founder):
            raise ValueError("init and founder are 64 hexadecimal digits")
        for name in ("lr", "speed"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is above 0, not {getattr(self, name)}")


def dump(manifest: Manifest) -> bytes:
    """The one text of it: its hash is in the invite."""
    return state.dumps(manifest).encode()


def parse(data: bytes) -> Manifest:
    """ValueError where `data` is not exactly what `dump` makes."""
    if len(data) > LARGEST:
        raise ValueError(f"a manifest of {len(data)} bytes, at most {LARGEST}")
    try:
        manifest = state.loads(Manifest, data.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if dump(manifest) != data:
        raise ValueError("not written as a manifest is")
    return manifest


def digest(data: bytes) -> str:
    """As an invite has it: SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def sign(data: bytes, founder: Ed25519PrivateKey) -> bytes:
    """What members hand on: the founder's signature, then the manifest."""
    return founder.sign(DOMAIN + data) + data


def verify(signed: bytes, hashed: str, founder: bytes) -> Manifest:
    """The manifest that an invite means: with its hash, and signed by its founder's key.
    PeerError FL-P306 where it is another."""
    signature, data = signed[:SIGNATURE], signed[SIGNATURE:]
    try:
        if digest(data) != hashed:
            raise ValueError(f"it hashes to {digest(data)[:12]}…, the invite says {hashed[:12]}…")
        Ed25519PublicKey.from_public_bytes(founder).verify(signature, DOMAIN + data)
        manifest = parse(data)
        if manifest.founder != founder.hex():
            raise ValueError("it names another founder")
    except (ValueError, OverflowError, InvalidSignature) as error:
        why = str(error) or "its signature is wrong"
        raise PeerError(
            "FL-P306",
            f"the run's manifest is not the one of the invite: {why}",
            "ask for a new invite; a peer that gave this one cannot be trusted",
        ) from error
    return manifest
