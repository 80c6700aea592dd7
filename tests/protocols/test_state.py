"""The state dump: what comes back is equal, equal states are equal text, nothing else is read."""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols import state
from atoll.protocols.events import (
    Aggregate,
    ClientInfo,
    ClientJoined,
    Discard,
    Merged,
    Train,
    Update,
    UpdateReceived,
)
from atoll.protocols.state import Json


@dataclass(frozen=True)
class Item:
    id: str
    weight: float


@dataclass
class Machine:
    size: int
    mode: Literal["fast", "slow"] = "fast"
    deadline: float = math.inf
    idle: set[str] = field(default_factory=set)
    items: list[Item] = field(default_factory=list)
    weights: dict[int, float] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pair: tuple[int, str] | None = None
    version: int = field(default=0, init=False)
    helper: object = field(default=None, metadata={"stored": False})


numbers = st.floats(allow_nan=False)
machines = st.builds(
    Machine,
    size=st.integers(),
    mode=st.sampled_from(["fast", "slow"]),
    deadline=numbers,
    idle=st.sets(st.text()),
    items=st.lists(st.builds(Item, st.text(), numbers)),
    weights=st.dictionaries(st.integers(), numbers),
    names=st.dictionaries(st.text(), st.tuples(st.text(), st.text())),
    pair=st.none() | st.tuples(st.integers(), st.text()),
)


@given(machines)
def test_what_is_dumped_comes_back_equal(machine: Machine) -> None:
    machine.version = 3
    assert state.loads(Machine, state.dumps(machine)) == machine


@given(machines, numbers)
def test_the_text_is_that_of_the_dump(machine: Machine, number: float) -> None:
    """Whichever way it is written: what orjson cannot tell apart or will not take goes another."""
    machine.helper = object()
    assert json.loads(state.dumps(machine)) == state.dump(machine)
    item = Item("null", number)
    assert json.loads(state.dumps((item, frozenset({2, 1})))) == state.dump((item, {2, 1}))
    assert state.dumps(types.MappingProxyType({"a": 1e-7, "b": 0.1})) == '{"a":1e-7,"b":0.1}'


@given(st.text(), st.dictionaries(st.text(), numbers), st.sampled_from([None, math.inf, 1.5]))
def test_values_are_written_as_machines_are(
    name: str, shares: dict[str, float], pace: object
) -> None:
    """Events and actions go the quick way: a journal must not tell how it was written."""
    wrapped = types.MappingProxyType(shares)
    info = ClientInfo(1, pace, (name,))  # type: ignore[arg-type]
    update = Update(name, "o1", "c", 1, 2, 3, 0.5, 1e-7, wrapped, True)
    events = (UpdateReceived(update), ClientJoined(name, info), Merged(1, (name,), (), shares))
    actions = (Aggregate(((name, 0.1),)), Train(name, 1, shares), Discard(name, "late"))
    for one in (*events, *actions, {"sections": (Item(name, 1.0),)}, frozenset({name})):
        assert state.dumps_values(one) == state.dumps(one)
    assert state.dumps_values({1: shares}) == state.dumps({1: shares})
    with pytest.raises(TypeError, match="object cannot be part"):
        state.dumps_values(object())


@given(machines)
def test_a_machine_can_be_restored_in_place(machine: Machine) -> None:
    other = Machine(0)
    state.restore(other, state.dump(machine))
    assert other == machine
    assert state.dumps(other) == state.dumps(machine)


def test_equal_sets_are_equal_text_whatever_their_order() -> None:
    some = state.dumps(Machine(1, idle={"a", "b", "c"}))
    assert some == state.dumps(Machine(1, idle={"c", "b", "a"}))
    assert '"idle":["a","b","c"]' in some


def test_infinities_are_written_as_strings() -> None:
    assert state.dump([math.inf, -math.inf, math.nan, 1.5]) == ["inf", "-inf", "nan", 1.5]


def test_keys_that_are_no_strings_are_written_as_pairs() -> None:
    assert state.dump({1: 0.5}) == [[1, 0.5]]
    assert state.dump({"a": 0.5}) == {"a": 0.5}
    assert state.load(Machine, good(weights={})).weights == {}


def test_a_float_field_takes_an_integer_and_keeps_its_type() -> None:
    made = state.load(Machine, good(deadline=3))
    assert type(made.deadline) is float


def test_fields_that_are_not_stored_stay_as_they_are() -> None:
    machine = Machine(1, helper=[1])
    assert isinstance(state.dump(machine), dict)
    assert "helper" not in state.dumps(machine)
    state.restore(machine, good(size=2))
    assert (machine.size, machine.helper) == (2, [1])


def test_a_field_of_any_type_takes_the_json_as_it_is() -> None:
    @dataclass
    class Open:
        anything: object

    assert state.load(Open, {"anything": [1, {"a": None}]}).anything == [1, {"a": None}]


def good(**changes: Json) -> dict[str, Json]:
    data = state.dump(Machine(1))
    assert isinstance(data, dict)
    return {**data, **changes}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"size": "1"}, r"Machine\.size: expected int, got '1'"),
        ({"size": True}, r"Machine\.size: expected int, got True"),
        ({"mode": "quick"}, r"Machine\.mode: 'quick' is not one of"),
        ({"deadline": "soon"}, r"Machine\.deadline: expected a number"),
        ({"deadline": True}, r"Machine\.deadline: expected a number"),
        ({"idle": "ab"}, r"Machine\.idle: expected a list"),
        ({"idle": [1]}, r"Machine\.idle\[\]: expected str"),
        ({"items": [{"id": "a"}]}, r"Machine\.items\[\]: "),
        ({"items": [{"id": "a", "weight": 1, "x": 2}]}, r"unknown field 'x'"),
        ({"items": [3]}, r"Machine\.items\[\]: expected an object"),
        ({"weights": {"1": 0.5}}, r"Machine\.weights: expected pairs"),
        ({"weights": [[1]]}, r"Machine\.weights: expected a pair"),
        ({"weights": [["1", 0.5]]}, r"Machine\.weights\{\}: expected int"),
        ({"names": [["a", []]]}, r"Machine\.names: expected an object"),
        ({"names": {"a": "b"}}, r"Machine\.names\[a\]: expected a list"),
        ({"pair": [1]}, r"Machine\.pair: \[1\] is none of"),
        ({"surprise": 1}, r"Machine: unknown field 'surprise'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Json], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        state.load(Machine, good(**changes))


def test_a_missing_field_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'size'"):
        state.load(Machine, {"mode": "fast"})
    with pytest.raises(ValueError, match=r"^Machine\.size: expected int, got '1'"):
        state.restore(Machine(1), good(size="1"))
    with pytest.raises(ValueError, match=r"Machine\.size: missing"):
        state.restore(Machine(1), {"mode": "fast"})
    with pytest.raises(ValueError, match="expected an object"):
        state.restore(Machine(1), [])


def test_what_cannot_be_state_is_refused_when_written_and_when_read() -> None:
    with pytest.raises(TypeError, match="object cannot be part"):
        state.dump(object())
    with pytest.raises(TypeError, match="type cannot be part"):
        state.dump(Machine)

    @dataclass
    class Odd:
        made: complex

    with pytest.raises(TypeError, match="complex"):
        state.load(Odd, {"made": 1})
