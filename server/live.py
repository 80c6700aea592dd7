"""The live table of a run: version, loss, accuracy, the arrival group, a bar for every client.

`render` is a pure function of a `LiveView`, plain data; `Live` shows views one after the other on
stderr, or, where stderr is not a terminal, says one line per row of the history.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from atoll.protocols import console
from atoll.protocols.redrawn import Redrawn
from atoll.server.history import History
from atoll.server.totals import Row

if TYPE_CHECKING:
    from rich.console import Group as Stack
    from rich.text import Text

State = Literal["starting", "waiting", "training", "sending", "gone", "restarting", "done"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_STATE = 18  # columns kept free for a client's state
_MARKS: Mapping[str, tuple[str, str]] = {  # state -> (mark, style)
    "starting": ("○", "dim"),
    "waiting": ("○", "dim"),
    "training": ("▶", "green"),
    "sending": ("↑", "cyan"),
    "gone": ("✗", "red"),
    "restarting": ("↻", "yellow"),
    "done": ("✓", "green"),
}


@dataclass(frozen=True, slots=True)
class ClientView:
    name: str
    state: State = "starting"
    reason: str = ""  # said beside the state
    speed: float | None = None  # relative throughput it was started with
    done: int = 0  # local steps of its order
    ordered: int = 0
    version: int | None = None  # base of its order
    updates: int = 0
    steps: int = 0  # of all its updates
    staleness: float = 0.0  # mean, versions
    bytes_up: int = 0
    bytes_down: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class GroupView:
    name: str
    members: int
    arrived: int
    arrival: float  # run clock, expected
    latest: float  # run clock, merged then at the latest


@dataclass(frozen=True, slots=True)
class LiveView:
    """One moment of a run. Times are on the run's clock, in seconds; None: not known."""

    title: str = ""  # e.g. "digits  fedcompass  iid"
    now: float = 0.0
    version: int = 0
    loss: float | None = None
    accuracy: float | None = None
    accuracies: tuple[float, ...] = ()
    target: float | None = None
    left: float | None = None  # seconds to the target, estimated
    epsilon: float | None = None  # what noise has cost; None: no noise
    group: GroupView | None = None
    clients: tuple[ClientView, ...] = ()
    finished: str | None = None


def view(
    history: History,
    title: str = "",
    target: float | None = None,
    now: float | None = None,
    progress: Mapping[str, int] | None = None,
    speeds: Mapping[str, float] | None = None,
    states: Mapping[str, tuple[State, str]] | None = None,
) -> LiveView:
    """What a history shows at `now` (default: its last row).

    `progress` are the steps done of each client's open order, `speeds` the relative throughputs
    the clients were started with, `states` what the caller knows better than the history, e.g.
    that a process died: {"c2": ("restarting", "killed by signal 9")}.
    """
    moment = history.now if now is None else now
    names = sorted({*history.clients, *(speeds or {}), *(states or {})})
    clients = tuple(
        _client(history, name, (progress or {}).get(name, 0), (speeds or {}).get(name))
        for name in names
    )
    if states:
        clients = tuple(
            replace(c, state=states[c.name][0], reason=states[c.name][1]) if c.name in states else c
            for c in clients
        )
    return LiveView(
        title=title,
        now=moment,
        version=history.version,
        loss=history.latest("loss"),
        accuracy=history.latest("accuracy"),
        accuracies=tuple(p.value for p in history.series("accuracy")),
        target=target,
        left=None if target is None else history.seconds_left("accuracy", target),
        epsilon=history.epsilon,
        group=_group(history, moment),
        clients=clients,
        finished=history.finished,
    )


def _client(history: History, name: str, done: int, speed: float | None) -> ClientView:
    totals = history.clients.get(name)
    if totals is None:
        return ClientView(name, speed=speed)
    span = history.open.get(name)
    state: State = "training" if span else "waiting"
    if not totals.here:
        state = "gone"
    elif history.finished is not None:
        state = "done"
    elif span and done >= span.steps:
        state = "sending"
    return ClientView(
        name,
        state,
        speed=speed,
        done=min(done, span.steps) if span else 0,
        ordered=span.steps if span else 0,
        version=span.version if span else None,
        updates=totals.updates,
        steps=totals.steps,
        staleness=totals.mean_staleness,
        bytes_up=totals.bytes_up,
        bytes_down=totals.bytes_down,
        restarts=totals.restarts,
    )


def _group(history: History, now: float) -> GroupView | None:
    """The group that is to close next."""
    waiting = history.waiting(now)
    if history.finished is not None or not waiting:
        return None
    group = waiting[0]
    training = {c for c, span in history.open.items() if c in group.members}
    arrived = len(group.members) - len(training)
    return GroupView(group.name, len(group.members), arrived, group.arrival, group.latest)


# ---- drawing -------------------------------------------------------------------------------


def render(shown: LiveView, width: int = 100) -> "Stack":
    """A view as something rich prints, at most `width` columns wide."""
    from rich.console import Group as Stack

    return Stack(_head(shown, width), *_rows(shown, width), _foot(shown))


def _head(shown: LiveView, width: int) -> "Text":
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f" v{shown.version}", style="bold")
    text.append(f"  {console.duration(shown.now)}", style="dim")
    if shown.title:
        text.append(f"  {console.clean(shown.title)}")
    if shown.loss is not None:
        text.append(f"   loss {shown.loss:.4f}")
    if shown.epsilon is not None:
        text.append(f"   epsilon {shown.epsilon:.3g}", style="yellow")
    if shown.accuracy is not None:
        reached = shown.target is not None and shown.accuracy >= shown.target
        room = max(8, min(32, width - 70))
        text.append(f"   accuracy {shown.accuracy:.3f} ", style="bold green" if reached else "bold")
        text.append(sparkline(shown.accuracies, room, 1.0), style="green")
    return text


def _rows(shown: LiveView, width: int) -> "list[Text]":
    """The header and one line per client; what a narrow terminal lacks room for is left out."""
    from rich.text import Text

    names = min(20, max([len(c.name) + 1 for c in shown.clients], default=0))
    columns = [
        ("client", max(names, 6)),
        ("speed", -5),
        ("steps", 0),
        ("base", -5),
        ("updates", -8),
    ]
    columns += [("stale", -6)] if width >= 80 else []
    columns += [("up", -8), ("down", -8)] if width >= 96 else []
    room = width - 3 - sum(abs(w) + 1 for _, w in columns) - _STATE
    bar = max(6, min(24, room - 8))
    columns = [(c, bar + 8 if c == "steps" else w) for c, w in columns]
    head = "   " + "".join(_pad(name, w) for name, w in columns) + "  state"
    lines = [Text(head[:width], "dim", no_wrap=True)]
    for client in shown.clients:
        mark, style = _MARKS[client.state]
        line = Text(f" {mark} ", style, no_wrap=True, overflow="ellipsis", end="\n")
        cells = _cells(client, bar)
        for name, w in columns:
            line.append(_pad(cells[name], w), style if name == "steps" else "default")
        line.append("  " + _state(client), style)
        if client.restarts:
            line.append(f" ↻{client.restarts}", "yellow")
        lines.append(line)
    return lines


def _cells(client: ClientView, bar: int) -> dict[str, str]:
    steps = _bar(client.done, client.ordered, bar)
    if client.ordered:
        steps += f" {client.done:>3}/{client.ordered}"
    return {
        "client": console.clean(client.name),
        "speed": "" if client.speed is None else f"{client.speed:g}x",
        "steps": steps,
        "base": "" if client.version is None else f"v{client.version}",
        "updates": str(client.updates),
        "stale": f"{client.staleness:.1f}" if client.updates else "",
        "up": console.size(client.bytes_up),
        "down": console.size(client.bytes_down),
    }


def _state(client: ClientView) -> str:
    return f"{client.state}: {console.clean(client.reason)}" if client.reason else client.state


def _pad(text: str, width: int) -> str:
    """One cell and the space after it: left where `width` is positive, else right."""
    shown = text if len(text) <= abs(width) else text[: abs(width) - 1] + "…"
    return f"{shown:<{width}} " if width > 0 else f"{shown:>{-width}} "


def _foot(shown: LiveView) -> "Text":
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    if shown.finished is not None:
        text.append(f" finished: {console.clean(shown.finished)}", style="bold")
        return text
    if shown.group is not None:
        group = shown.group
        text.append(f" group {console.clean(group.name)} {group.arrived}/{group.members} arrived")
        text.append(f", expected in {_until(group.arrival, shown.now)}")
        text.append(f", closes in {_until(group.latest, shown.now)}", style="cyan")
    else:
        text.append(" no arrival group", style="dim")
    if shown.target is not None:
        text.append(f"   target {shown.target:g}")
        if shown.left is not None:
            text.append(f" in about {console.duration(shown.left)}", style="bold")
    return text


def _until(moment: float, now: float) -> str:
    return console.duration(max(0.0, moment - now))


def _bar(done: int, of: int, width: int) -> str:
    filled = round(width * done / of) if of else 0
    return "━" * filled + "╌" * (width - filled)


def sparkline(values: Sequence[float], width: int, top: float | None = None) -> str:
    """The last `width` values as blocks, from their least to `top` (default: their greatest)."""
    shown = values[-width:] if width > 0 else []
    if not shown:
        return ""
    low = min(shown)
    high = max(shown) if top is None else max(top, *shown)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] for v in shown)


def event_line(row: Row) -> str | None:
    """A row of the history as one line of talk; None for those that would only be noise."""
    clock = f"{row['t']:8.2f}s  "
    match row["kind"]:
        case "join":
            told = f"{row['client']} joined with {console.number(row['examples'])} examples"
        case "leave":
            told = f"{row['client']} left: {row['reason']}"
        case "restart":
            told = f"{row['client']} restarted"
        case "update":
            sent = console.size(row["bytes"])
            told = f"{row['client']} sent {row['steps']} steps on v{row['base']}, {sent}"
        case "merged":
            paid = row["stats"].get("epsilon")
            told = f"v{row['version']} merged" + ("" if paid is None else f", epsilon {paid:.4g}")
        case "evaluated":
            metrics = " ".join(f"{k} {_metric(v)}" for k, v in sorted(row["metrics"].items()))
            told = f"v{row['version']} {metrics}"
        case "discard":
            told = f"{row['update']} discarded: {row['reason']}"
        case "finish":
            told = f"finished: {row['reason']}"
        case _:
            return None
    return clock + console.clean(told)


def _metric(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


class Live(Redrawn):
    """Shows a run. Call `row` with each row of the history and `show` with views: a terminal
    redraws the newest view, anything else gets the rows' lines."""

    def row(self, row: Row) -> None:
        if not self.redraws and (told := event_line(row)) is not None:
            self.say(told)

    def show(self, shown: LiveView) -> None:
        self.draw(lambda width: render(shown, width))
