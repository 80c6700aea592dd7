"""Holding: the model that a client is sent, and keeps where the next one comes as differences."""

from collections.abc import Callable
from pathlib import Path

from atoll.client.room import map_new
from atoll.protocols import chains, tensors
from atoll.protocols.blobs import INLINE, BlobInfo
from atoll.protocols.codecs import Codec
from atoll.protocols.errors import ClientError
from atoll.protocols.manifest import Manifest
from atoll.protocols.messages import Sent
from atoll.protocols.tensors import Payload

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
        return Payload(chains.whole(self.manifest), view, chains.FP32)

    def _whole(self, sent: Sent, fetch: Fetch) -> memoryview:
        info, self.held = sent.model, None
        assert info is not None, "all of a model is sent as one blob"
        tensors.check(self.manifest, info.sections, info.size, chains.FP32, "model")
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
            tensors.check(self.manifest, info.sections, info.size, down, "model")
            view = memoryview(inline)
            if not inline:
                view = self._room("difference.bin", info.size)
                fetch(info, view)
            difference = tensors.parse(self.manifest, info.sections, view, down, "model")
            self.held, self._sha256 = None, b""
            chains.step(self.manifest, model, difference)
            self.held = label, number
        return model

    def _room(self, name: str, size: int) -> memoryview:
        if self.folder is None or size <= INLINE:
            return memoryview(bytearray(size))
        return map_new(self.folder / name, size)
