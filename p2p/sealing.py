"""Sealing: `aggregation/seals.py` on the network: Ed25519 keys that come out of the peers' own.

The key follows from the peer's identity, so it is the same in each of its lives, and stands in the
roster entry that the identity signs: what a seal says is said by the peer of that id.
"""

import base64
import binascii
import functools

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from atoll.p2p.identity import Identity

DOMAIN = b"atoll-seal-v1\0"
KNOWN = 1024  # peers whose keys are kept, those that were heard of longest ago go first


class Sealing:
    """As `seals.Seals`. `public`: for this peer's entry."""

    def __init__(self, identity: Identity) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(identity.derived(DOMAIN))
        self.public = self._key.public_key().public_bytes_raw().hex()
        self._me = identity.id
        self.keys: dict[str, str] = {}  # of others, hex; worth keeping over restarts

    def know(self, peer: str, public: str) -> None:
        """A peer's key, hex, by its own signed entry: again whenever that is renewed."""
        self.keys.pop(peer, None)
        self.keys[peer] = public
        while len(self.keys) > KNOWN:
            del self.keys[next(iter(self.keys))]

    def seal(self, text: str) -> str:
        return base64.b64encode(self._key.sign(DOMAIN + text.encode())).decode()

    def holds(self, peer: str, text: str, seal: str) -> bool:
        public = self.public if peer == self._me else self.keys.get(peer, "")
        return bool(public) and _signed(public, text, seal)


@functools.lru_cache(8192)  # the same commit is announced at every beat, by all
def _signed(public: str, text: str, seal: str) -> bool:
    try:
        signature = base64.b64decode(seal, validate=True)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(signature, DOMAIN + text.encode())
    except (ValueError, binascii.Error, InvalidSignature):
        return False
    return True
