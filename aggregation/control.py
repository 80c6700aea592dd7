"""Control: the server's half of SCAFFOLD, SCAFFOLD-M and SCAFFOLD-M-VR, and its ledger.

Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378; with momentum: Cheng, Huang, Wu, Yuan
2024, https://arxiv.org/abs/2306.16504. Beside the direction g (`direction.py`) the server keeps

    c = mean of the control variates c_i over all clients that have ever been in the run

by adding up what they say has changed: c := c + sum dc_i / N. The c_i are the clients' own
(`client/keep.py`), so both sides must count the same updates. Each update says on which state its
dc_i rests: the keep's `life`, and how many changes (`commits`) are in it. The server's ledger, kept
in each version, takes a dc_i only if it knows of exactly these; the client commits by the same rule
when it hears that its update was used. So orders may overlap: the delta of the later one counts,
its dc_i does not, on either side.

A client that lost its disk has another life. What it had stands in c and nobody knows it, so all
begin anew: c = 0, and the `epoch` that orders carry grows, at which clients forget their c_i.

With `table` the c_i are the server's: kept in its table (`server/table.py`), sent to their clients
alone, and changed by the same rule. Then a client keeps nothing, and can lose nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from atoll.aggregation.direction import Direction, DirectionTurn
from atoll.aggregation.half import COMMITS, Half, Numbers, State, Turn, Work

CONTROL = "control"  # c
CHANGE = "dc"  # of c_i
VARIATE = "variate"  # c_i, where the server keeps it
STANDING = ("life", "epoch", COMMITS)  # what an update says of the state that it rests on


class Ledger:
    """Who has which state, read from a version's numbers and written into the next's."""

    def __init__(self, former: Numbers, known: int) -> None:
        self.numbers = dict(former)
        self.epoch = int(former.get("epoch", 0))
        self.before = int(former.get("clients", 0))  # N of the former version
        self.clients = max(known, self.before, 1)
        self.reset = False

    def take(self, works: Sequence[Work], *, overlapping: bool = False) -> list[bool]:
        """Whose change counts, in their order. `overlapping`: changes rest on no state, each does.

        One of another life resets everything, and then none counts.
        """
        epoch = float(self.epoch)
        for work in works:
            life = self.numbers.get(f"life/{work.client}")
            if work.said["epoch"] == epoch and life is not None and life != work.said["life"]:
                self._begin_anew()
                return [False] * len(works)
        return [self._counts(work, epoch, overlapping) for work in works]

    def take_own(self, works: Sequence[Work]) -> list[bool]:
        """The same where the states are the server's own, and nobody can have lost one."""
        return [self._commits(work) for work in works]

    def closed(self) -> Numbers:
        return {**self.numbers, "epoch": self.epoch, "clients": self.clients}

    def _counts(self, work: Work, epoch: float, overlapping: bool) -> bool:
        counts = work.said["epoch"] == epoch and self._commits(work, overlapping)
        if counts:
            self.numbers[f"life/{work.client}"] = work.said["life"]
        return counts

    def _commits(self, work: Work, overlapping: bool = False) -> bool:
        """Take it in, if it rests on the state that the client is known to have."""
        commits = self.numbers.get(f"{COMMITS}/{work.client}", 0.0)
        counts = overlapping or work.said[COMMITS] == commits
        if counts:
            self.numbers[f"{COMMITS}/{work.client}"] = commits + 1
        return counts

    def _begin_anew(self) -> None:
        self.reset = True
        self.epoch += 1
        self.numbers = {
            name: value
            for name, value in self.numbers.items()
            if not name.startswith(("life/", f"{COMMITS}/"))
        }


class ControlTurn(DirectionTurn):
    """One merge: c takes in the changes that the ledger counts."""

    def __init__(self, works: Sequence[Work], former: Numbers, known: int, half: "Control") -> None:
        ledger = Ledger(former, known)
        counted = ledger.take_own(works) if half.table else ledger.take(works)
        super().__init__(works, ledger.closed(), half.former)
        self.half = half
        self.sums = {f"extra:{CHANGE}": [yes / ledger.clients for yes in counted]}
        self.rows = counted if half.table else ()
        self.shrink = 0.0 if ledger.reset else ledger.before / ledger.clients
        if ledger.reset:
            self.stats["state_lost"] = 1.0
        if not all(counted):
            self.stats["variates_skipped"] = float(len(counted) - sum(counted))

    def tile(self, anchor: Tensor, delta: Tensor, sums: Mapping[str, Tensor], state: State) -> None:
        state[CONTROL].mul_(self.shrink).add_(sums[f"extra:{CHANGE}"])
        if self.half.momentum:
            super().tile(anchor, delta, sums, state)


@dataclass(frozen=True)
class Control(Half):
    """`momentum`: the direction g is kept and sent too. `former`: for the -VR form. `table`: the
    c_i are kept here, not by the clients."""

    momentum: bool = False
    former: bool = False
    table: bool = False

    @property
    def vectors(self) -> tuple[str, ...]:
        return (*(Direction(self.former).vectors if self.momentum else ()), CONTROL)

    @property
    def down(self) -> tuple[str, ...]:
        return self.vectors

    @property
    def up(self) -> tuple[str, ...]:
        return (CHANGE,)

    @property
    def own(self) -> tuple[str, str] | None:
        return (VARIATE, CHANGE) if self.table else None

    @property
    def says(self) -> tuple[str, ...]:
        return ("steps", "lr", *((COMMITS,) if self.table else STANDING))

    def begin(self, works: Sequence[Work], former: Numbers, known: int) -> Turn:
        return ControlTurn(works, former, known, self)

    def after(self, delta_norm: float, numbers: Numbers) -> Numbers:
        return Direction(self.former).after(delta_norm, numbers)
