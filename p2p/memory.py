"""Memory: what a peer keeps on its disk, so that after kill -9 it comes back as itself.

    state.json               what binds it (`rendezvous_events.Bound`), and of which run and peer
    model-CHAIN.safetensors  the model of one commit with its outer state
    mean-DIGEST.bin          a mean that it holds: voted for, or applied to the model before; and
                             the last before that, for those who missed them
    seals.json               the keys of members' seals, also of those gone

Each is written beside its name, made durable and then renamed. A model need not be there when the
state names it: the one before and the mean between them make it again, bit for bit.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atoll.aggregation.allreduce import Part
from atoll.aggregation.rendezvous_events import Bound
from atoll.aggregation.sync_engine import SyncState
from atoll.p2p.contribution import unpack
from atoll.p2p.folder import SEALS, in_use
from atoll.p2p.reducing import Mean, Packed
from atoll.protocols import state
from atoll.protocols.codecs import Codec
from atoll.protocols.durable import place
from atoll.protocols.errors import PeerError, RemoteError

HEAD = 16 << 20  # bytes of a mean's list of parts
DIGEST = re.compile("[0-9a-f]{64}")
MALFORMED = (OSError, ValueError, TypeError)  # of a file that was not written so

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kept:
    """state.json."""

    run: str
    peer: str
    bound: Bound


class Memory:
    """One directory of one peer. Its methods block; PeerError FL-P405 where the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[bytes] | None = None

    def open(self) -> None:
        """PeerError FL-P406 where another process has it."""
        with on_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            self._lock = open(self.folder / "lock", "ab")  # noqa: SIM115  # until `close`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise in_use(self.folder) from error
        for torn in self.folder.glob("*.tmp"):
            torn.unlink(missing_ok=True)
        with on_disk(self.folder):  # whom `fl-peer leave` tells
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()).encode())
            self._lock.flush()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- what binds ----------------------------------------------------------------------------

    def bind(self, run: str, peer: str, bound: Bound) -> None:
        text = state.dumps(Kept(run, peer, bound)).encode()
        self._write("state.json", lambda file: file.write(text))

    def recall(self, run: str) -> Kept | None:
        """None where nothing is kept. PeerError FL-P407 where it is another run's."""
        path = self.folder / "state.json"
        with on_disk(path):
            if not path.exists():
                return None
            data = path.read_bytes()
        try:
            kept = state.loads(Kept, data.decode())
        except ValueError as error:
            raise PeerError(
                "FL-P405", f"{path} cannot be read: {error}", "remove it: the peer joins anew"
            ) from error
        if kept.run != run:
            raise PeerError(
                "FL-P407",
                f"{self.folder} belongs to the run {kept.run[:12]}, not to {run[:12]}",
                "give each run a directory of its own",
            )
        return kept

    def keep_keys(self, keys: Mapping[str, str]) -> None:
        """Of members' seals, hex by peer, the one heard of longest ago first."""
        text = json.dumps(dict(keys)).encode()
        self._write(SEALS, lambda file: file.write(text))

    def keys(self) -> dict[str, str]:
        """{} where none can be read: those of the living are heard again."""
        try:
            told = json.loads((self.folder / SEALS).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        whole = isinstance(told, dict) and all(isinstance(key, str) for key in told.values())
        return told if whole else {}

    def retire(self) -> None:
        """After a goodbye: this peer never comes back under its name, which is the first to go."""
        with on_disk(self.folder):
            for pattern in ("identity.key", "state.json", "model-*", "mean-*"):
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)

    def forgot(self) -> bool:
        """Whether this peer has lived and its promises are gone: somebody has removed them."""
        there = [(self.folder / n).exists() for n in ("identity.key", "status.json", "state.json")]
        return there == [True, True, False]

    def old(self, bound: Bound, spare: Set[str]) -> list[Path]:
        """What nothing of `bound` names, nor `spare` (chains, digests). Its model must lie here."""
        named = {bound.stand.chain, *spare}
        named |= {bound.last.value.digest} if bound.last is not None else set()
        named |= {bound.accepted[1].digest} if bound.accepted is not None else set()
        found = [*self.folder.glob("model-*.safetensors"), *self.folder.glob("mean-*.bin")]
        return [path for path in found if path.stem.partition("-")[2] not in named]

    def remove(self, paths: Sequence[Path]) -> None:
        with on_disk(self.folder):
            for path in paths:
                path.unlink(missing_ok=True)

    # ---- models --------------------------------------------------------------------------------

    def keep_model(self, chain: str, model: SyncState) -> None:
        tensors = {"anchor": model.anchor, **{f"outer/{n}": t for n, t in model.outer.items()}}
        about = {"round": str(model.round), "digest": model.digest}
        path = self.folder / f"model-{chain}.safetensors"
        with on_disk(path):
            save_file(tensors, f"{path}.tmp", metadata=about)
            place(path)

    def model(self, chain: str) -> SyncState | None:
        """None where it is not here, or not what was written."""
        path = self.folder / f"model-{chain}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            anchor = tensors.pop("anchor")
            outer = {name.removeprefix("outer/"): tensor for name, tensor in tensors.items()}
            found = SyncState(anchor, outer, int(about["round"]))
            whole = found.digest == about["digest"]
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if not whole:
            logger.warning("%s is not what was written", path)
        return found if whole else None

    # ---- means ---------------------------------------------------------------------------------

    def keep_mean(self, mean: Mean) -> None:
        rows = [[p.reducer, p.start, p.stop] for p in mean.parts]
        sizes = [len(payload) for payload in mean.payloads]
        head = state.encode([rows, list(mean.digests), sizes]).encode()

        def write(file: IO[bytes]) -> None:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            for payload in mean.payloads:
                file.write(payload)

        self._write(f"mean-{mean.digest}.bin", write)

    def mean(self, digest: str, codec: Codec) -> Mean | None:
        """None where it is not here, or not what was written."""
        try:
            data = memoryview(bytearray((self.folder / f"mean-{digest}.bin").read_bytes()))
            found = _packed(digest, data)
            values = torch.empty(found.parts[-1].stop)
            for part, of_part, payload in zip(
                found.parts, found.digests, found.payloads, strict=True
            ):
                if hashlib.sha256(payload).hexdigest() != of_part:
                    return None
                unpack(codec, payload, values[part.start : part.stop])
        except (*MALFORMED, IndexError, RemoteError):
            return None
        return Mean(digest, found.parts, found.digests, found.payloads, values)

    def packed_mean(self, digest: str) -> Packed | None:
        """As it lies on the disk, mapped; whoever gets it compares its digests. None: not here."""
        if not DIGEST.fullmatch(digest):
            return None
        try:
            with open(self.folder / f"mean-{digest}.bin", "rb") as file:
                return _packed(
                    digest, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                )
        except MALFORMED:
            return None

    # ---- small change --------------------------------------------------------------------------

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self.folder / name
        with on_disk(path):
            with open(f"{path}.tmp", "wb") as file:
                write(file)
            place(path)


def _packed(digest: str, data: memoryview) -> Packed:
    """What `Memory.keep_mean` wrote, its payloads in `data`."""
    start = 8 + int.from_bytes(data[:8], "little")
    rows, digests, sizes = json.loads(bytes(data[8 : min(start, HEAD)]))
    ends = itertools.accumulate(sizes, initial=start)
    payloads = tuple(data[at : at + size] for at, size in zip(ends, sizes, strict=False))
    return Packed(digest, tuple(Part(*row) for row in rows), tuple(digests), payloads)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise PeerError(
            "FL-P405",
            f"{path} cannot be kept: {why}",
            "is there room, and is the directory this user's?",
        ) from error
