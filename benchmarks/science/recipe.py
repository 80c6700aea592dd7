"""Recipe: what all experiments share: a table, claims that must hold, a picture, one JSON line.

    python benchmarks/science/NAME.py [--quick] [--out FOLDER]

A recipe runs a method on real data with fixed seeds, and says for each thing that its paper or its
spec expects what came of it here. What is asserted and does not hold makes it exit with 1; what is
only compared stands on the page either way, with both numbers. It ends within its budget, minutes
of one processor, or fails; where its data are absent it is skipped. `page.py` runs all of them and
writes docs/science.md.

    RECIPE = Recipe("fedlaw", "FedLAW: ...", minutes=4, paper="https://...", run=run)

    if __name__ == "__main__":
        main(RECIPE)
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "science"
DATA = ROOT.parent / "shared" / "data"
INK, SOFT, GRID = "#22303c", "#6b7885", "#e3e8ec"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7885", "#22303c")

Draw = Callable[["Figure"], None]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Claim:
    """What is expected, and what was found."""

    says: str  # "exp: FedCompass is at 90 % before FedAvg"
    found: str  # "882 s against 1640 s, mean of seeds 0 to 2"
    held: bool
    asserted: bool = True  # False: compared only, e.g. with a paper's figure for another setting
    source: str = ""  # who expects it: "paper, table 1"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a recipe came to. Cells are printed as they are, floats with four digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    claims: Sequence[Claim]
    draw: Draw  # onto an empty figure; its size may be set
    said: str = ""  # Markdown under the table: what the reader should know besides


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str  # of its file and of its picture
    title: str
    minutes: float  # budget, of one processor
    paper: str  # URL
    run: Callable[[bool], Finding]  # True: as short as shows that it works; asserts nothing
    needs: Path | None = None  # data without which there is nothing to run

    def missing(self) -> str:
        """Why it cannot run here; empty: it can."""
        if self.needs is None or self.needs.exists():
            return ""
        return f"skipped: {os.path.relpath(self.needs, ROOT)} is not there"

    def described(self) -> str:
        """Its file's docstring without the first line: model, data, clients, seeds."""
        said = sys.modules[self.run.__module__].__doc__ or ""
        return said.partition("\n")[2].strip()


def main(recipe: Recipe) -> None:
    """Run it, leave NAME.json and NAME.png, print the JSON line, exit with 0 or 1."""
    parser = argparse.ArgumentParser(description=recipe.title)
    parser.add_argument("--quick", action="store_true", help="a short look; asserts nothing")
    parser.add_argument("--out", type=Path, default=None, help="folder  [default: docs/science]")
    given = parser.parse_args()
    if recipe.missing():
        say(f"{recipe.name}: {recipe.missing()}")
        sys.exit(0)
    told = carried_out(recipe, given.quick, given.out or (None if given.quick else PAGES))
    print(json.dumps(told), flush=True)
    sys.exit(0 if told["ok"] else 1)


def carried_out(recipe: Recipe, quick: bool, out: Path | None) -> dict[str, object]:
    """What the JSON line says. Without `out` no file is written."""
    torch.set_num_threads(1)
    began, clock = time.process_time(), time.monotonic()
    finding = recipe.run(quick)
    minutes = (time.process_time() - began) / 60
    asserted = [replace(c, asserted=c.asserted and not quick) for c in finding.claims]
    told: dict[str, object] = {
        "recipe": recipe.name,
        "ok": all(c.held for c in asserted if c.asserted) and minutes <= recipe.minutes,
        "minutes": round(minutes, 2),
        "budget_minutes": recipe.minutes,
        "wall_minutes": round((time.monotonic() - clock) / 60, 2),
        "title": recipe.title,
        "paper": recipe.paper,
        "setting": recipe.described(),
        "columns": list(finding.columns),
        "rows": [[_cell(value) for value in row] for row in finding.rows],
        "claims": [
            {"says": c.says, "found": c.found, "held": c.held, "asserted": c.asserted,
             "source": c.source} for c in asserted
        ],
        "said": finding.said,
        "versions": versions(),
    }  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{recipe.name}.json").write_text(json.dumps(told, indent=1) + "\n")
        draw(finding.draw, out / f"{recipe.name}.png")
    return told


def say(text: str) -> None:
    """A remark for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


# ---- numbers ---------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`91.2 ± 0.3`: mean and standard deviation over the seeds."""
    off = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {off:.{digits}f}"


def late(points: Points, last: int = 5) -> float:
    """Mean of the last evaluations, as the specs report accuracy."""
    return mean([value for _, value in points[-last:]])


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


# ---- pictures --------------------------------------------------------------------------------


def draw(onto: Draw, path: Path) -> None:
    """A PNG, the same bytes for the same numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    onto(figure)
    figure.savefig(path, format="png", bbox_inches="tight", metadata={"Software": None})


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Points]]],
    x: str,
    y: str,
    low: float | None = None,
    high: float | None = None,
) -> Draw:
    """A panel per title, in it a line per label: the mean over its seeds, each seed lightly."""

    def onto(figure: "Figure") -> None:
        figure.set_size_inches(max(6.0, 3.6 * len(panels)), 3.6)
        labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
        colour = {label: COLOURS[at % len(COLOURS)] for at, label in enumerate(labels)}
        for at, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), at + 1)
            _plain(axes, title, x, y if at == 0 else "")
            for label, seeds in lines.items():
                for points in seeds:
                    axes.plot(*_xy(points), color=colour[label], lw=0.7, alpha=0.3)
                axes.plot(*_xy(_mean_line(seeds)), color=colour[label], lw=2, label=label)
            axes.set_ylim(low, high)
        figure.axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
        figure.tight_layout()

    return onto


def bars(groups: Mapping[str, Mapping[str, float]], y: str) -> Draw:
    """A group of bars per title, in it a bar per label."""

    def onto(figure: "Figure") -> None:
        labels = list(dict.fromkeys(label for group in groups.values() for label in group))
        axes = figure.add_subplot()
        _plain(axes, "", "", y)
        width = 0.8 / max(len(labels), 1)
        for at, label in enumerate(labels):
            places = [i + (at - (len(labels) - 1) / 2) * width for i in range(len(groups))]
            heights = [group.get(label, 0.0) for group in groups.values()]
            axes.bar(places, heights, width * 0.92, color=COLOURS[at % len(COLOURS)], label=label)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.legend(fontsize=8, frameon=False, ncols=len(labels), loc="upper center",
                    bbox_to_anchor=(0.5, -0.1))  # fmt: skip

    return onto


def _plain(axes: "Axes", title: str, x: str, y: str) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, colors=SOFT)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, weight="bold")
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [a for a, _ in points], [b for _, b in points]


def _mean_line(seeds: Sequence[Points]) -> Points:
    """The mean of step functions, at 60 places up to where the shortest ends."""
    seeds = [points for points in seeds if points]
    if len(seeds) < 2:
        return seeds[0] if seeds else []
    first, last = max(p[0][0] for p in seeds), min(p[-1][0] for p in seeds)
    places = [first + (last - first) * i / 59 for i in range(60)]
    return [(at, mean([_at(points, at) for points in seeds])) for at in places]


def _at(points: Points, x: float) -> float:
    return next((b for a, b in reversed(points) if a <= x), points[0][1])
