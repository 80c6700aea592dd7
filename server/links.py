"""Links: what each client of a run packs with, and how versions come down to it.

A client's pair of codecs is agreed in its hello (`protocols/links.py`) and holds until its next
one. Models packed as anything but fp32 come down in chains: one per codec, begun when the first
client of that codec needs a version, given up when the last one has left.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from atoll.protocols import chains
from atoll.protocols.blobs import Blob
from atoll.protocols.codecs import Codec
from atoll.protocols.codecset import Codecs
from atoll.protocols.errors import RemoteError, ServerError
from atoll.protocols.links import PLAIN, Allowed, Link
from atoll.server.chain import Chain, Load, announced, whole
from atoll.server.spec import RunSpec
from atoll.server.versions import VersionStore

Held = tuple[str, int] | None  # label and version that a client holds of a chain


class Links:
    """`follow` in the thread that merges, everything else in the loop's."""

    def __init__(self, allowed: Allowed, store: VersionStore, folder: Path) -> None:
        """`folder` holds the chains' large files; what is in it is of another life."""
        self.allowed = allowed
        self.codecs = Codecs((*allowed.up, *allowed.down), store.manifest)
        self._store = store
        self._folder = folder
        self._of: dict[str, Link] = {}  # client -> as agreed
        self._chains: dict[str, Chain] = {}  # codec -> its chain
        self._plain: Load | None = None
        self._whole = sum(s.length for s in store.shelf.sections)  # bytes of a version
        shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def of(cls, spec: RunSpec, store: VersionStore, folder: Path) -> "Links":
        return cls(Allowed.of(spec.codec_up, spec.codec_down), store, folder)

    # ---- clients -----------------------------------------------------------------------------

    def agreed(self, client: str, link: Link) -> None:
        self._of[client] = link

    def left(self, client: str) -> None:
        self._of.pop(client, None)
        used = {self._down(link).name for link in self._of.values()}
        for name in [n for n in self._chains if n not in used]:
            self._chains.pop(name).close()

    def up(self, link: Link) -> Codec:
        return self.codecs[link.up]

    # ---- versions ----------------------------------------------------------------------------

    def follow(self, number: int) -> None:
        """A version was made. ServerError FL-S203."""
        for chain in list(self._chains.values()):
            chain.follow(number)

    def load(self, link: Link, number: int, newest: int, held: Held) -> Load:
        """What a client has to be sent, to train from version `number`."""
        if link.down == PLAIN:
            if self._plain is None or self._plain.sent.version != number:
                blob = whole(self._store, self._store.open(number))
                self._plain = announced(number, blob)  # once for all who start from it
            return self._plain
        found = self._chain(link, newest).load(number, held)
        if found is None:  # an order from before the chain began
            label = f"{self._down(link).name}/{number}"
            found = announced(number, whole(self._store, self._store.open(number)), label)
        return found

    def size(self, link: Link, number: int, held: Held) -> int:
        """Bytes of `load`, at most."""
        chain = None if link.down == PLAIN else self._chains.get(self._down(link).name)
        return self._whole if chain is None else chain.size(number, held)

    def view(self, link: Link, number: int, label: str) -> memoryview | None:
        """The bytes of x^ of a version of that chain, if they are kept: never write to them."""
        chain = self._chains.get(self._down(link).name)
        if chain is None or chain.label != label or not chain.knows(number):
            return None
        return chain.view(number)

    def find(self, blob: str) -> Blob:
        """Raises RemoteError FL-W107."""
        for chain in self._chains.values():
            if (found := chain.find(blob)) is not None:
                return found
        for number in reversed(self._store.numbers()):
            if blob == f"v{number}/{PLAIN}":
                return whole(self._store, self._store.open(number))
        raise RemoteError("FL-W107", f"no blob {blob!r}", "fetch the model of your newest order")

    def keep(self, needed: Collection[int]) -> None:
        """Versions that open orders start from; x^ of others than these is forgotten."""
        for chain in self._chains.values():
            chain.keep(needed)

    def close(self) -> None:
        for chain in self._chains.values():
            chain.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _chain(self, link: Link, newest: int) -> Chain:
        codec = self._down(link)
        chain = self._chains.get(codec.name)
        if chain is not None:
            try:
                chain.follow(newest)
                return chain
            except ServerError as error:
                if error.code != "FL-S107":
                    raise
                chain.close()  # it stood still for so long that a version between is gone
        folder = self._folder / codec.name.replace("/", "_")
        made = self._chains[codec.name] = Chain(
            codec, self._store, self._store.open(newest), folder
        )
        return made

    def _down(self, link: Link) -> Codec:
        return self.codecs[link.down]


def held_by(base: str) -> Held:
    """What a client says that it holds, in its hello or by what it was sent."""
    return chains.heard(base)
