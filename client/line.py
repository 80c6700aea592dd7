"""Line: one control stream, as a client speaks on it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from atoll.client import transfer
from atoll.protocols import wire_pb2
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.errors import ClientError
from atoll.protocols.inbox import Inbox
from atoll.protocols.later import Later
from atoll.protocols.messages import ACK_FIELD
from atoll.protocols.packed import MORE, Parts, nested

LATER = 0.05  # seconds an acknowledgement may wait for a message to go with
# A transfer ended with its connection, or the server took us to hold what we do not.
BROKEN = ("FL-C101", "FL-C109", "FL-S208", "FL-W110", "FL-W112")


@dataclass
class Line:
    """What is said goes out in order; bulk goes over calls of its own."""

    out: Inbox[Parts | None] = field(default_factory=Inbox)
    token: str = ""
    run: str = ""
    inline_limit: int = 0
    bulk: Any = None
    patience: transfer.Patience = field(default_factory=transfer.Patience)
    _acks: list[str] = field(default_factory=list)  # updates whose outcome we know

    def __post_init__(self) -> None:
        self._later = Later(self._flush)

    def say(self, **kind: Any) -> None:
        self.out.put((wire_pb2.ClientMessage(**kind).SerializeToString(),))

    def acknowledge(self, update: str) -> None:
        """Not urgent: it goes with the next message, or on its own after LATER seconds."""
        if not self._acks:
            self._later.within(LATER)
        self._acks.append(update)

    def _flush(self) -> None:
        if self._acks:
            self.say(ack=self._take_acks())

    async def queued(self) -> AsyncIterator[bytes]:
        """What is said, until None is."""
        while (message := await self.out.get()) is not None:
            if self._acks:
                acks = nested(ACK_FIELD, self._take_acks().SerializeToString())
                message = (*message, *nested(MORE, *acks))
            yield b"".join(message)

    def _take_acks(self) -> wire_pb2.Ack:
        self._later.done()
        acks, self._acks = self._acks, []
        return wire_pb2.Ack(updates=acks)

    def close(self) -> None:
        self._take_acks()
        self.patience.stop.set()
        if self.bulk is not None:
            self.bulk.close()

    def fetch(self, info: BlobInfo, dest: memoryview) -> None:
        """Fill `dest` with a blob of the server's; blocks. ClientError where it cannot."""
        transfer.download(self.bulk, self.token, self.run, info, dest, self.patience)


def fetch_by(line: Line | None, info: BlobInfo, dest: memoryview) -> None:
    """The same, over the line that an order came by."""
    if line is None:
        raise ClientError("FL-C101", f"no server to fetch {info.id} from")
    line.fetch(info, dest)
