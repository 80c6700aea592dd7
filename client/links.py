"""Links, a client's half: what it asks for, what it can do, and the codecs it is told to use.

A spec from the server is compared with our own names, and with what this client's owner asked for:
what a stranger writes is never imported.
"""

from atoll.protocols import bounds
from atoll.protocols.codecs import Codec, codec
from atoll.protocols.codecspec import OFFERED, ErrorFeedback, from_remote, parse, parse_ways
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.links import CHAIN, Link, needs


def asked_of(text: str) -> Link:
    """What the owner wants: `int8` both ways, or `up=int8` alone; empty is as the run wants.

    Raises UsageError FL-S101, FL-S102 or FL-S103 for a codec that is not here.
    """
    ways = parse_ways(text, "")
    for chain in (*ways.up, *ways.down):
        codec(chain)
    return Link(*ways.texts)


def capabilities(asked: Link) -> tuple[str, ...]:
    """Built-in codecs, our own where the owner names one, and what else we can do with models."""
    own = {n for spec in (asked.up, asked.down) if ":" in spec for n in needs("up", spec)}
    return tuple(sorted({*OFFERED, *own, CHAIN}))


def own_codecs(agreed: Link, asked: Link) -> tuple[Codec, Codec, ErrorFeedback | None]:
    """(up, down, error feedback) of what the server welcomed us with. ClientError FL-W108: not
    ours."""
    up, down = _own(agreed.up, asked.up), _own(agreed.down, asked.down)
    return up, down, parse(agreed.up).feedback


def _own(told: str, asked: str) -> Codec:
    """The codec we are told to use: one of ours, or what our owner asked for."""
    try:
        return codec(asked if asked and told == asked else from_remote(told))
    except RemoteError as error:
        raise ClientError("FL-W108", bounds.text(error.message, 300), error.hint) from error
