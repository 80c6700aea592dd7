"""Models of clients: their draws, absences, traces and specs."""

import itertools
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.protocols.errors import DataError, UsageError
from atoll.server.world import (
    LEAST,
    Absence,
    ClientModel,
    Draw,
    Pace,
    at_paces,
    crowd,
    exponential,
    homogeneous,
    lognormal,
    normal,
    parse,
    speed_change,
    trace,
)

MANY = 4000


def draws(draw: Draw) -> list[float]:
    rng = random.Random(1)
    return [draw(rng) for _ in range(MANY)]


def paces(model: ClientModel, orders: int, seed: int = 0) -> list[float]:
    pace = Pace(model, seed)
    return [pace.next_order() for _ in range(orders)]


# ---- distributions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "deviation"),
    [
        (homogeneous(2.0), 0.0),
        (normal(2.0), 0.6),
        (exponential(2.0), 2.0),
        (lognormal(2.0, 0.6), 2.0 * math.sqrt(math.exp(0.36) - 1)),
    ],
)
def test_a_distribution_has_its_mean_and_spread_and_is_positive(
    draw: Draw, deviation: float
) -> None:
    values = draws(draw)
    assert statistics.fmean(values) == pytest.approx(2.0, abs=4 * deviation / math.sqrt(MANY))
    assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.1)
    assert min(values) > 0


def test_a_wide_normal_is_drawn_again_until_it_is_positive() -> None:
    assert min(draws(normal(1.0, spread=3.0))) >= LEAST


def test_the_noise_of_an_order_is_five_percent_of_the_clients_own_mean() -> None:
    (model,) = crowd(1, homogeneous(0.2))
    values = paces(model, MANY)
    assert statistics.fmean(values) == pytest.approx(0.2, rel=0.01)
    assert statistics.pstdev(values) == pytest.approx(0.01, rel=0.1)


def test_no_noise_makes_a_pace_zero_or_negative() -> None:
    assert min(paces(ClientModel("a", 1.0, noise=5.0), 200)) == LEAST


def test_a_client_draws_the_same_whoever_else_is_there() -> None:
    few, many = crowd(2, exponential(1.0)), crowd(9, exponential(1.0))
    assert few == many[:2]
    assert paces(few[1], 20) == paces(many[1], 20)
    assert paces(few[0], 20) != paces(few[1], 20)
    assert paces(few[0], 20, seed=1) != paces(few[0], 20, seed=0)


def test_names_sort_as_numbers_do() -> None:
    names = [model.name for model in crowd(11, homogeneous(1.0))]
    assert (names[0], names[-1]) == ("c00", "c10")
    assert names == sorted(names)


def test_a_speed_changes_with_its_probability_and_not_before_the_first_order() -> None:
    (model,) = speed_change([ClientModel("a", 7.0)], 0.1, exponential(1.0))
    values = paces(model, MANY)
    assert paces(replace(model, change=1.0), 3)[0] == values[0] == 7.0
    changes = sum(a != b for a, b in itertools.pairwise(values))
    assert changes == pytest.approx(0.1 * MANY, abs=4 * math.sqrt(0.09 * MANY))


def test_without_a_change_a_pace_stays() -> None:
    assert set(paces(at_paces({"a": 0.5})[0], 10)) == {0.5}


# ---- absences --------------------------------------------------------------------------------


def test_planned_absences_come_in_order_and_then_no_more() -> None:
    first, second = Absence(1.0, 2.0), Absence(5.0, 6.0, "offline")
    pace = Pace(ClientModel("a", 1.0, absences=(first, second)), 0)
    assert pace.next_absence(0.0) == first
    assert pace.next_absence(2.0) == second
    assert pace.next_absence(6.0) is None


def test_absences_by_chance_have_their_mean_times() -> None:
    pace = Pace(ClientModel("a", 1.0, uptime=100.0, downtime=10.0), 0)
    now, up, down = 0.0, [], []
    for _ in range(MANY):
        away = pace.next_absence(now)
        assert away is not None
        assert away.how == "dead"
        up.append(away.at - now)
        down.append(away.until - away.at)
        now = away.until
    assert statistics.fmean(up) == pytest.approx(100.0, rel=0.06)
    assert statistics.fmean(down) == pytest.approx(10.0, rel=0.06)


def test_a_planned_absence_during_one_by_chance_prolongs_it() -> None:
    planned = (Absence(5000.0, 9000.0), Absence(99999.0, math.inf))
    model = ClientModel("a", 1.0, absences=planned, uptime=1.0, downtime=1e5)
    away = Pace(model, 0).next_absence(4000.0)
    assert away is not None
    assert away.at < 5000.0
    assert away.until >= 9000.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Absence(2.0, 2.0),
        lambda: Absence(-1.0, 2.0),
        lambda: ClientModel("a", 0.0),
        lambda: ClientModel("a", math.nan),
        lambda: ClientModel("a", 1.0, up=0.0),
        lambda: ClientModel("a", 1.0, latency=-1.0),
        lambda: ClientModel("a", 1.0, change=1.5),
        lambda: ClientModel("a", 1.0, trace=(1.0, 0.0)),
        lambda: ClientModel("a", 1.0, absences=(Absence(1.0, 5.0), Absence(4.0, 6.0))),
    ],
)
def test_what_no_client_can_be_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(UsageError) as refused:
        make()
    assert refused.value.code == "FL-S102"


# ---- traces ----------------------------------------------------------------------------------


def test_a_trace_is_repeated_from_its_start() -> None:
    first, second = trace([[1.0, 3.0], [2.0]])
    assert (first.name, first.seconds_per_step) == ("c0", 2.0)
    assert paces(first, 5) == [1.0, 3.0, 1.0, 3.0, 1.0]
    assert paces(second, 2) == [2.0, 2.0]


def test_a_trace_is_read_from_json_with_or_without_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"fast": [0.1], "slow": [1, 2]}))
    (tmp_path / "b.json").write_text(json.dumps([[0.1], [1, 2]]))
    assert [(m.name, m.trace) for m in trace(tmp_path / "a.json")] == [
        ("fast", (0.1,)),
        ("slow", (1.0, 2.0)),
    ]
    assert [m.name for m in parse(f"trace:{tmp_path / 'b.json'}")] == ["c0", "c1"]


def test_the_history_of_a_run_is_a_trace(tmp_path: Path) -> None:
    rows = [
        {"t": 0.0, "kind": "join", "client": "a", "examples": 3},
        {"t": 2.0, "kind": "update", "client": "a", "steps": 20, "train_seconds": 1.0},
        {"t": 3.0, "kind": "update", "client": "a", "steps": 0, "train_seconds": 0.0},
        {"t": 4.0, "kind": "update", "client": "b", "steps": 10, "train_seconds": 4.0},
        {"t": 5.0, "kind": "update", "client": "a", "steps": 10, "train_seconds": 1.0},
    ]
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert {m.name: m.trace for m in trace(path)} == {"a": (0.05, 0.1), "b": (0.4,)}


@pytest.mark.parametrize("text", ["{", "3", '{"a": 3}', '{"a": ["x"]}', '{"a": []}', "\xba"])
def test_a_file_that_is_no_trace_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text, "latin-1")
    with pytest.raises(DataError) as refused:
        trace(tmp_path / "t.json")
    assert refused.value.code == "FL-D102"


def test_a_trace_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        trace(str(tmp_path / "nowhere.json"))


# ---- specs -----------------------------------------------------------------------------------


def test_speeds_are_relative_throughputs() -> None:
    models = parse("speeds:1,1,2,4", mu=0.2)
    assert [(m.name, m.seconds_per_step) for m in models] == [
        ("c0", 0.2),
        ("c1", 0.2),
        ("c2", 0.1),
        ("c3", 0.05),
    ]


@pytest.mark.parametrize(
    ("spec", "draw"),
    [
        ("homogeneous", homogeneous(0.3)),
        ("homo", homogeneous(0.3)),
        ("normal", normal(0.3)),
        ("normal:0.1", normal(0.3, 0.1)),
        ("exp", exponential(0.3)),
        ("exponential", exponential(0.3)),
        ("lognormal:0.9", lognormal(0.3, 0.9)),
        ("lognormal", lognormal(0.3, 0.6)),
    ],
)
def test_a_spec_names_a_distribution(spec: str, draw: Draw) -> None:
    assert parse(spec, clients=5, mu=0.3, seed=2) == crowd(5, draw, 2)


def test_a_spec_may_let_speeds_change() -> None:
    models = parse("lognormal:0.6,change=0.2", clients=3)
    assert all(m.change == 0.2 and m.draw is not None for m in models)
    assert len(set(paces(models[0], 50))) == 50
    assert parse("exp:change=0")[0].draw is None


@pytest.mark.parametrize(
    ("spec", "code", "said"),
    [
        ("gamma", "FL-S101", "'gamma'"),
        ("exp:0.5", "FL-S101", "'exp:0.5'"),
        ("speeds:1,x", "FL-S102", "'x'"),
        ("speeds:1,0", "FL-S102", "'0'"),
        ("speeds:", "FL-S102", "''"),
        ("lognormal:-1", "FL-S102", "'-1'"),
        ("exp:change=2", "FL-S102", "change=2"),
        ("exp:chance=0.1", "FL-S102", "'chance'"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_what_is_known(
    spec: str, code: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        parse(spec)
    assert refused.value.code == code
    assert refused.value.hint
