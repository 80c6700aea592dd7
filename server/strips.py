"""A third picture of a run: whom a rule over the set heard, a strip per client (`shares.png`).

A column is a version. Its colour says how much of a client's update the rule took, measured by the
weight that the strategy gave it: blue is more, orange less, with the number's logarithm, and a dash
is nothing at all. Over the strips stands FedLAW's gamma, where there is one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.protocols import console
from atoll.server.history import History, Taken
from atoll.server.plots import GRID, INK, MOST_CLIENTS, SOFT, bare, save, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 600  # drawn; of more versions, the newest
ENDS = 2.0  # the colours end at a quarter and at four times the weight (powers of 2)
LEAST, EVEN, MOST = "#d55e00", "#f4f4f2", "#0072b2"


def shares(history: History, path: Path, title: str = "") -> Path:
    """Write the picture of `draw_shares` as a PNG."""
    return save(draw_shares(history, title), path)


def draw_shares(history: History, title: str = "") -> "Figure":
    """Rows are clients by name, columns the versions in which a rule chose."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    taken = history.taken[-MOST_COLUMNS:]
    names = sorted({client for told in taken for client in told.shares})[:MOST_CLIENTS]
    gammas = [told.gamma for told in taken]
    scaled = any(gamma is not None for gamma in gammas)
    figure = Figure(
        figsize=(9.0, 1.8 + 0.34 * max(len(names), 2) + scaled), dpi=130, facecolor="white"
    )
    FigureCanvasAgg(figure)
    heights = [1.0, 0.34 * max(len(names), 2)] if scaled else [1.0]
    plots = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)
    axes: Axes = plots[-1][0]
    if scaled:
        _draw_gamma(plots[0][0], gammas)
    colours = LinearSegmentedColormap.from_list("heard", [LEAST, EVEN, MOST])
    image = axes.imshow(
        [[_colour_at(told, name) for told in taken] for name in names] or [[math.nan]],
        aspect="auto", cmap=colours, vmin=-ENDS, vmax=ENDS, interpolation="nearest",
    )  # fmt: skip
    _draw_left_out(axes, taken, names)
    bare(axes)
    axes.set_yticks(range(len(names)), [console.clean(name) for name in names], color=INK)
    _label_versions(axes, taken)
    bar = figure.colorbar(image, ax=[row[0] for row in plots], shrink=0.8, pad=0.02, aspect=30)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "its weight", "x 2", "x 4"])
    bar.ax.tick_params(labelsize=8, colors=SOFT)
    bar.outline.set_visible(False)
    title_of(plots[0][0], title or "Whom the merges heard", f"{len(taken)} merges")
    return figure


def _colour_at(told: Taken, client: str) -> float:
    """log2 of what was taken over the weight; NaN where the client had no part."""
    took, weight = told.shares.get(client, (0.0, 0.0))
    if weight <= 0:
        return math.nan
    return math.log2(took / weight) if took > 0 else -ENDS


def _draw_left_out(axes: "Axes", taken: Sequence[Taken], names: Sequence[str]) -> None:
    """A dash where a client took part and nothing was taken: not by colour alone."""
    nothing = [
        (x, y)
        for x, told in enumerate(taken)
        for y, name in enumerate(names)
        if name in told.shares and told.shares[name][0] <= 0
    ]
    axes.scatter(
        [x for x, _ in nothing], [y for _, y in nothing], marker="_", s=30, color=INK, lw=1.4
    )


def _draw_gamma(axes: "Axes", gammas: Sequence[float | None]) -> None:
    bare(axes)
    axes.axhline(1.0, color=SOFT, lw=0.8, ls=(0, (4, 3)))
    axes.plot([math.nan if g is None else g for g in gammas], color=INK, lw=1.6, marker="o", ms=2.5)
    axes.set_ylabel("gamma", fontsize=9, color=SOFT)
    axes.grid(axis="y", color=GRID, lw=0.8)


def _label_versions(axes: "Axes", taken: Sequence[Taken]) -> None:
    step = max(1, math.ceil(len(taken) / 12))
    places = range(0, len(taken), step)
    axes.set_xticks(places, [str(taken[at].version) for at in places])
    axes.set_xlabel("version", fontsize=9, color=SOFT)
