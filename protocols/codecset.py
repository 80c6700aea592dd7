"""Codecs of a run: made once from its specs, and found again by what a payload says of itself."""

from collections.abc import Iterable

from atoll.protocols.blobs import Section
from atoll.protocols.codecs import Codec
from atoll.protocols.errors import RemoteError
from atoll.protocols.links import PLAIN
from atoll.protocols.manifest import Manifest
from atoll.protocols.tensors import codec_for


class Codecs:
    """The codecs that a run may see, made once; found by spec, or by what a payload says of itself.

    UsageError FL-S101, FL-S102 or FL-S103 for a spec that names none.
    """

    def __init__(self, specs: Iterable[str], manifest: Manifest) -> None:
        self._by_spec: dict[str, Codec] = {}
        self._by_name: dict[str, Codec] = {}
        for spec in (PLAIN, *specs):
            made = codec_for(manifest, spec)
            self._by_spec[spec] = self._by_name.setdefault(made.name, made)

    def __getitem__(self, spec: str) -> Codec:
        return self._by_spec[spec]

    def of(self, sections: Iterable[Section]) -> Codec:
        """What packed the deltas of these sections. RemoteError FL-W104: none of this run's."""
        name = next((s.codec for s in sections if s.group == "trainable"), PLAIN)
        if name not in self._by_name:
            raise RemoteError(
                "FL-W104", f"packed as {name!r}", f"the run allows {', '.join(self._by_name)}"
            )
        return self._by_name[name]
