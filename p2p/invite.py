"""Invite: one line of text that lets a machine into a run, `fl1_` and base 32.

It holds where peers may be found, which run it is (the hash of its manifest and the founder's key,
so that nobody can pass off another run) and the run's secret. Whoever holds it may take part: it is
a key, not an address. A checksum tells a mistyped one from a wrong one.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import TextIO

from atoll.protocols.errors import PeerError

MARK = "fl1_"
VERSION = 1
ADDRESSES = 16  # at most
LONGEST = 255  # bytes of a run's id, or of an address
CHECKSUM = 6  # bytes
TEXT = 8192  # characters, at most


@dataclass(frozen=True)
class Invite:
    """`write` makes the text of it, `read` is its inverse."""

    addresses: tuple[str, ...]  # multiaddrs, each with its peer's id; () where nobody is known yet
    run: str
    manifest: str  # SHA-256 of the manifest's bytes, hex
    founder: bytes  # Ed25519 public key, 32 bytes
    secret: bytes  # 32 bytes

    def __post_init__(self) -> None:
        fits = all(0 < len(text.encode()) <= LONGEST for text in (self.run, *self.addresses))
        if not fits or len(self.addresses) > ADDRESSES:
            raise ValueError(f"run and addresses of 1 to {LONGEST} bytes, {ADDRESSES} addresses")
        if len(bytes.fromhex(self.manifest)) != 32 or len(self.founder) != 32:
            raise ValueError("a manifest's hash and a founder's key are 32 bytes")
        if len(self.secret) != 32:
            raise ValueError("a secret is 32 bytes")

    def __repr__(self) -> str:
        """Without the secret: this is what logs and tracebacks show."""
        return f"Invite(run={self.run!r}, addresses={self.addresses!r})"


def write(invite: Invite) -> str:
    body = bytes([VERSION]) + bytes.fromhex(invite.manifest) + invite.founder + invite.secret
    for text in (invite.run, *invite.addresses):
        told = text.encode()
        body += bytes([len(told)]) + told
    body += hashlib.sha256(body).digest()[:CHECKSUM]
    return MARK + base64.b32encode(body).decode().rstrip("=").lower()


def read(text: str) -> Invite:
    """The invite of a text, blanks and line breaks in it forgiven. PeerError FL-P301 where it is
    none, FL-P302 where a part is missing or mistyped, FL-P303 where it is of another version."""
    joined = "".join(text.split())
    if not joined.startswith(MARK) or len(joined) > TEXT:
        raise _none_such(joined)
    coded = joined.removeprefix(MARK).upper()
    try:
        body = base64.b32decode(coded + "=" * (-len(coded) % 8))
    except (binascii.Error, ValueError) as error:
        raise _damaged("it holds what an invite does not") from error
    body, checksum = body[:-CHECKSUM], body[-CHECKSUM:]
    if not body or hashlib.sha256(body).digest()[:CHECKSUM] != checksum:
        raise _damaged(f"its checksum does not fit its {len(joined)} characters")
    if body[0] != VERSION:
        raise PeerError(
            "FL-P303",
            f"an invite of version {body[0]}, this program reads {VERSION}",
            "update the older of the two: pip install --upgrade atoll",
        )
    try:
        return _parse(body[1:])
    except ValueError as error:
        raise _damaged(str(error)) from error


def typed(stream: TextIO) -> str:
    """What may be an invite, from a stream: its first line, and of a pipe or a file those after it
    that make it whole, since a mail program may have broken it."""
    text = stream.readline(TEXT + 1)
    while not stream.isatty() and len(text) <= TEXT and not _whole(text):
        more = stream.readline(TEXT + 1)
        if not more:
            break
        text += more
    return text


def _whole(text: str) -> bool:
    """False where more of it may mend it."""
    try:
        read(text)
    except PeerError as error:
        return bool(text.strip()) and error.code != "FL-P302"
    return True


def _parse(body: bytes) -> Invite:
    """ValueError where it is not what `write` makes."""
    texts, rest = [], body[96:]
    while rest:
        end = 1 + rest[0]
        if end > len(rest):
            raise ValueError("its last text is cut off")
        texts.append(rest[1:end].decode())  # a UnicodeDecodeError is a ValueError
        rest = rest[end:]
    if not texts:
        raise ValueError("it names no run")
    run, *addresses = texts
    return Invite(tuple(addresses), run, body[:32].hex(), body[32:64], body[64:96])


def _none_such(text: str) -> PeerError:
    shown = f"{text[:12]!r}…" if len(text) > 12 else repr(text)
    return PeerError(
        "FL-P301",
        f"not an invite: {shown}",
        f"an invite begins with {MARK}; `fl-peer init` and `fl-peer invite` print one",
    )


def _damaged(why: str) -> PeerError:
    return PeerError(
        "FL-P302",
        f"the invite is truncated or mistyped: {why}",
        "copy all of it, it is one line; or pass it by a file: fl-peer join - < FILE",
    )
