"""Links: with which codecs updates go up and models come down, agreed for each client.

A run says what it allows, each way, best first: `up=topk:0.01+ef/int8,down=int8`. A client may ask
for one of these, and gets the first that it can do otherwise; `fp32` is always allowed, so that a
client that knows nothing else takes part. Only names are compared here, nothing is imported.
"""

from collections.abc import Collection
from dataclasses import dataclass

from atoll.protocols.errors import RemoteError, UsageError

PLAIN = "fp32"
CHAIN = "chain"  # capability: keeps a model, and adds to it what comes down (wire.proto)
FEEDBACK = "ef"  # capability, and part of a spec: what a codec left out goes with the next update


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
    """Capabilities of a client whose codec `spec` is: `topk:0.01+ef` up needs topk and ef."""
    if spec == PLAIN:
        return {PLAIN}
    first, *rest = spec.split("+")
    head, colon, tail = first.partition(":")
    own = colon and tail[:1].isalpha() and "=" not in tail.partition(":")[0]  # module:object
    names = {f"{head}:{tail.partition(':')[0]}" if own else head}
    return names | {part.partition(":")[0] for part in rest} | ({CHAIN} if way == "down" else set())


def feedback(spec: str) -> tuple[str, float | None]:
    """A spec without its error feedback, and the decay of that: 1 where `+ef` gives none.

    UsageError FL-S102 where the decay is no number from 0 to 1.
    """
    first, *rest = spec.split("+")
    found = [part for part in rest if part.partition(":")[0] == FEEDBACK]
    if not found:
        return spec, None
    _, colon, text = found[0].partition(":")
    try:
        beta = float(text) if colon else 1.0
    except ValueError:
        beta = -1.0
    if len(found) > 1 or not 0 <= beta <= 1:
        raise UsageError("FL-S102", f"codec {spec!r}", "write +ef once, or +ef:0.95 with its decay")
    return "+".join((first, *(part for part in rest if part not in found))), beta


def ways(text: str, default: str = PLAIN) -> tuple[str, str]:
    """(up, down) of what a user writes: `bf16` for both, or `up=...,down=...`."""
    if "up=" not in text and "down=" not in text:
        return text, text
    found: dict[str, str] = {"up": default, "down": default}
    way = ""
    for part in text.split(","):
        name, equals, spec = part.strip().partition("=")
        if equals and name in found:
            way, found[name] = name, spec
        elif way:
            found[way] += f",{part}"  # a parameter of the codec before it
        else:
            raise UsageError("FL-S108", f"codec {text!r}", "write bf16, or up=bf16,down=fp32")
    return found["up"], found["down"]


def _listed(can: Collection[str]) -> str:
    return ", ".join(sorted(can)) or "nothing"
