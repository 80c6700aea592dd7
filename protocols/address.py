"""HOST:PORT, as a person types it."""

from atoll.protocols.errors import UsageError


def split(address: str, least: int = 1) -> tuple[str, int]:
    """(host, port), the port at least `least`. UsageError FL-S108."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not least <= int(port) <= 65535:
        raise UsageError("FL-S108", f"address {address!r}", "give HOST:PORT, e.g. 127.0.0.1:7447")
    return host, int(port)
