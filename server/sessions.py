"""Sessions: the control streams of one run's clients, and what is sent on them.

A session is one stream of one client. What is sent to a client without a session is not lost: an
order waits in the run's book and an outcome in its untold ones, and both go out at the next hello.
"""

import asyncio
import secrets
from dataclasses import dataclass, field

from atoll.protocols import wire_pb2
from atoll.protocols.errors import RemoteError

QUEUE = 256  # messages; a client that does not read is cut off rather than buffered without bound


@dataclass
class Session:
    client: str
    fence: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    down_codec: str = "fp32"
    out: "asyncio.Queue[wire_pb2.ServerMessage | None]" = field(
        default_factory=lambda: asyncio.Queue(QUEUE)
    )
    step: int = 0  # local steps done of the order in training, as last heard
    bytes_up: int = 0
    bytes_down: int = 0

    def send(self, message: wire_pb2.ServerMessage) -> None:
        """Queue a message; a full queue ends the session."""
        try:
            self.out.put_nowait(message)
        except asyncio.QueueFull:
            self.close()

    def close(self) -> None:
        """End the stream once what is queued has gone out."""
        if self.out.full():
            self.out.get_nowait()
        self.out.put_nowait(None)


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
