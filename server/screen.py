"""Screens of `status` and `run`: pure functions from what is known to styled text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from atoll.protocols import console
from atoll.server.offline import Kept
from atoll.server.spec import RunSpec
from atoll.server.status import ClientStatus, GroupStatus, Status

if TYPE_CHECKING:
    from rich.text import Text

Cell = tuple[str, str]  # text, style

_STATES: Mapping[str, str] = {
    "running": "green",
    "stopped": "yellow",
    "finished": "bold",
    "damaged": "red",
    "training": "green",
    "sending": "cyan",
    "suspect": "yellow",
    "left": "red",
}


def status_screen(status: Status) -> "Text":
    """One screen: the run, its arrival group, a line for every client."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore", end="")
    text.append(f"{console.clean(status.name)}", "bold")
    text.append(f"  {console.clean(status.strategy)}  ")
    text.append(status.state, _STATES.get(status.state, ""))
    text.append(f" {console.duration(status.elapsed_s)}   v{status.version}")
    text.append(f"   {worth(status)}   {console.number(status.updates)} updates")
    text.append(f", {console.number(status.steps)} local steps")
    text.append("\n" if status.epsilon is None else f"   epsilon {status.epsilon:.4g}\n")
    text.append(f"run {status.run}", "dim")
    text.append(f"   {status.address or status.state_dir or ''}\n", "dim")
    if status.reason:
        text.append(f"{console.clean(status.reason)}\n")
    for group in status.groups:
        text.append(f"{group_line(group, status.elapsed_s)}\n", "cyan")
    if status.clients:
        text.append_text(_clients(status.clients))
    text.append(_census(status.clients), "dim")
    return text


def worth(status: Status) -> str:
    """`accuracy 0.9410, best 0.9450 (v116), target 0.95`; the latest with its version where that
    is not the newest one."""
    target = "" if status.target is None else f", target {status.target:g}"
    if status.latest is None:
        return f"no {status.metric} yet{target}"
    best = "" if status.best is None else f", best {status.best:.4f} (v{status.best_version})"
    at = status.latest_version
    old = "" if at in (None, status.version) else f" (v{at})"
    return f"{status.metric} {status.latest:.4f}{old}{best}{target}"


def group_line(group: GroupStatus, now: float) -> str:
    def until(moment: float) -> str:
        return console.duration(max(0.0, moment - now))

    missing = ", ".join(console.clean(m) for m in group.members if m not in group.arrived)
    return (
        f"group {console.clean(group.name)}: {len(group.arrived)}/{len(group.members)} arrived, "
        f"expected in {until(group.expected)}, closes in {until(group.latest)}"
        + (f"   waits for {missing}" if missing else "")
    )


def _clients(clients: Sequence[ClientStatus]) -> "Text":
    head = ["CLIENT", "STATE", "SPEED", "WORK", "UP", "DOWN", "HEARD", "WHY"]
    return columns(head, [_client(client) for client in clients], right={2, 4, 5, 6})


def _client(client: ClientStatus) -> list[Cell]:
    pace = client.seconds_per_step
    why = console.clean(client.reason)
    if client.since_s is not None:
        why += f" {console.duration(client.since_s)} ago"
    return [
        (client.name, ""),
        (client.doing, _STATES.get(client.doing, "")),
        (_speed(1 / pace) if pace else "", ""),
        (_work(client), ""),
        (console.size(client.bytes_up), ""),
        (console.size(client.bytes_down), ""),
        ("" if client.heard_s is None else console.duration(client.heard_s), ""),
        (why, "dim"),
    ]


def _speed(pace: float) -> str:
    return f"{console.number(pace) if pace >= 1000 else f'{pace:.3g}'} steps/s"


def _work(client: ClientStatus) -> str:
    if client.order is not None:
        return f"{client.order} {client.step or 0}/{client.steps or 0} steps"
    return "" if client.updates is None else f"{client.updates} updates"


def _census(clients: Sequence[ClientStatus]) -> str:
    counts: dict[str, int] = {}
    for client in clients:
        counts[client.doing] = counts.get(client.doing, 0) + 1
    told = ", ".join(f"{count} {doing}" for doing, count in sorted(counts.items()))
    many = f"{len(clients)} client{'' if len(clients) == 1 else 's'}"
    return f"{many}: {told}" if told else "no clients yet"


# ---- runs ------------------------------------------------------------------------------------


def runs_screen(found: Sequence[Mapping[str, object]]) -> "Text | str":
    if not found:
        return "no run here: start one with fl-server start, or try fl-server demo"
    head = ["STATE DIR", "NAME", "STRATEGY", "STATE", "VERSION", "BEST", "UPDATES", "CLOCK"]
    rows: list[list[Cell]] = []
    for run in found:
        best, state = run["best"], str(run["state"])
        rows.append([
            (str(run["state_dir"]), ""),
            (str(run["name"]), ""),
            (str(run["strategy"]), ""),
            (state, _STATES.get(state, "")),
            ("" if run["version"] is None else f"v{run['version']}", ""),
            (f"{run['metric']} {best:.4f}" if isinstance(best, float) else "", ""),
            (str(run["updates"]), ""),
            (console.duration(float(str(run["elapsed_s"]))), ""),
        ])  # fmt: skip
    table = columns(head, rows, right={4, 5, 6, 7})
    table.right_crop(1)
    return table


def run_screen(
    spec: RunSpec, status: Status, kept: Sequence[Kept], files: Mapping[str, int]
) -> "Text":
    """All that is known of one run."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore", end="")
    text.append(console.clean(spec.name), "bold")
    text.append("  ")
    text.append(status.state, _STATES.get(status.state, ""))
    text.append(f"   {console.clean(status.reason)}\n" if status.reason else "\n")
    local = ", ".join(f"{k}={v}" for k, v in sorted(spec.local.items())) or "defaults"
    told = {
        "run": spec.id,
        "strategy": f"{spec.strategy}   aggregator {spec.aggregator}   outer {spec.outer}",
        "training": f"{spec.model} on {spec.data}   {spec.algorithm} ({local})   seed {spec.seed}",
        "wire": f"up {spec.codec_up}   down {spec.codec_down}   buffers {spec.buffers}",
        "so far": f"v{status.version}   {console.number(status.updates)} updates   "
        f"{console.number(status.steps)} local steps   {console.duration(status.elapsed_s)}",
        "worth": worth(status),
        "clients": _census(status.clients),
        "files": "   ".join(f"{name} {console.size(size)}" for name, size in files.items()),
    }
    for name, value in told.items():
        text.append(f"  {name:<9}", "dim")
        text.append(f" {console.clean(value)}\n")
    rows: list[list[Cell]] = [
        [
            (f"v{one.version}" + (" best" if one.version == status.best_version else ""), ""),
            (console.size(one.bytes), ""),
            ("  ".join(f"{k} {v:.4f}" for k, v in _measures(one)), ""),
            (one.payload_sha256[:16], "dim"),
        ]
        for one in kept
    ]
    text.append_text(columns(["VERSION", "SIZE", "METRICS", "PAYLOAD SHA-256"], rows, right={1}))
    text.right_crop(1)
    return text


def _measures(one: Kept) -> list[tuple[str, float]]:
    return [(k, v) for k, v in sorted(one.metrics.items()) if k != "examples" and v is not None]


def columns(head: Sequence[str], rows: Sequence[Sequence[Cell]], right: set[int]) -> "Text":
    """A table without lines, as wide as it must be; `right` are columns of numbers."""
    from rich.text import Text

    clean = [[(console.clean(text), style) for text, style in row] for row in rows]
    table = [[(name, "dim") for name in head], *clean]
    widths = [max(len(row[at][0]) for row in table) for at in range(len(head))]
    text = Text(no_wrap=True, overflow="ignore", end="")
    for row in table:
        for at, (cell, style) in enumerate(row):
            last = at == len(row) - 1
            width = 0 if last and at not in right else widths[at]
            text.append(f"{cell:>{width}}" if at in right else f"{cell:<{width}}", style)
            text.append("\n" if last else "  ")
    return text
