"""Names for nodes and runs: ULIDs, 26 characters, sortable by time. Only drivers make them."""

import re
import secrets
import socket
import time

CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford base 32


def ulid(milliseconds: int | None = None, random: bytes | None = None) -> str:
    """A new ULID: 48 bits of wall time and 80 random bits."""
    stamp = int(time.time() * 1000) if milliseconds is None else milliseconds
    value = stamp << 80 | int.from_bytes(random or secrets.token_bytes(10))
    return "".join(ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


def machine_name() -> str:
    """This machine's name as a client may be called: lower case, 63 characters at most."""
    clean = re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower())[:63].lstrip("._-")
    return clean or "client"
