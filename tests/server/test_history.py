"""History: rows in, totals, series and spans out."""

import math
from pathlib import Path

import pytest

from atoll.server.history import History, Point, line
from atoll.server.totals import Row, Totals


def rows() -> list[Row]:
    """Two clients, two merges: slow's update is one version stale, fast's second is refused."""
    story: list[Row] = [
        {"t": 0.0, "kind": "join", "client": "fast", "examples": 100},
        {"t": 0.0, "kind": "join", "client": "slow", "examples": 50},
        {"t": 0.0, "kind": "train", "client": "fast", "order": "o0", "steps": 20, "version": 0},
        {"t": 0.0, "kind": "train", "client": "slow", "order": "o1", "steps": 10, "version": 0},
        {"t": 0.1, "kind": "started", "order": "o0", "bytes": 400},
        {"t": 0.1, "kind": "started", "order": "o1", "bytes": 400},
        update(1.1, "fast", "o0", 20, 0.8),
        {"t": 1.1, "kind": "aggregate", "version": 1, "items": [["o0.0", 1.0]],
         "staleness": {"o0.0": 0}},
        {"t": 1.2, "kind": "merged", "version": 1, "stats": {}},
        {"t": 1.3, "kind": "evaluated", "version": 1, "metrics": {"accuracy": 0.5, "loss": 1.5}},
        {"t": 1.3, "kind": "train", "client": "fast", "order": "o2", "steps": 20, "version": 1},
        update(2.1, "slow", "o1", 10, 2.0),
        {"t": 2.1, "kind": "aggregate", "version": 2, "items": [["o1.0", 0.7]],
         "staleness": {"o1.0": 1}},
        {"t": 2.2, "kind": "merged", "version": 2, "stats": {}},
        {"t": 2.3, "kind": "evaluated", "version": 2, "metrics": {"accuracy": 0.75, "loss": 1.0}},
        update(2.4, "fast", "o2", 20, 1.0),
        {"t": 2.4, "kind": "discard", "update": "o2.0", "reason": "not a number"},
        {"t": 2.5, "kind": "train", "client": "slow", "order": "o3", "steps": 10, "version": 2},
        {"t": 2.6, "kind": "restart", "client": "slow"},
        {"t": 3.0, "kind": "finish", "reason": "2 versions done"},
    ]  # fmt: skip
    return story


def update(t: float, client: str, order: str, steps: int, seconds: float) -> Row:
    return {
        "t": t, "kind": "update", "client": client, "order": order, "update": f"{order}.0",
        "steps": steps, "base": 0, "train_seconds": seconds, "started": 0.1, "bytes": 400,
        "metrics": {},
    }  # fmt: skip


def test_totals_are_the_sums_over_a_clients_rows() -> None:
    history = History.of(rows())
    fast, slow = history.clients["fast"], history.clients["slow"]
    assert (fast.updates, fast.merged, fast.discarded, fast.steps) == (2, 1, 1, 40)
    assert (slow.updates, slow.merged, slow.discarded, slow.steps) == (1, 1, 0, 10)
    assert (fast.bytes_up, fast.bytes_down, slow.bytes_down) == (800, 400, 400)
    assert fast.pace == pytest.approx(40 / (0.8 + 1.0))
    assert slow.pace == pytest.approx(10 / 2.0)
    assert (fast.restarts, slow.restarts) == (0, 1)


def test_mean_staleness_counts_merged_updates_only() -> None:
    history = History.of(rows())
    assert history.clients["slow"].mean_staleness == 1.0
    assert history.clients["fast"].mean_staleness == 0.0


def test_mean_staleness_is_over_all_merges_of_a_client() -> None:
    history = History.of(rows())
    history.append(update(4.0, "slow", "o3", 10, 1.0))
    history.append(
        {"t": 4.0, "kind": "aggregate", "version": 6, "items": [["o3.0", 1.0]],
         "staleness": {"o3.0": 4}}
    )  # fmt: skip
    assert history.clients["slow"].mean_staleness == (1 + 4) / 2


def test_series_follow_time_and_version() -> None:
    history = History.of(rows())
    assert history.series("accuracy") == [Point(1.3, 1, 0.5), Point(2.3, 2, 0.75)]
    assert history.series("f1") == []
    assert history.latest("loss") == 1.0
    assert history.latest("f1") is None
    assert (history.version, history.now, history.finished) == (2, 3.0, "2 versions done")


def test_a_run_has_lasted_until_its_last_version_was_made() -> None:
    """The run is over when that is begun: then nothing more is asked for."""
    history = History.of(rows())
    assert history.ended == 3.0
    history.append({"t": 3.5, "kind": "merged", "version": 3, "stats": {}})
    history.append({"t": 4.0, "kind": "evaluated", "version": 3, "metrics": {"accuracy": 0.8}})
    assert (history.ended, history.finished) == (3.5, "2 versions done")


def test_target_is_reached_at_its_first_evaluation() -> None:
    history = History.of(rows())
    assert history.seconds_to("accuracy", 0.5) == 1.3
    assert history.seconds_to("accuracy", 0.51) == 2.3
    assert history.seconds_to("accuracy", 0.9) is None


def test_spans_know_their_beginning_end_and_fate() -> None:
    spans = {s.order: s for s in History.of(rows()).spans}
    assert (spans["o0"].start, spans["o0"].end, spans["o0"].staleness) == (0.1, 1.1, 0)
    assert (spans["o1"].end, spans["o1"].staleness) == (2.1, 1)
    assert (spans["o2"].staleness, spans["o2"].reason) == (None, "not a number")
    assert (spans["o3"].update, spans["o3"].end, spans["o3"].reason) == (
        None, 3.0, "the run is over",
    )  # fmt: skip


def test_a_new_order_ends_the_one_that_was_dropped() -> None:
    history = History.of(rows()[:4])
    history.append(
        {"t": 5.0, "kind": "train", "client": "slow", "order": "o9", "steps": 1, "version": 0}
    )
    dropped = next(s for s in history.spans if s.order == "o1")
    assert (dropped.end, dropped.reason) == (5.0, "its order was closed")
    assert history.open["slow"].order == "o9"


def test_a_result_that_comes_after_its_client_left_is_still_counted() -> None:
    history = History.of(rows()[:6])
    history.append({"t": 1.0, "kind": "leave", "client": "slow", "reason": "lease ended"})
    assert not history.clients["slow"].here
    assert "slow" not in history.open
    history.append(update(1.5, "slow", "o1", 10, 1.0))
    span = next(s for s in history.spans if s.order == "o1")
    assert (span.update, span.end, history.clients["slow"].updates) == ("o1.0", 1.5, 1)


def test_a_snapshot_leaves_its_order_open() -> None:
    history = History.of(rows()[:6])
    history.append({**update(0.5, "fast", "o0", 5, 0.4), "final": False})
    assert history.open["fast"].order == "o0"


def test_an_order_older_than_the_history_gets_its_span_from_the_update() -> None:
    history = History.of([update(2.0, "fast", "o0", 20, 0.5)])
    assert [(s.order, s.start, s.end) for s in history.spans] == [("o0", 0.1, 2.0)]


def test_a_group_keeps_its_first_row_as_its_opening() -> None:
    group = {"kind": "group", "group": "g1", "arrival": 4.0, "latest": 5.0}
    history = History.of(
        [
            {"t": 1.0, **group, "members": ["fast"]},
            {"t": 2.0, **group, "members": ["fast", "slow"]},
        ]
    )
    assert (history.groups["g1"].opened, history.groups["g1"].members) == (1.0, ("fast", "slow"))


def test_seconds_left_follow_an_error_that_shrinks_by_the_same_factor() -> None:
    """Error 0.5 * exp(-0.1 t): 1 - 0.95 is reached at ln(10) / 0.1."""
    points: list[Row] = [
        {"t": t, "kind": "evaluated", "version": t,
         "metrics": {"accuracy": 1 - 0.5 * math.exp(-0.1 * t)}}
        for t in range(10)
    ]  # fmt: skip
    left = History.of(points).seconds_left("accuracy", 0.95)
    assert left == pytest.approx(math.log(10) / 0.1 - 9)


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ([0.5, 0.6], 0.9, None),
        ([0.5, 0.5, 0.5], 0.9, None),
        ([0.7, 0.6, 0.5], 0.9, None),
        ([0.5, 0.6, 0.7], 1.0, None),
        ([0.5, 0.6, 0.95], 0.9, 0.0),
        ([], 0.9, None),
    ],
)
def test_seconds_left_say_nothing_where_nothing_can_be_said(
    values: list[float], target: float, expected: float | None
) -> None:
    points: list[Row] = [
        {"t": t, "kind": "evaluated", "version": t, "metrics": {"accuracy": v}}
        for t, v in enumerate(values)
    ]
    assert History.of(points).seconds_left("accuracy", target) == expected


def test_a_file_gives_back_the_same_history_and_forgives_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"".join(map(line, rows())) + b'{"t": 3.1, "ki')
    assert History.read(path) == History.of(rows())


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(line(rows()[0]) + b"{]\n" + line(rows()[1]))
    with pytest.raises(ValueError, match=r"history\.jsonl:2: not JSON"):
        History.read(path)
    path.write_text('{"t": 1.0}\n')
    with pytest.raises(ValueError, match="has t and kind"):
        History.read(path)
    path.write_bytes(line(rows()[0]) + b'{"t": 1.0, "kind": "join"}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl:2: not a whole row: KeyError"):
        History.read(path)


def test_what_is_not_finite_is_written_as_null_and_left_out_of_series() -> None:
    row = {"t": 1.0, "kind": "evaluated", "version": 1, "metrics": {"loss": math.nan}}
    assert line(row) == b'{"t":1.0,"kind":"evaluated","version":1,"metrics":{"loss":null}}\n'
    history = History.of([{"t": 1.0, "kind": "evaluated", "version": 1, "metrics": {"loss": None}}])
    assert history.series("loss") == []


def test_an_unknown_kind_is_kept_and_counts_for_nothing() -> None:
    history = History.of([{"t": 1.0, "kind": "weather", "sky": "blue"}])
    assert (len(history.rows), history.clients, history.now) == (1, {}, 1.0)


def test_an_empty_history_has_no_past() -> None:
    history = History()
    assert (history.now, history.version, history.spans) == (0.0, 0, [])


def test_totals_are_those_of_the_history_and_do_not_grow_with_the_run() -> None:
    """A server kept each row: 0.6 kB, for as long as it ran."""
    totals, history = Totals(), History()
    for number in range(50):
        order = f"o{number}"
        for row in (
            {"t": number, "kind": "train", "client": "a", "order": order, "steps": 2, "version": 0},
            {"t": number, "kind": "started", "order": order, "bytes": 7},
            update(number + 0.5, "a", order, 2, 0.25),
            merge(number, order, 1 if number % 5 == 0 else 0, lost=number % 7 == 0),
            {"t": number, "kind": "merged", "version": number, "stats": {"epsilon": 0.1 * number},
             "dropped": [[f"{order}.0", "bad"]] if number % 3 == 0 else []},
            {"t": number, "kind": "evaluated", "version": number, "metrics": {"loss": 1.0}},
        ):  # fmt: skip
            totals.append(row)
            history.append(row)
    assert totals.clients == history.clients
    assert totals.epsilon == history.epsilon == 0.1 * 49
    a = totals.clients["a"]
    assert (a.updates, a.merged + a.discarded, a.bytes_down) == (50, 50, 350)
    sizes = {name: len(kept) for name, kept in vars(totals).items() if isinstance(kept, dict)}
    assert max(sizes.values()) == 1, sizes


def merge(number: int, order: str, staleness: int, lost: bool) -> Row:
    if lost:
        return {"t": number, "kind": "discard", "update": f"{order}.0", "reason": "late"}
    return {
        "t": number, "kind": "aggregate", "version": number, "items": [[f"{order}.0", 1.0]],
        "staleness": {f"{order}.0": staleness},
    }  # fmt: skip
