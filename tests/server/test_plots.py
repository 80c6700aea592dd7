"""The two pictures: what stands in them, asked of the figures; and that they are PNGs."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from atoll.server import plots
from atoll.server.history import History
from atoll.server.totals import Row


def order(client: str, number: int, start: float, end: float, steps: int) -> list[Row]:
    name = f"o{number}"
    return [
        {"t": start, "kind": "train", "client": client, "order": name, "steps": steps,
         "version": 0},
        {"t": start, "kind": "started", "order": name},
        {"t": end, "kind": "update", "client": client, "order": name, "update": f"{name}.0",
         "steps": steps, "base": 0, "train_seconds": (end - start) / 2, "started": start,
         "bytes": 10, "metrics": {}},
    ]  # fmt: skip


def story() -> History:
    """fast: 100 steps/s, merged fresh, then refused; slow: 10 steps/s, merged 6 versions late."""
    group = {"kind": "group", "group": "g0", "arrival": 1.0, "latest": 1.5}
    return History.of(
        [
            {"t": 0.0, "kind": "join", "client": "fast", "examples": 10},
            {"t": 0.0, "kind": "join", "client": "slow", "examples": 10},
            {"t": 0.0, **group, "members": ["fast", "slow"]},
            *order("fast", 0, 0.0, 1.0, 50),
            {"t": 1.0, "kind": "aggregate", "version": 1, "items": [["o0.0", 1.0]],
             "staleness": {"o0.0": 0}},
            {"t": 1.1, "kind": "merged", "version": 1, "stats": {}},
            {"t": 1.2, "kind": "evaluated", "version": 1,
             "metrics": {"accuracy": 0.6, "loss": 2.0}},
            *order("slow", 1, 0.0, 2.0, 10),
            {"t": 2.0, "kind": "aggregate", "version": 7, "items": [["o1.0", 1.0]],
             "staleness": {"o1.0": 6}},
            {"t": 2.1, "kind": "merged", "version": 7, "stats": {}},
            {"t": 2.2, "kind": "evaluated", "version": 7,
             "metrics": {"accuracy": 0.9, "loss": 1.0}},
            *order("fast", 2, 2.0, 3.0, 50),
            {"t": 3.0, "kind": "discard", "update": "o2.0", "reason": "not a number"},
            {"t": 4.0, "kind": "restart", "client": "slow"},
        ]
    )  # fmt: skip


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def said(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_the_fastest_client_is_on_top_with_its_pace() -> None:
    (axes,) = plots.draw_timeline(story()).axes
    assert labels(axes) == ["slow\n10 steps/s, restarted 1x", "fast\n100 steps/s"]


def test_a_group_is_a_band_from_its_expected_to_its_latest_arrival() -> None:
    (axes,) = plots.draw_timeline(story()).axes
    (band,) = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert (band.get_x(), band.get_width()) == (1.0, 0.5)
    assert (band.get_y(), band.get_height()) == pytest.approx((-0.47, 1.94))


def test_bars_are_coloured_by_staleness_and_crosses_mark_what_was_not_used() -> None:
    (axes,) = plots.draw_timeline(story()).axes
    colours = {
        to_hex((red, green, blue))
        for shape in axes.collections
        for red, green, blue, _ in np.atleast_2d(np.asarray(shape.get_facecolor())).tolist()
    }
    assert {plots._STALE[0], plots._STALE[-1], plots._UNUSED} <= colours
    assert {plots._STALE[1], plots._STALE[2], plots._STALE[3]} & colours == set()
    crosses = np.asarray(axes.collections[-2].get_offsets())
    assert crosses.tolist() == [[3.0, 1.0]]


def test_the_legend_names_groups_and_crosses_only_where_there_are_some() -> None:
    (axes,) = plots.draw_timeline(story()).axes
    assert {"group expected", "at latest", "not used"} <= set(said(axes))
    (axes,) = plots.draw_timeline(History.of(story().rows[3:6])).axes
    assert not {"group expected", "at latest", "not used"} & set(said(axes))


def test_what_the_end_of_the_run_cut_short_is_not_marked_as_refused() -> None:
    history = story()
    cut = order("slow", 3, 3.0, 9.0, 10)[:2]
    for row in [*cut, {"t": 5.0, "kind": "finish", "reason": "over"}]:
        history.append(row)
    (axes,) = plots.draw_timeline(history).axes
    assert np.asarray(axes.collections[-2].get_offsets()).tolist() == [[3.0, 1.0]]


def test_members_apart_from_each_other_get_bands_apart() -> None:
    assert plots._runs([0, 1, 3, 5, 6]) == [(0, 1), (3, 3), (5, 6)]
    assert plots._runs([]) == []


def test_a_crowd_is_shown_by_forty_of_all_paces() -> None:
    rows: list[Row] = []
    for at in range(100):
        rows += order(f"c{at:02d}", at, 0.0, 1.0, at + 1)
    history = History.of(rows)
    shown = plots._shown_clients(history)
    assert (len(set(shown)), shown[0], shown[-1]) == (40, "c00", "c99")
    (axes,) = plots.draw_timeline(history).axes
    assert axes.get_title("right") == "0 merges, 40 of 100 clients"


def test_a_long_run_shows_its_beginning_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MOST_SPANS", 2)
    (axes,) = plots.draw_timeline(story()).axes
    assert axes.get_title("right") == "2 merges, the first 2.0s"
    assert axes.get_xlim()[1] == pytest.approx(2.0 * 1.005)


def test_accuracy_and_loss_have_their_own_axes() -> None:
    left, right = plots.draw_accuracy(story(), target=0.85).axes
    assert np.asarray(left.lines[0].get_ydata()).tolist() == [0.6, 0.9]
    assert np.asarray(left.lines[0].get_xdata()).tolist() == [1.2, 2.2]
    assert np.asarray(right.lines[0].get_ydata()).tolist() == [2.0, 1.0]


def test_the_target_says_when_it_was_reached() -> None:
    left, _ = plots.draw_accuracy(story(), target=0.85).axes
    assert said(left) == ["target 0.85, reached at 2.2s"]
    left, _ = plots.draw_accuracy(story(), target=0.95).axes
    assert said(left) == ["target 0.95"]


def test_pictures_are_pngs_even_of_a_run_in_which_nothing_happened(tmp_path: Path) -> None:
    for made in (
        plots.timeline(story(), tmp_path / "timeline.png", "a title"),
        plots.accuracy(story(), tmp_path / "accuracy.png", 0.9),
        plots.timeline(History(), tmp_path / "empty.png"),
        plots.accuracy(History(), tmp_path / "nothing.png", 0.9),
    ):
        assert made.read_bytes().startswith(b"\x89PNG")


def test_a_clients_name_is_cleaned_and_shortened() -> None:
    history = History.of(order("x" * 40 + "\x1b[2J\n", 0, 0.0, 1.0, 10))
    (axes,) = plots.draw_timeline(history).axes
    assert labels(axes) == ["x" * 21 + "…\n20 steps/s"]
