"""Identity: a peer's libp2p key, its id, and signatures that anybody can check by the id alone.

A libp2p id is the hash of a public key (https://github.com/libp2p/specs/blob/master/peer-ids/
peer-ids.md), so who shows key and signature has shown that it is that peer: no directory of keys.
"""

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from atoll.protocols.durable import put_private

RSA_KEY = b"\x08\x00\x12"  # protobuf: type RSA, then the key's bytes with their length
SHA256_HASH = b"\x12\x20"  # multihash: sha2-256, 32 bytes
LARGEST = 1024  # bytes of a public key: RSA of 4096 bits has 550
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Identity:
    """The key that a node keeps in `identity.key`; libp2p proves the same one to its callers."""

    def __init__(self, file: Path) -> None:
        """OSError, or ValueError where the file holds no RSA key."""
        try:
            key = serialization.load_der_private_key(_unpacked(file.read_bytes()), None)
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError(f"{file} holds no RSA key")
        self._key = key
        self.public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.id = id_of(self.public)

    def derived(self, purpose: bytes) -> bytes:
        """32 bytes that only this key's owner knows, always the same."""
        private = self._key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return hashlib.sha256(purpose + private).digest()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def make(file: Path) -> None:
    """A new one, durable before anybody can know it: one that comes back as another peer has
    broken what it promised. OSError."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    der = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    put_private(file, RSA_KEY + _varint(len(der)) + der)
    file.chmod(0o400)


def id_of(public: bytes) -> str:
    """The peer id of a public key (DER), base 58."""
    packed = RSA_KEY + _varint(len(public)) + public
    return base58(SHA256_HASH + hashlib.sha256(packed).digest())


def signed_by(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the key's owner signed `data`; False for keys that are none."""
    if len(public) > LARGEST or len(signature) > LARGEST:
        return False
    try:
        key = serialization.load_der_public_key(public)
        if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 4096:
            return False
        key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def base58(data: bytes) -> str:
    value, text = int.from_bytes(data), ""
    while value:
        value, digit = divmod(value, 58)
        text = BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def _varint(value: int) -> bytes:
    coded = b""
    while value > 127:
        coded += bytes([value & 127 | 128])
        value >>= 7
    return coded + bytes([value])


def _unpacked(data: bytes) -> bytes:
    """The key inside its protobuf. ValueError where it is of another kind."""
    if not data.startswith(RSA_KEY):
        raise ValueError("not an RSA key of libp2p")
    at = len(RSA_KEY)
    while at < len(data) and data[at] & 128:
        at += 1
    return data[at + 1 :]
