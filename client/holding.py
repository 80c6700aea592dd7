"""Holding: the model that a client is sent, and keeps where the next one comes as differences.

Beside it may come vectors, for a local algorithm that has a half on the server.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from atoll.client.room import map_new
from atoll.protocols import chains
from atoll.protocols.blobs import INLINE, BlobInfo
from atoll.protocols.codecs import FP32, Codec
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.manifest import Manifest
from atoll.protocols.messages import Order
from atoll.protocols.payload import Payload, check, parse, read_extras
from atoll.protocols.sent import Sent

Fetch = Callable[[BlobInfo, memoryview], None]


class Holding:
    """One model, overwritten by the next. Small ones are in memory, others mapped in `folder`."""

    def __init__(self, manifest: Manifest, folder: Path | None) -> None:
        self.manifest = manifest
        self.folder = folder
        self.held: tuple[str, int] | None = None  # label and version, while it is part of a chain
        self._model: memoryview | None = None
        self._sha256 = b""  # of the model: a version is fetched once for several orders

    def take(self, sent: Sent, fetch: Fetch, down: Codec) -> Payload:
        """The model that was sent, in fp32; it may alias what is held. `down` packs differences.

        Raises ClientError FL-C109 where they are differences to something else than what is held,
        RemoteError FL-W104 where it is no model of the manifest, or what `fetch` raises.
        """
        base = chains.heard(sent.base)
        view = self._whole(sent, fetch) if base is None else self._after(*base, sent, fetch, down)
        return Payload(chains.whole(self.manifest), view, FP32)

    def _whole(self, sent: Sent, fetch: Fetch) -> memoryview:
        info, self.held = sent.model, None
        assert info is not None, "all of a model is sent as one blob"
        check(self.manifest, info.sections, info.size, FP32, "model")
        if sent.inline and not sent.base:
            return memoryview(sent.inline)  # not overwritten by a later one
        if self._model is None:
            self._model = self._room("model.bin", info.size)
        if sent.inline:
            self._model[:], self._sha256 = sent.inline, b""
        elif self._sha256 != info.sha256 or not info.sha256:
            self._sha256 = b""
            fetch(info, self._model)
            self._sha256 = info.sha256
        if sent.base:
            self.held = sent.base, sent.version
        return self._model

    def _after(self, label: str, version: int, sent: Sent, fetch: Fetch, down: Codec) -> memoryview:
        held = self.held
        if held is None or held[0] != label or not version <= held[1] <= sent.version:
            mine = "none" if held is None else chains.spoken(*held)
            raise ClientError(
                "FL-C109",
                f"version {sent.version} came as a difference to {sent.base}, held is {mine}",
                "nothing: the client connects again and says what it holds",
            )
        model = self._model
        assert model is not None, "a held model is there"
        for number, (info, inline) in enumerate(sent.differences, version + 1):
            if number <= held[1]:
                continue  # it has been added before the server could know
            check(self.manifest, info.sections, info.size, down, "model")
            view = memoryview(inline)
            if not inline:
                view = self._room("difference.bin", info.size)
                fetch(info, view)
            difference = parse(self.manifest, info.sections, view, down, "model")
            self.held, self._sha256 = None, b""
            chains.step(self.manifest, model, difference)
            self.held = label, number
        return model

    def _room(self, name: str, size: int) -> memoryview:
        return room(self.folder, name, size)


class Beside:
    """The extras of orders. Large ones are mapped, and fetched once for several orders."""

    def __init__(
        self,
        expected: Mapping[str, int],
        folder: Path | None,
        own: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """`expected`: elements of each vector that the client's local algorithm asks for; `own`:
        of those for this client alone, which do not come while they are zeros."""
        self.expected = expected
        self.known = {**expected, **own}
        self.folder = folder
        self._held: dict[int, tuple[memoryview, bytes]] = {}  # place in an order -> bytes, SHA-256

    def take(self, order: Order, fetch: Fetch) -> dict[str, Tensor]:
        """The vectors that came with an order; they alias what is held. ClientError FL-C103 where
        one is missing, RemoteError FL-W104 where one is no such vector."""
        found: dict[str, Tensor] = {}
        if not order.extras and not self.expected:
            return found
        for place, (info, inline) in enumerate(order.extras):
            view = memoryview(inline) if inline else self._fetched(place, info, fetch)
            found |= read_extras(info.sections, view, self.known)
        missing = sorted(self.expected.keys() - found.keys())
        if missing:
            raise ClientError(
                "FL-C103",
                f"order {order.id} brings no {missing[0]!r}, which this client's local algorithm "
                "needs",
                "train with the run's local algorithm",
            )
        return found

    def _fetched(self, place: int, info: BlobInfo, fetch: Fetch) -> memoryview:
        view, held = self._held.pop(place, (memoryview(b""), b""))
        if sum(s.length for s in info.sections) != info.size:
            raise RemoteError("FL-W104", f"blob {info.id} is not as long as its sections")
        if len(view) != info.size:
            most = sum(4 * count for count in self.known.values())
            if info.size > most:
                what = f"extras of {info.size} bytes, at most {most} are expected"
                raise RemoteError("FL-W104", what, "send what the local algorithm asks for")
            view, held = room(self.folder, f"extra{place}.bin", info.size), b""
        if held != info.sha256 or not info.sha256:
            fetch(info, view)
        self._held[place] = view, info.sha256
        return view


def room(folder: Path | None, name: str, size: int) -> memoryview:
    """Where a blob goes: into memory, or a mapped file when it is big and there is a folder."""
    if folder is None or size <= INLINE:
        return memoryview(bytearray(size))
    return map_new(folder / name, size)
