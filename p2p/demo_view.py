"""The live table of a swarm: its round and loss, and a line for each peer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.protocols import console
from atoll.protocols.redrawn import Redrawn

if TYPE_CHECKING:
    from rich.console import Group

_STYLES: Mapping[str, str] = {
    "training": "green", "averaging": "cyan", "downloading": "yellow", "killed": "bold red",
    "to come": "dim", "starting": "dim", "done": "green", "ended": "green",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeerView:
    name: str
    state: str
    round: int  # of its model
    loss: float | None  # mean over its last local steps
    joined: int  # rounds whose mean its work is in
    up: int  # bytes of bulk
    down: int


@dataclass(frozen=True, slots=True)
class SwarmView:
    title: str
    elapsed: float  # seconds
    round: int  # the newest that a peer has
    rounds: int
    loss: float | None  # mean over those who live
    peers: tuple[PeerView, ...]
    forks: int


class Show(Redrawn):
    """Shows a swarm: a terminal redraws the newest view, anything else gets a line for each round
    and each event."""

    _round = 0  # shown last

    def show(self, view: SwarmView) -> None:
        self.draw(lambda _: render(view))
        if not self.redraws and view.round > self._round:
            self._round = view.round
            self.event(view.elapsed, line(view))

    def event(self, elapsed: float, what: str) -> None:
        self.say(f"{elapsed:6.1f}s  {what}")


def line(view: SwarmView) -> str:
    """`view` in one line."""
    here = sum(p.state not in ("to come", "starting", "killed") for p in view.peers)
    loss = "-" if view.loss is None else f"{view.loss:.4f}"
    up = console.size(sum(p.up for p in view.peers))
    peers = f"{here} peer{'' if here == 1 else 's'}"
    return f"round {view.round}/{view.rounds}   {peers}   loss {loss}   sent {up}"


def render(view: SwarmView) -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("peer")
    for name in ("round", "joined", "loss", "up", "down"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for peer in view.peers:
        table.add_row(
            peer.name, str(peer.round), str(peer.joined),
            "-" if peer.loss is None else f"{peer.loss:.4f}",
            console.size(peer.up), console.size(peer.down),
            Text(peer.state, _STYLES.get(peer.state, "default")),
        )  # fmt: skip
    head = Text(f"{view.title}   {console.duration(view.elapsed)}", "bold")
    forks = Text(f"   forks {view.forks}", "bold red" if view.forks else "dim")
    return Group(head, Text(line(view)).append(forks), table)
