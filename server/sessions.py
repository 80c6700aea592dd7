"""Sessions: the control streams of one run's clients, and what is sent on them.

A session is one stream of one client. What is sent to a client without a session is not lost: an
order waits in the run's book and an outcome in its untold ones, and both go out at the next hello.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from atoll.protocols import wire_pb2
from atoll.protocols.blobs import INLINE
from atoll.protocols.errors import RemoteError
from atoll.protocols.inbox import Inbox
from atoll.protocols.later import Later
from atoll.protocols.links import PLAIN_LINK, Link
from atoll.protocols.packed import MORE, Parts, nested, size

Pack = Callable[[], bytes]  # makes a serialized ServerMessage

LATER = 0.05  # seconds a receipt or an outcome may wait for company
QUEUE = 256  # messages; a client that does not read is cut off rather than buffered without bound


@dataclass
class Session:
    client: str
    fence: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    link: Link = PLAIN_LINK  # codecs as agreed
    former: frozenset[str] = frozenset()  # orders it had in hand: packed as agreed then
    held: tuple[str, int] | None = None  # what it holds of a chain of models
    out: Inbox[Parts | None] = field(default_factory=Inbox)
    room: int = QUEUE  # messages that may wait to be written
    cut: asyncio.Event = field(default_factory=asyncio.Event)  # it does not read: end it now
    batch: bool = False  # the client reads several messages in one
    beat: tuple[str, int] = ("", 0)  # an order, and the local steps done of it, as last heard
    _waiting: dict[str, Pack] = field(default_factory=dict)  # by update

    def __post_init__(self) -> None:
        self._later = Later(self.flush)

    def send(self, message: wire_pb2.ServerMessage) -> None:
        """Queue a message, behind those that waited for one; a full queue ends the session."""
        self.send_parts((message.SerializeToString(),))

    def send_parts(self, message: Parts) -> None:
        """The same, of a serialized ServerMessage."""
        self.flush()
        self._put(message)

    def send_later(self, update: str, pack: Pack) -> None:
        """Queue a receipt or an outcome, for which nobody waits: with the next message that is
        urgent, or within LATER seconds. An outcome says all that its receipt would: of one update
        only the last message is packed and sent, after those that were queued before it. Private
        state takes outcomes in one after the other, and must meet the server's order."""
        if not self._waiting:
            self._later.within(LATER)
        self._waiting.pop(update, None)
        self._waiting[update] = pack

    def flush(self) -> None:
        if not self._waiting:
            return
        self._later.done()
        waiting, self._waiting = self._waiting, {}
        for pack in waiting.values():
            self._put((pack(),))

    async def next(self) -> bytes | None:
        """What to write next: all that is queued in one message where the client reads that."""
        first = await self.out.get()
        if first is None:
            return None
        further: Parts = ()
        length = size(first)
        while self.batch and length < INLINE and (other := self.out.peek()) is not None:
            self.out.drop()
            further += nested(MORE, *other)
            length += size(other)
        return b"".join(further + first)  # an order's model in front: `protocols/lifted.py`

    def _put(self, message: Parts) -> None:
        if len(self.out) < self.room:
            self.out.put(message)
        else:
            self.cut.set()

    def close(self) -> None:
        """End the stream once what is queued has gone out."""
        self.flush()
        self.out.put(None)


class Sessions:
    """The newest session of each client, found by name or by token."""

    def __init__(self) -> None:
        self.of: dict[str, Session] = {}
        self._by_token: dict[str, Session] = {}

    def open(self, client: str, fence: int) -> Session:
        former = self.of.get(client)
        if former is not None:
            self.drop(former)
            former.close()
        session = self.of[client] = Session(client, fence)
        self._by_token[session.token] = session
        return session

    def drop(self, session: Session) -> None:
        """Forget a session that has ended; a newer one of the same client stays."""
        self._by_token.pop(session.token, None)
        if self.of.get(session.client) is session:
            del self.of[session.client]

    def find(self, token: str) -> Session:
        """Raises RemoteError FL-W110: the caller must say hello again."""
        session = self._by_token.get(token)
        if session is None:
            raise RemoteError(
                "FL-W110", "no such session", "say hello on Control first", retry_seconds=1.0
            )
        return session
