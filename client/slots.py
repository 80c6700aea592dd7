"""Slots: small results in mapped files that are written over and over. No call of the system.

A slot is a file of fixed size. Its head says whose turn it holds, and is written last: a process
killed in the middle leaves a free slot. After a power cut some pages may be older than others; the
CRC finds that out. To put a result and to free it costs one copy, a fifth of what a new file takes
that is renamed into place and removed later.
"""

import struct
from pathlib import Path

from atoll.client.room import map_new
from atoll.protocols.blobs import INLINE
from atoll.protocols.frames import checksums
from atoll.protocols.packed import Parts, size

SUFFIX = ".slot"
ROOM = INLINE + (64 << 10)  # bytes of a packed result: its payload and what describes it
TURN = struct.Struct("<Q")  # 0: free; else results are in the order of their turns
HEAD = struct.Struct("<II")  # length, CRC-32
START = TURN.size + HEAD.size


class Slots:
    """The slots of one folder. `put` and `free` each from one thread at a time."""

    def __init__(self, folder: Path) -> None:
        """Take up what is there; `found` are the results in it, oldest first, with their slots."""
        self.folder = folder
        self.found: list[tuple[int, bytes]] = []
        self._maps: list[memoryview] = []
        self._free: list[int] = []
        self._turn = 0
        turns: dict[int, int] = {}
        there = [int(path.stem) for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal()]
        for number in range(max(there, default=-1) + 1):
            self._grow()
            (turn,) = TURN.unpack_from(self._maps[number])
            data = self._read(number)
            if turn and data is not None:
                turns[number] = turn
                self.found.append((number, data))
                self._turn = max(self._turn, turn)
            else:
                self.free(number)
        self.found.sort(key=lambda one: turns[one[0]])

    def put(self, parts: Parts) -> int:
        """Keep what these are together, at most ROOM bytes, until its slot is freed. ClientError
        FL-S203."""
        length = size(parts)
        assert length <= ROOM, f"{length} bytes for a slot of {ROOM}"
        if not self._free:
            self._free.append(self._grow())
        number = self._free.pop()
        held, at = self._maps[number], START
        for part in parts:
            held[at : at + len(part)] = part
            at += len(part)
        HEAD.pack_into(held, TURN.size, length, *checksums(held[START:at]))
        self._turn += 1
        TURN.pack_into(held, 0, self._turn)
        return number

    def free(self, number: int) -> None:
        TURN.pack_into(self._maps[number], 0, 0)
        self._free.append(number)

    def _grow(self) -> int:
        number = len(self._maps)
        self._maps.append(map_new(self.folder / f"{number}{SUFFIX}", START + ROOM))
        return number

    def _read(self, number: int) -> bytes | None:
        held = self._maps[number]
        length, crc = HEAD.unpack_from(held, TURN.size)
        data = bytes(held[START : START + min(length, ROOM)])
        whole = len(data) == length and checksums(memoryview(data)) == [crc]
        return data if whole else None
