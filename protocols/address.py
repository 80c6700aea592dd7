"""HOST:PORT, as a person types it."""

import ipaddress

from atoll.protocols.errors import UsageError


def split(address: str, least: int = 1) -> tuple[str, int]:
    """(host, port), the port at least `least`. UsageError FL-S108."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not least <= int(port) <= 65535:
        raise UsageError("FL-S108", f"address {address!r}", "give HOST:PORT, e.g. 127.0.0.1:7447")
    return host, int(port)


def check_served(address: str, insecure_lan: bool) -> None:
    """Refuse to serve others than this machine unless it was spelled out. FL-S105, FL-S108."""
    host, _ = split(address, least=0)
    bare = host.strip("[]")
    try:
        local = ipaddress.ip_address(bare).is_loopback
    except ValueError:
        local = bare == "localhost"
    if not local and not insecure_lan:
        raise UsageError(
            "FL-S105",
            f"{address} can be reached from other machines, and nothing is encrypted yet",
            "serve 127.0.0.1, or add --insecure-lan on a network where you trust everyone",
        )
