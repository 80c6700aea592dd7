"""Half: the server's part of a local algorithm: what it keeps beside the model, and sends with it.

Some methods are one algorithm in two places: the client changes its steps by vectors that the
server makes from all clients' work. A local algorithm names its other half (`server_half`), and the
engine that merges carries it out, tile by tile, with the merge itself:

    vectors   kept in every version beside the model, each as long as the trainable vector
    down      those of them that clients are sent with the model, the same bytes for all
    up        vectors, as long, that each update must bring besides its delta
    says      numbers that each update must bring
    own       a vector kept for each client on the server and sent to it alone, and the one of
              `up` that is added to it (`server/table.py`)
    numbers   of a version: go to clients with each order (those without a "/" in their name)

`begin` plans one merge; `Turn.tile` is then asked for any tile, from any thread. What a half knows
lies in the version alone, so a version made again after a crash has the same bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from atoll.protocols.tensors import SAID

Numbers = Mapping[str, float]
State = dict[str, Tensor]  # vector -> its tile
COMMITS = "commits"  # of a client: how many changes its state has taken in


@dataclass(frozen=True, slots=True)
class Work:
    """One update of a merge, as a half sees it."""

    id: str
    client: str
    weight: float  # the strategy's, raw
    said: Numbers


class Turn:
    """One merge of a half."""

    def __init__(self, numbers: Numbers, scales: Sequence[float] | None = None) -> None:
        self.numbers = dict(numbers)  # of the new version
        self.scales = scales  # what each delta is multiplied with before all else; None: as it is
        self.sums: dict[str, Sequence[float]] = {}  # section -> what of each update's is added up
        self.rows: Sequence[bool] = ()  # whose own vector takes in what the update brought
        self.stats: dict[str, float] = {}  # for `Merged`

    def tile(self, anchor: Tensor, delta: Tensor, sums: Mapping[str, Tensor], state: State) -> None:
        """Elements [lo, hi) of every vector: change `state`, and `delta`, in place.

        `delta` is what the outer optimizer will step along. `state` holds the former version's
        vectors, `sums` the weighted sums that were asked for; `anchor` is read only.
        """


@dataclass(frozen=True)
class Half(ABC):
    """Base of all halves. Its fields are the method's parameters."""

    @property
    def vectors(self) -> tuple[str, ...]:
        """They start as zeros."""
        return ()

    @property
    def down(self) -> tuple[str, ...]:
        return ()

    @property
    def up(self) -> tuple[str, ...]:
        return ()

    @property
    def own(self) -> tuple[str, str] | None:
        """It starts as zeros, which are not sent."""
        return None

    @property
    def says(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def begin(self, works: Sequence[Work], former: Numbers, known: int) -> Turn:
        """The plan of one merge of at least one update.

        `former`: the last version's numbers; `known`: clients that have ever been in the run.
        """

    def after(self, delta_norm: float, numbers: Numbers) -> Numbers:
        """The version's numbers once the norm of its delta is known. ServerError FL-S210: the run
        diverges and is ended."""
        return numbers


def told(numbers: Numbers) -> dict[str, float]:
    """What of a version's numbers goes to clients."""
    return {name: value for name, value in numbers.items() if "/" not in name}


def generation(numbers: Numbers, client: str) -> int:
    """How many changes there are in the client's state; 0: it is all zeros."""
    return int(numbers.get(f"{COMMITS}/{client}", 0))


def told_to(numbers: Numbers, client: str) -> dict[str, float]:
    """What goes to one client beside a vector of its own."""
    return {COMMITS: float(generation(numbers, client))}


@dataclass
class Extras:
    """Sizes of what travels beside a model or a delta, in elements: section name -> count."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)  # down, to each client its own


def extras_of(half: Half | None, count: int) -> Extras:
    """For a model of `count` trainable elements."""
    if half is None:
        return Extras()
    said = {SAID: len(half.says)} if half.says else {}
    own = {half.own[0]: count} if half.own is not None else {}
    return Extras(dict.fromkeys(half.down, count), {**dict.fromkeys(half.up, count), **said}, own)
