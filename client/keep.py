"""Keep: a client's private state, committed in two phases. It changes when its work was used.

Control variates, FedDyn's gradients and error-feedback residuals belong to one client, live longer
than an order, and must stay in step with what the server really did with the client's work. So
what an order makes of them is first *pending*: written beside the outbox, before the result is.
When the server has told the result's `Outcome`, the kind's `Rule` says what becomes of it.

    keep = Keep(folder)                       # None: in memory, and a killed client starts anew
    keep.register("scaffold", Variates())     # a kind of state, and its rule
    keep.enter(run)                           # state of another run is dropped

    c = keep.now("scaffold")                  # as the next order starts from it; {} where none is
    keep.hold("o17.0", {"scaffold": {"dc": dc}})      # first the state ...
    outbox.put(result, view)                          # ... then the result
    keep.settle("o17.0", "used", sent)        # first the state, then the outbox drops the result

A rule adds tensors, it does not replace them: orders overlap, and outcomes come in any order. Two
rules, whole (`sent(group)` decodes what the update held on the wire; the outbox still has it):

    class Variates(Rule):                     # SCAFFOLD: c_i := c_i + dc, once it was used
        def used(self, held, pending, sent):
            return {"c": added(held.get("c"), pending["dc"])}

    class Residual(Rule):                     # error feedback: counts at once, given back if unused
        def seen(self, held, pending):        # what the next order starts from, outcome unknown
            return {"e": added(held.get("e"), pending["change"])}

        def used(self, held, pending, sent):
            return self.seen(held, pending)

        def discarded(self, held, pending, sent):     # the whole decoded contribution goes back
            return {"e": added(self.seen(held, pending)["e"], sent("trainable"))}

A process may be killed anywhere. Killed between `hold` and `put`, the order is trained again and
what it left is dropped (`retain`). Killed within `settle`, the outcome is told again, and a state
that already has it in it is left as it is. What a power cut tore is found by its CRC and counts as
lost. `report` says what there is of each kind: the hello carries it, so that a server knows that a
client lost its disk. `life` is another number after every loss.
"""

import json
import os
import secrets
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from atoll.client.room import disk
from atoll.protocols.frames import checksums

Named = Mapping[str, Tensor]
Sent = Callable[[str], Tensor]  # group -> what the update held of it, decoded, flat; read only

HELD, PENDING = "held", ".pending"
LIFE_BITS = 24  # exact as a float32, in which it may travel
CRC = 4  # bytes before a file's tensors


class Rule(ABC):
    """What becomes of one kind of state. Pure: writes to no argument; a result may alias them."""

    def seen(self, held: Named, pending: Named) -> Named:
        """The state as the next order sees it while the outcome of `pending` is unknown."""
        return held

    @abstractmethod
    def used(self, held: Named, pending: Named, sent: Sent) -> Named:
        """The state after the update that `pending` belongs to became part of a version."""

    def discarded(self, held: Named, pending: Named, sent: Sent) -> Named:
        """The state after that update was discarded or superseded."""
        return held


@dataclass
class _Held:
    """What is committed, written whole: so tensors and bookkeeping never differ."""

    run: str = ""
    life: int = 0
    settled: int = 0  # outcomes in it, of any kind
    last: str = ""  # the newest of these: its pending file may still be there
    kinds: dict[str, Named] = field(default_factory=dict)


class Keep:
    """All private state of one client. Methods may be called from several threads."""

    def __init__(self, folder: Path | None, life: int | None = None) -> None:
        """`folder` must be the client's alone (its outbox holds a lock). `life`: for simulations,
        in which nothing may be drawn. ClientError FL-S203 where the disk does not take it."""
        self.folder = folder
        self.lost = ""  # why state that was here could not be read; empty: nothing was lost
        self._first_life = life
        self._rules: dict[str, Rule] = {}
        self._held = _Held(life=self._new_life())
        self._pending: dict[str, dict[str, Named]] = {}  # update -> kind -> tensors, oldest first
        self._settling: set[str] = set()
        self._written = False  # `_held` is on the disk
        self._changed = threading.Condition()
        if folder is not None:
            with disk(folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._read(folder)

    @property
    def life(self) -> int:
        """Another number after every loss of state, from 1 to 2**24 - 1."""
        return self._held.life

    def register(self, kind: str, rule: Rule) -> None:
        """Every kind once in a process's life, before state of it is asked for or held."""
        self._rules[kind] = rule

    def enter(self, run: str) -> None:
        """Belong to `run`; state of another one is dropped."""
        with self._changed:
            if self._held.run != run:
                self._drop_all(run)

    def retain(self, updates: Collection[str]) -> None:
        """At start: drop what was held for results that never came into being."""
        with self._changed:
            for update in [u for u in self._pending if u not in updates]:
                self._forget(update)

    def now(self, kind: str) -> Named:
        """The state of `kind` as an order that begins now sees it. Waits for announced outcomes."""
        with self._changed:
            self._changed.wait_for(lambda: not self._settling)
            state = self._held.kinds.get(kind, {})
            for parts in self._pending.values():
                if kind in parts:
                    state = self._rules[kind].seen(state, parts[kind])
            return state

    def hold(self, update: str, parts: Mapping[str, Named]) -> None:
        """What `update` will make of each kind, if it is used; call before its result is put.

        The tensors are copied. Called again, as for an order trained again, it replaces.
        """
        copies: dict[str, Named] = {kind: _copied(named) for kind, named in parts.items() if named}
        if not copies and update not in self._pending:
            return
        with self._changed:
            self._forget(update)
            if copies:
                if not self._written:
                    self._write_held(self._held)  # a pending state is of this run and life
                self._write(update + PENDING, copies, {})
                self._pending[update] = copies

    def announce(self, update: str) -> bool:
        """The outcome of `update` is known: `settle` will be called, perhaps from another thread,
        and `now` waits for it from here on. False: nothing is held for it, and nothing to do."""
        if update not in self._pending:
            return False  # it was put there, if at all, before its result was
        with self._changed:
            if update in self._pending:
                self._settling.add(update)
            return update in self._pending

    def close(self) -> None:
        """Nothing more will be settled in this life: nobody waits any longer."""
        with self._changed:
            self._settling.clear()
            self._changed.notify_all()

    def settle(self, update: str, fate: str, sent: Sent) -> None:
        """Let each rule make the new state, and write it. Nothing happens the second time.

        Call it before the outbox drops the result and before the outcome is acknowledged.
        """
        with self._changed:
            try:
                parts = self._pending.get(update)
                if parts is None:
                    return
                kinds = dict(self._held.kinds)
                for kind, pending in parts.items():
                    rule = self._rules.get(kind)
                    if rule is not None:
                        decide = rule.used if fate == "used" else rule.discarded
                        kinds[kind] = _copied(decide(kinds.get(kind, {}), pending, sent))
                held = self._held
                new = _Held(held.run, held.life, held.settled + 1, update, kinds)
                self._write_held(new)
                self._held = new
                self._forget(update)
            finally:
                self._settling.discard(update)
                self._changed.notify_all()

    def report(self) -> dict[str, int]:
        """For each registered kind, how many outcomes are in its state or awaited: 0 says that
        there is none, and a server that has had work of this client knows that it was lost."""
        with self._changed:
            return dict.fromkeys(sorted(self._rules), self._held.settled + len(self._pending))

    # ---- files ---------------------------------------------------------------------------------

    def _write_held(self, held: _Held) -> None:
        facts: dict[str, str | int] = {
            "run": held.run, "life": held.life, "settled": held.settled, "last": held.last,
        }  # fmt: skip
        self._write(HELD, held.kinds, facts)
        self._written = True

    def _write(self, name: str, kinds: Mapping[str, Named], facts: Mapping[str, str | int]) -> None:
        """Beside, then renamed: a reader finds all of it or the former one."""
        if self.folder is None:
            return
        named = {f"{kind}/{n}": t for kind, parts in kinds.items() for n, t in parts.items()}
        data = save(named, {"facts": json.dumps(facts)})
        beside = self.folder / (name + ".tmp")
        with disk(self.folder), open(beside, "wb") as file:
            file.write(_crc(data))
            file.write(data)
        with disk(self.folder):
            os.replace(beside, self.folder / name)

    def _forget(self, update: str) -> None:
        if self._pending.pop(update, None) is not None and self.folder is not None:
            (self.folder / (update + PENDING)).unlink(missing_ok=True)

    def _drop_all(self, run: str) -> None:
        self._pending.clear()
        self._held = _Held(run=run, life=self._new_life())
        self._written = False
        if self.folder is not None:
            for path in (self.folder / HELD, *self.folder.glob(f"*{PENDING}")):
                path.unlink(missing_ok=True)

    def _read(self, folder: Path) -> None:
        """Take up what is there. What is damaged takes the rest with it: a state without one of
        its changes would differ from what the server believes, and nobody would know."""
        for left in folder.glob("*.tmp"):
            left.unlink()
        try:
            self._take_up(folder)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            self.lost = f"the state in {folder} is damaged: {error}"
            self._drop_all("")

    def _take_up(self, folder: Path) -> None:
        if not (folder / HELD).exists():
            return self._drop_all("")
        kinds, facts = _load(folder / HELD)
        self._held = _Held(
            str(facts["run"]), int(facts["life"]), int(facts["settled"]), str(facts["last"]), kinds
        )
        self._written = True
        for path in sorted(folder.glob(f"*{PENDING}"), key=lambda p: p.stat().st_mtime_ns):
            update = path.name.removesuffix(PENDING)
            if update == self._held.last:  # killed after it was taken into the state
                path.unlink()
            else:
                self._pending[update], _ = _load(path)
        return None

    def _new_life(self) -> int:
        if self._first_life is not None:
            return self._first_life
        return 1 + secrets.randbelow((1 << LIFE_BITS) - 1)


def life_of(seed: int, client: str) -> int:
    """A simulated client's."""
    return 1 + zlib.crc32(f"{seed}/{client}".encode()) % ((1 << LIFE_BITS) - 1)


def added(held: Tensor | None, change: Tensor) -> Tensor:
    """held + change; nothing held is zero."""
    return change if held is None else held + change


def nothing_sent(group: str) -> Tensor:
    """A `Sent` for updates whose bytes are gone, and for rules that never look."""
    raise KeyError(group)


def _copied(named: Named) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone().contiguous() for name, t in named.items()}


def _crc(data: bytes) -> bytes:
    folded = 0
    for part in checksums(memoryview(data)):
        folded = (folded * 31 + part) & 0xFFFFFFFF
    return folded.to_bytes(CRC, "little")


def _load(path: Path) -> tuple[dict[str, Named], dict[str, str | int]]:
    """Kinds and facts of a file that `_write` made; ValueError where it is not whole."""
    data = path.read_bytes()
    if _crc(data[CRC:]) != data[:CRC]:
        raise ValueError(f"{path.name} is not what was written")
    body = data[CRC:]
    length = int.from_bytes(body[:8], "little")
    facts = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["facts"])
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(body).items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = tensor
    return dict(kinds), facts
