"""Links, a client's half: what it asks for, what it can do, and the codecs it is told to use.

A spec from the server is compared with our own names, and with what this client's owner asked for:
what a stranger writes is never imported.
"""

from atoll.protocols import messages
from atoll.protocols.codecs import BUILTIN, Codec, codec
from atoll.protocols.errors import ClientError
from atoll.protocols.links import CHAIN, FEEDBACK, Link, feedback, needs, ways


def asked_of(text: str) -> Link:
    """What the owner wants: `int8` both ways, or `up=int8` alone; empty is as the run wants.

    Raises UsageError FL-S101, FL-S102 or FL-S103 for a codec that is not here.
    """
    asked = Link(*ways(text, ""))
    for spec in (asked.up, asked.down):
        if spec:
            codec(feedback(spec)[0])
    return asked


def capabilities(asked: Link) -> tuple[str, ...]:
    """Built-in codecs, our own where the owner names one, and what else we can do with models."""
    own = {n for spec in (asked.up, asked.down) if ":" in spec for n in needs("up", spec)}
    return tuple(sorted({*BUILTIN, *own, CHAIN, FEEDBACK}))


def own_codecs(agreed: Link, asked: Link) -> tuple[Codec, Codec]:
    """(up, down) of what the server welcomed us with. ClientError FL-W108: not ours."""
    known = set(capabilities(asked))
    for way, spec in (("up", agreed.up), ("down", agreed.down)):
        if not spec or not needs(way, spec) <= known:
            raise ClientError(
                "FL-W108",
                f"the run packs {way} as {messages.text(spec, 60)!r}, which this client cannot",
                f"known here: {', '.join(sorted(BUILTIN))}; install a newer atoll",
            )
    return codec(feedback(agreed.up)[0]), codec(feedback(agreed.down)[0])
