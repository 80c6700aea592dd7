"""Whom the merges heard: a strip per client, from the stats of every version."""

import math
from pathlib import Path

import numpy as np
import pytest

from atoll.server import strips
from atoll.server.history import History
from atoll.server.totals import Row


def merge(
    version: int, took: dict[str, float], weights: dict[str, float], **stats: float
) -> list[Row]:
    """Every client sends an update; `took` by `lambda/`, or by `coefficient/` without a gamma."""
    rows: list[Row] = []
    names = {client: f"{client}{version}" for client in weights}
    for client, update in names.items():
        rows += [
            {"t": 1.0 * version, "kind": "train", "client": client, "order": update, "steps": 1,
             "version": version - 1},
            {"t": 1.0 * version, "kind": "update", "client": client, "order": update,
             "update": update, "steps": 1, "base": version - 1, "train_seconds": 0.1,
             "started": 0.0, "bytes": 1, "metrics": {}},
        ]  # fmt: skip
    prefix = "lambda" if "gamma" in stats else "coefficient"
    told = {f"{prefix}/{names[client]}": value for client, value in took.items()}
    items = [[names[client], weight] for client, weight in weights.items()]
    return [
        *rows,
        {"t": 1.0 * version, "kind": "aggregate", "version": version, "items": items,
         "staleness": dict.fromkeys(names.values(), 0)},
        {"t": 1.0 * version, "kind": "merged", "version": version, "stats": {**told, **stats}},
    ]  # fmt: skip


def story() -> History:
    weights = {"a": 0.1, "b": 0.3}  # their sum is the strategy's damping
    return History.of(
        [
            *merge(1, {"a": 0.5, "b": 0.5}, weights, gamma=1.1),
            *merge(2, {"a": 0.0, "b": 1.0}, weights, gamma=0.9),
            *merge(3, {}, {"a": 0.1}, fallback=1.0),
        ]
    )


def test_the_history_knows_what_was_taken_of_whom() -> None:
    history = story()
    assert [told.version for told in history.taken] == [1, 2]
    assert history.taken[0].shares == {"a": (0.5, 0.25), "b": (0.5, pytest.approx(0.75))}
    assert [told.gamma for told in history.taken] == [1.1, 0.9]


def test_a_strip_is_coloured_by_what_was_taken_over_the_weight() -> None:
    figure = strips.draw_shares(story())
    gamma, axes = figure.axes[:2]
    shown = np.asarray(axes.images[0].get_array())
    assert shown[0].tolist() == [1.0, -2.0]  # twice its weight, then nothing
    assert shown[1].tolist() == pytest.approx([math.log2(2 / 3), math.log2(4 / 3)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert np.asarray(gamma.lines[1].get_ydata()).tolist() == [1.1, 0.9]
    (dashes,) = axes.collections
    assert np.asarray(dashes.get_offsets()).tolist() == [[1.0, 0.0]]


def test_a_rule_without_a_scale_has_no_gamma_and_who_was_not_there_no_colour() -> None:
    history = History.of(
        [
            *merge(1, {"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}),
            *merge(2, {"b": 0.5, "c": 0.5}, {"b": 0.5, "c": 0.5}),
        ]
    )
    figure = strips.draw_shares(history, "Krum")
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array(), dtype=float)
    assert np.isnan(shown).tolist() == [[False, True], [False, False], [True, False]]
    assert axes.get_title(loc="left") == "Krum"


def test_the_picture_is_a_png_also_of_nothing(tmp_path: Path) -> None:
    for history in (story(), History()):
        made = strips.shares(history, tmp_path / "shares.png")
        assert made.read_bytes()[:4] == b"\x89PNG"
