"""Two pictures of a run: who trained when (`timeline.png`), and what it came to (`accuracy.png`).

Drawn with matplotlib's Agg, imported only when a picture is asked for. Colours are told apart by
colour-blind eyes, and nothing is said by colour alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.protocols import console
from atoll.server.history import OVER, Group, History, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SPANS = 4000  # drawn; a longer run shows its beginning, and says so
MOST_CLIENTS = 40

INK, SOFT, GRID = "#22303c", "#6b7885", "#e3e8ec"
_ACCURACY, _LOSS, _TARGET, _BAD = "#0072b2", "#d55e00", "#009e73", "#c0392b"
_BANDS = ("#fbe8c8", "#d9ecf7")  # arrival groups, in turn
_STALE = ("#2a9d76", "#7fb95c", "#e0b93c", "#e58a3a", "#cf4f3d")  # 0, 1, 2, 3, 4 and more
_UNUSED = "#c3ccd4"


def timeline(history: History, path: Path, title: str = "") -> Path:
    """Write the picture of `draw_timeline` as a PNG."""
    return save(draw_timeline(history, title), path)


def accuracy(history: History, path: Path, target: float | None = None, title: str = "") -> Path:
    """Write the picture of `draw_accuracy` as a PNG."""
    return save(draw_accuracy(history, target, title), path)


def draw_timeline(history: History, title: str = "") -> "Figure":
    """A row per client, the fastest on top; a bar per order, coloured by its staleness.

    Solid is training, light is transfer and waiting. Bands are arrival groups, from the expected
    arrival to the latest (dashed); marks at the top are merges; crosses are orders not used.
    """
    names, end = _shown_clients(history), _horizon(history)
    rows = {name: at for at, name in enumerate(names)}
    spans = [s for s in history.spans if s.client in rows and s.start <= end]
    figure, axes = _figure(11.0, 1.9 + 0.5 * max(len(names), 2))
    _draw_groups(axes, history, rows, end)
    _draw_spans(axes, spans, rows, end)
    _draw_merges(axes, [t for t, _ in history.merges if t <= end], len(names))
    _label_rows(axes, history, names)
    axes.set_xlim(0, end * 1.005 or 1)
    axes.set_xlabel("run clock, seconds", color=SOFT)
    title_of(axes, title or "Who trained when", _what_is_shown(history, len(names), end))
    _legend_of_timeline(figure, axes, bool(history.groups), any(_in_vain(s, end) for s in spans))
    return figure


def draw_accuracy(history: History, target: float | None = None, title: str = "") -> "Figure":
    """Accuracy and loss over the run's clock, with the target and the moment it was reached."""
    figure, axes = _figure(9.0, 4.4)
    points = history.series("accuracy")
    axes.set_xlim(0, history.now * 1.02 or 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("run clock, seconds", color=SOFT)
    axes.set_ylabel("accuracy", color=_ACCURACY)
    axes.tick_params(axis="y", colors=_ACCURACY)
    axes.grid(axis="y", color=GRID, lw=0.8)
    _draw_loss(axes, history)
    times, values = [p.t for p in points], [p.value for p in points]
    marker = "o" if len(points) <= 60 else ""
    axes.plot(times, values, color=_ACCURACY, lw=2.2, marker=marker, ms=3.5)
    if target is not None:
        _draw_target(axes, history, target)
    said = (
        f"best {max(values):.3f}, {len(values)} versions evaluated" if values else "no evaluation"
    )
    title_of(axes, title or "Accuracy and loss", said)
    return figure


# ---- the timeline's parts ------------------------------------------------------------------


def _shown_clients(history: History) -> list[str]:
    """The slowest first, since row 0 is at the bottom; of very many, evenly over their paces."""
    names = sorted(history.clients, key=lambda c: (history.clients[c].pace, c))
    if len(names) <= MOST_CLIENTS:
        return names
    step = (len(names) - 1) / (MOST_CLIENTS - 1)
    return [names[round(at * step)] for at in range(MOST_CLIENTS)]


def _horizon(history: History) -> float:
    """The last moment drawn."""
    return history.now if len(history.spans) <= MOST_SPANS else history.spans[MOST_SPANS].start


def _what_is_shown(history: History, clients: int, end: float) -> str:
    said = f"{len(history.merges)} merges"
    if clients < len(history.clients):
        said += f", {clients} of {len(history.clients)} clients"
    return said if end == history.now else f"{said}, the first {console.duration(end)}"


def _draw_groups(axes: "Axes", history: History, rows: dict[str, int], end: float) -> None:
    shown = [g for g in history.groups.values() if g.opened <= end]
    for at, group in enumerate(shown):
        mine = sorted(rows[m] for m in group.members if m in rows)
        for low, high in _runs(mine):
            _draw_band(axes, group, low, high, _BANDS[at % len(_BANDS)])


def _draw_band(axes: "Axes", group: Group, low: int, high: int, colour: str) -> None:
    """One group over neighbouring rows: its window, and when it closes at the latest."""
    from matplotlib.patches import Rectangle

    bottom, height = low - 0.47, high - low + 0.94
    window = Rectangle(
        (group.arrival, bottom), group.latest - group.arrival, height, color=colour, lw=0, zorder=1
    )
    axes.add_patch(window)
    axes.vlines(
        group.latest, bottom, bottom + height, colors=SOFT, linestyles=(0, (3, 2)), lw=1, zorder=2
    )


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 3] -> [(0, 1), (3, 3)]: neighbouring rows together."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return found


def _draw_spans(axes: "Axes", spans: Sequence[Span], rows: dict[str, int], end: float) -> None:
    whole: dict[tuple[int, str], list[tuple[float, float]]] = {}
    solid: dict[tuple[int, str], list[tuple[float, float]]] = {}
    crosses: list[tuple[float, int]] = []
    for span in spans:
        row, until = rows[span.client], min(end, end if span.end is None else span.end)
        colour = _colour(span)
        whole.setdefault((row, colour), []).append((span.start, until - span.start))
        if span.update is not None:
            idle = max(0.0, until - span.start - span.train_seconds)
            solid.setdefault((row, colour), []).append(
                (span.start + idle / 2, until - span.start - idle)
            )
        if _in_vain(span, end):
            crosses.append((until, row))
    for (row, colour), bars in whole.items():
        axes.broken_barh(bars, (row - 0.3, 0.6), color=colour, alpha=0.35, lw=0, zorder=3)
    for (row, colour), bars in solid.items():
        axes.broken_barh(
            bars, (row - 0.3, 0.6), facecolor=colour, edgecolor="white", lw=0.4, zorder=4
        )
    moments, lanes = [t for t, _ in crosses], [row for _, row in crosses]
    axes.scatter(moments, lanes, marker="x", s=42, lw=1.8, color=_BAD, zorder=6)


def _in_vain(span: Span, end: float) -> bool:
    """Whether it ended before `end` and its work was not used; the end of the run is no fault."""
    return span.reason not in ("", OVER) and span.end is not None and span.end <= end


def _colour(span: Span) -> str:
    if span.staleness is None:
        return _UNUSED
    return _STALE[min(span.staleness, len(_STALE) - 1)]


def _draw_merges(axes: "Axes", moments: Sequence[float], rows: int) -> None:
    top = max(rows, 1) - 0.5
    axes.vlines(moments, -0.5, top, colors=INK, lw=0.5, alpha=0.25, zorder=2)
    axes.plot(
        moments, [top + 0.12] * len(moments), ls="", marker="v", ms=4, color=INK, clip_on=False
    )
    axes.set_ylim(-0.55, top + 0.25)


def _label_rows(axes: "Axes", history: History, names: Sequence[str]) -> None:
    labels = []
    for name in names:
        totals = history.clients[name]
        pace = f"{totals.pace:.3g} steps/s" if totals.pace else "no result"
        restarts = f", restarted {totals.restarts}x" if totals.restarts else ""
        labels.append(f"{_short(console.clean(name))}\n{pace}{restarts}")
    axes.set_yticks(range(len(names)), labels, fontsize=8.5, color=INK)
    axes.tick_params(axis="y", length=0)


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _legend_of_timeline(figure: "Figure", axes: "Axes", groups: bool, crosses: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    said = ["fresh", "1 stale", "2", "3", "4+"]
    handles: list[Patch | Line2D] = [
        Patch(color=c, label=s) for c, s in zip(_STALE, said, strict=True)
    ]
    handles.append(Patch(color=_UNUSED, label="not merged"))
    handles.append(Line2D([], [], ls="", marker="v", ms=4, color=INK, label="merge"))
    if crosses:
        handles.append(Line2D([], [], ls="", marker="x", color=_BAD, label="not used"))
    if groups:
        handles.append(Patch(color=_BANDS[0], label="group expected"))
        handles.append(Line2D([], [], ls="--", lw=1, color=SOFT, label="at latest"))
    below = ScaledTranslation(0, -0.5, figure.dpi_scale_trans)  # inches under the axes
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0),
        bbox_transform=axes.transAxes + below, ncols=len(handles), frameon=False, fontsize=8,
        handlelength=1.3, columnspacing=1.2,
    )  # fmt: skip


# ---- both pictures -------------------------------------------------------------------------


def _draw_loss(axes: "Axes", history: History) -> None:
    """On an axis of its own, behind the accuracy."""
    losses = history.series("loss")
    if not losses:
        return
    right = axes.twinx()
    bare(right)
    times, values = [p.t for p in losses], [p.value for p in losses]
    right.plot(times, values, color=_LOSS, lw=1.4, ls=(0, (4, 2)))
    right.set_ylabel("loss (dashed)", color=_LOSS)
    right.tick_params(axis="y", colors=_LOSS)
    right.set_ylim(0, max(values) * 1.08 or 1)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)


def _draw_target(axes: "Axes", history: History, target: float) -> None:
    reached = history.seconds_to("accuracy", target)
    said = f"target {target:g}" + ("" if reached is None else f", reached at {reached:.1f}s")
    axes.axhline(target, color=_TARGET, lw=1.2, ls=(0, (6, 3)), label=said)
    axes.legend(
        loc="center right", labelcolor=_TARGET, fontsize=9, framealpha=0.8, edgecolor="white"
    )
    if reached is not None:
        axes.plot([reached], [target], marker="o", ms=9, mfc="none", mec=_TARGET, mew=2)


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """A figure of its own, known to no global list: nothing to close, safe in any thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bare(axes)
    axes.tick_params(axis="x", colors=SOFT)
    return figure, axes


def bare(axes: "Axes") -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=9)


def title_of(axes: "Axes", title: str, beside: str) -> None:
    said = console.clean(title)
    if len(said) + len(beside) > 75:  # no room for both in one line
        said += "\n"
    axes.set_title(said, loc="left", fontsize=12, color=INK, weight="bold", pad=12)
    axes.set_title(beside, loc="right", fontsize=9, color=SOFT, pad=12)


def save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.2)
    return path
