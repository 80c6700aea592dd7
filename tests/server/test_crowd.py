"""The clients of a simulation: as many, as fast, as far and as mortal as the options say."""

import math

import pytest

from atoll.protocols.errors import AtollError
from atoll.server.crowd import bandwidth_of, clients_of, dropout_of, size_of


def given(**options: object) -> dict[str, object]:
    unset = {"clients": None, "speeds": None, "pace": 0.1, "change": None}
    return {**unset, "bandwidth": "", "dropout": "", **options}


def test_four_clients_by_default_and_a_crowd_where_a_number_is_given() -> None:
    assert [c.seconds_per_step for c in clients_of(given(), 0)] == [0.1, 0.1, 0.05, 0.025]
    crowd = clients_of(given(clients=50), 0)
    assert len({c.seconds_per_step for c in crowd}) == 50


@pytest.mark.parametrize("count", [-1, 0, 1_000_001, 10**20])
def test_a_crowd_has_a_size_that_a_machine_can_hold(count: int) -> None:
    """10**20 clients were being made until the memory was full."""
    with pytest.raises(AtollError, match=f"FL-S108: --clients {count} .give from 1 to 1000000"):
        clients_of(given(clients=count), 0)


def test_speeds_may_be_written_as_in_the_demo() -> None:
    assert clients_of(given(speeds="1,4", pace=0.2), 0) == clients_of(
        given(speeds="speeds:1,4", pace=0.2, clients=2), 0
    )


@pytest.mark.parametrize("speeds", ["exp", "lognormal:0.6"])
def test_change_is_passed_on_to_every_client(speeds: str) -> None:
    crowd = clients_of(given(clients=3, speeds=speeds, change=0.25), 0)
    assert [c.change for c in crowd] == [0.25] * 3
    assert all(c.draw is not None for c in crowd)


def test_every_client_has_the_bandwidth_and_the_life_that_were_given() -> None:
    one, *_ = clients_of(given(bandwidth="down=16mbit,up=1MB", dropout="600,30"), 0)
    assert (one.down, one.up, one.uptime, one.downtime) == (2e6, 1e6, 600.0, 30.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("5 kB", 5000), ("100MB", 1e8), ("1.5gb", 1.5e9), ("20mbit", 2.5e6), ("8kbit", 1e3)],
)
def test_sizes_have_units_of_1000(text: str, size: float) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "fast", "5 parsec", "-1MB", "0", "inf", "MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(AtollError, match="no size or rate"):
        size_of(text)


def test_nothing_given_is_no_limit() -> None:
    assert bandwidth_of("") == (math.inf, math.inf)
    assert bandwidth_of("up=1MB") == (math.inf, 1e6)
    assert dropout_of("") == (math.inf, 60.0)
    assert dropout_of("5") == (5.0, 60.0)


@pytest.mark.parametrize("text", ["sideways=1mbit", "up=1mbit,up=2mbit", "up=1mbit,2mbit"])
def test_a_way_is_up_or_down_and_stands_once(text: str) -> None:
    with pytest.raises(AtollError, match=f"FL-S108: --bandwidth '{text}'"):
        bandwidth_of(text)
