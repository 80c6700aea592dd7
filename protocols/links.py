"""Links: with which codecs updates go up and models come down, agreed for each client.

A run says what it allows, each way, best first: `up=topk:0.01+ef/int8,down=int8`. A client may ask
for one of these, and gets the first that it can do otherwise; `fp32` is always allowed, so that a
client that knows nothing else takes part. Only names are compared here, nothing is imported.
"""

from collections.abc import Collection
from dataclasses import dataclass

from atoll.protocols.codecspec import parse
from atoll.protocols.errors import RemoteError

PLAIN = "fp32"
CHAIN = "chain"  # capability: keeps a model, and adds to it what comes down (wire.proto)


@dataclass(frozen=True, slots=True)
class Link:
    """Codec specs of one client. Asked for: empty is as the run wants."""

    up: str = ""
    down: str = ""


AS_THE_RUN = Link()
PLAIN_LINK = Link(PLAIN, PLAIN)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Codec specs that a run allows, best first."""

    up: tuple[str, ...] = (PLAIN,)
    down: tuple[str, ...] = (PLAIN,)

    @classmethod
    def of(cls, up: str, down: str) -> "Allowed":
        """From what stands in a run's spec, e.g. "topk:0.01+ef/int8"."""
        return cls(tuple(up.split("/")), tuple(down.split("/")))

    def agree(self, asked: Link, capabilities: Collection[str]) -> Link:
        """The pair a client gets. RemoteError FL-W108 where there is none."""
        return Link(
            _agreed("up", self.up, asked.up, capabilities),
            _agreed("down", self.down, asked.down, capabilities),
        )


def _agreed(way: str, allowed: tuple[str, ...], asked: str, can: Collection[str]) -> str:
    allowed = (*allowed, PLAIN) if PLAIN not in allowed else allowed
    if not asked:
        for spec in allowed:
            if needs(way, spec) <= set(can):
                return spec
        raise RemoteError(
            "FL-W108",
            f"the run packs {way} as {' or '.join(allowed)}, the client can {_listed(can)}",
            "a client can at least fp32: see protocols/wire.proto",
        )
    if asked not in allowed:
        raise RemoteError(
            "FL-W108",
            f"the client asks for {way}={asked}, the run allows {' or '.join(allowed)}",
            f"ask for one of these, or run with --codec {way}={'/'.join((*allowed, asked))}",
        )
    lacking = sorted(needs(way, asked) - set(can))
    if lacking:
        raise RemoteError(
            "FL-W108",
            f"the client asks for {way}={asked} and cannot {', '.join(lacking)}",
            "install a newer client, or ask for fp32",
        )
    return asked


def needs(way: str, spec: str) -> set[str]:
    """Capabilities of a client whose codec `spec` is: `topk:0.01+ef` up needs topk and ef.

    Raises UsageError FL-S102 or FL-S108 where it is no spec.
    """
    chain = parse(spec)
    return set(chain.needs) | ({CHAIN} if way == "down" and not chain.exact else set())


def _listed(can: Collection[str]) -> str:
    return ", ".join(sorted(can)) or "nothing"
