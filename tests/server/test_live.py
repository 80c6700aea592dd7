"""The live table: golden text of a view, views of a history, and lines where nothing redraws."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from atoll.server.history import History
from atoll.server.live import (
    ClientView,
    GroupView,
    Live,
    LiveView,
    event_line,
    render,
    sparkline,
    view,
)
from atoll.server.totals import Row


def drawn(shown: LiveView, width: int) -> str:
    screen = Console(file=io.StringIO(), width=width, no_color=True)
    screen.print(render(shown, width))
    assert isinstance(screen.file, io.StringIO)
    return "\n".join(line.rstrip() for line in screen.file.getvalue().splitlines())


MOMENT = LiveView(
    title="digits  fedcompass  iid",
    now=9.7,
    version=13,
    loss=0.4055,
    accuracy=0.852,
    accuracies=(0.2, 0.5, 0.7, 0.8, 0.852),
    target=0.95,
    left=5.6,
    group=GroupView("g14", members=2, arrived=1, arrival=10.4, latest=10.6),
    clients=(
        ClientView("c1", "training", "", 4.0, 40, 80, 13, 9, 700, 0.44, 180_000, 200_000),
        ClientView("c2", "sending", "", 2.0, 40, 40, 13, 9, 350, 0.44, 180_000, 200_000),
        ClientView("c3", "restarting", "killed by signal 9", 1.0, 0, 0, None, 4, 160, 2.0,
                   80_000, 100_000, 1),
        ClientView("c4", speed=1.0),
    ),
)  # fmt: skip


def test_a_moment_at_96_columns() -> None:
    assert (
        drawn(MOMENT, 96)
        == """\
 v13  9.7s  digits  fedcompass  iid   loss 0.4055   accuracy 0.852 ▁▄▅▆▇
   client speed steps                  base  updates  stale       up     down   state
 ▶ c1        4x ━━━━━━╌╌╌╌╌╌╌  40/80    v13        9    0.4   180 kB   200 kB   training
 ↑ c2        2x ━━━━━━━━━━━━━  40/40    v13        9    0.4   180 kB   200 kB   sending
 ↻ c3        1x ╌╌╌╌╌╌╌╌╌╌╌╌╌                      4    2.0  80.0 kB   100 kB   restarting: kil…
 ○ c4        1x ╌╌╌╌╌╌╌╌╌╌╌╌╌                      0             0 B      0 B   starting
 group g14 1/2 arrived, expected in 0.7s, closes in 0.9s   target 0.95 in about 5.6s"""
    )


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = drawn(MOMENT, width).splitlines()
    assert len(lines) == 7
    assert max(len(line) for line in lines) <= width


def test_narrow_terminals_lose_bytes_first_then_staleness() -> None:
    assert "down" in drawn(MOMENT, 96)
    assert "down" not in drawn(MOMENT, 95)
    assert "stale" in drawn(MOMENT, 80)
    assert "stale" not in drawn(MOMENT, 79)


def test_a_long_name_does_not_push_the_columns() -> None:
    long = replace(MOMENT, clients=(ClientView("hospital-of-the-longest-name"),))
    assert "hospital-of-the-lon…" in drawn(long, 100)


def test_the_end_says_why() -> None:
    text = drawn(replace(MOMENT, finished="accuracy 0.95 reached", group=None), 100)
    assert text.endswith(" finished: accuracy 0.95 reached")


def test_without_group_and_target_the_foot_says_so() -> None:
    text = drawn(LiveView(clients=MOMENT.clients), 100)
    assert text.endswith(" no arrival group")
    assert "accuracy" not in text


def test_a_clients_name_cannot_draw_on_the_terminal() -> None:
    evil = LiveView(clients=(ClientView("a\x1b[2Jb", reason="x\ny"),))
    text = drawn(evil, 100)
    assert "\x1b" not in text
    assert "ab" in text
    assert "starting: x y" in text


def rows() -> list[Row]:
    group = {"kind": "group", "group": "g0", "arrival": 2.0, "latest": 2.4}
    return [
        {"t": 0.0, "kind": "join", "client": "c1", "examples": 1000},
        {"t": 0.0, "kind": "join", "client": "c2", "examples": 500},
        {"t": 0.0, "kind": "train", "client": "c1", "order": "o0", "steps": 40, "version": 0},
        {"t": 0.0, "kind": "train", "client": "c2", "order": "o1", "steps": 20, "version": 0},
        {"t": 0.0, **group, "members": ["c1", "c2"]},
        {"t": 0.1, "kind": "started", "order": "o0", "bytes": 400},
        {"t": 1.9, "kind": "update", "client": "c1", "order": "o0", "update": "o0.0", "steps": 40,
         "base": 0, "train_seconds": 1.7, "started": 0.1, "bytes": 400, "metrics": {}},
    ]  # fmt: skip


def merge(*updates: str) -> list[Row]:
    return [
        {"t": 2.4, "kind": "aggregate", "version": 1, "items": [[u, 1.0] for u in updates],
         "staleness": dict.fromkeys(updates, 0)},
        {"t": 2.5, "kind": "merged", "version": 1, "stats": {}},
        {"t": 2.6, "kind": "evaluated", "version": 1, "metrics": {"accuracy": 0.5, "loss": 1.25}},
    ]  # fmt: skip


def test_a_view_knows_who_trains_and_who_waits_in_the_group() -> None:
    shown = view(History.of(rows()), now=2.0, progress={"c2": 15}, speeds={"c1": 2.0, "c3": 1.0})
    c1, c2, c3 = shown.clients
    assert (c1.state, c1.updates, c1.speed, c1.ordered) == ("waiting", 1, 2.0, 0)
    assert (c2.state, c2.done, c2.ordered, c2.version) == ("training", 15, 20, 0)
    assert (c3.name, c3.state) == ("c3", "starting")
    assert shown.group == GroupView("g0", 2, 1, 2.0, 2.4)


def test_all_steps_done_and_no_result_yet_is_sending() -> None:
    (_, c2) = view(History.of(rows()), progress={"c2": 20}).clients
    assert c2.state == "sending"


def test_a_group_merged_at_its_deadline_is_shown_no_longer() -> None:
    history = History.of([*rows(), *merge("o0.0")])
    assert history.groups["g0"].closed == 2.4
    shown = view(history, target=0.9)
    assert shown.group is None
    assert (shown.version, shown.loss, shown.accuracy, shown.left) == (1, 1.25, 0.5, None)


def test_a_merge_before_the_deadline_leaves_a_group_open_while_members_train() -> None:
    early = [{**row, "t": 1.95} for row in merge("o0.0")[:1]]
    assert History.of([*rows(), *early]).groups["g0"].closed is None


def test_a_group_nobody_arrived_for_disappears_after_its_deadline() -> None:
    assert view(History.of(rows()[:5]), now=2.41).group is None


def test_who_left_is_gone_and_at_the_end_all_are_done() -> None:
    left: Row = {"t": 2.0, "kind": "leave", "client": "c2", "reason": "lease ended"}
    over: Row = {"t": 3.0, "kind": "finish", "reason": "over"}
    history = History.of([*rows(), left])
    assert [c.state for c in view(history).clients] == ["waiting", "gone"]
    history.append(over)
    assert [c.state for c in view(history).clients] == ["done", "gone"]


def test_what_the_caller_knows_better_wins() -> None:
    shown = view(History.of(rows()), states={"c1": ("restarting", "killed")})
    assert (shown.clients[0].state, shown.clients[0].reason) == ("restarting", "killed")
    assert shown.clients[1].state == "training"


@pytest.mark.parametrize(
    ("values", "width", "top", "expected"),
    [
        ((), 5, None, ""),
        ((1.0,), 5, None, "▁"),
        ((0.0, 0.5, 1.0), 5, None, "▁▅█"),
        ((0.0, 0.0, 0.5, 1.0), 2, None, "▁█"),
        ((0.0, 0.5), 5, 1.0, "▁▅"),
        ((1.0, 1.0), 0, None, ""),
    ],
)
def test_sparklines(
    values: tuple[float, ...], width: int, top: float | None, expected: str
) -> None:
    assert sparkline(values, width, top) == expected


def test_every_kind_that_matters_has_its_line() -> None:
    told = [event_line(row) for row in [*rows(), *merge("o0.0")]]
    assert [line for line in told if line] == [
        "    0.00s  c1 joined with 1,000 examples",
        "    0.00s  c2 joined with 500 examples",
        "    1.90s  c1 sent 40 steps on v0, 400 B",
        "    2.50s  v1 merged",
        "    2.60s  v1 accuracy 0.5 loss 1.25",
    ]
    assert event_line({"t": 3.0, "kind": "restart", "client": "c1"}) == "    3.00s  c1 restarted"
    assert event_line({"t": 3.0, "kind": "leave", "client": "c1", "reason": "bye"}) == (
        "    3.00s  c1 left: bye"
    )
    assert event_line({"t": 3.0, "kind": "discard", "update": "o1.0", "reason": "late"}) == (
        "    3.00s  o1.0 discarded: late"
    )
    assert event_line({"t": 3.0, "kind": "finish", "reason": "over"}) == "    3.00s  finished: over"
    nothing: Row = {"t": 3.0, "kind": "evaluated", "version": 1, "metrics": {"loss": None}}
    assert event_line(nothing) == "    3.00s  v1 loss -"


def test_where_stderr_is_no_terminal_rows_become_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Live() as live:
        live.row(rows()[0])
        live.row(rows()[2])
        live.show(MOMENT)
        live.say("hello")
    assert capsys.readouterr() == ("", "    0.00s  c1 joined with 1,000 examples\nhello\n")


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Live(quiet=True) as live:
        live.row(rows()[0])
        live.show(MOMENT)
        live.say("hello")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_view_is_redrawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Live() as live:
        live.row(rows()[0])
        live.say("before")
        assert capsys.readouterr().err == "before\n"
        live.show(MOMENT)
        live.say("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello" in err
    assert "v13" in err
    assert "joined" not in err
