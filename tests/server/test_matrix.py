"""Matrix: every two parts together once, in the simulator, and what must hold whatever the mix.

The names come from the catalogue, so a part that is added takes its place by itself. A mix that the
check at start refuses is left out; each part must be in some mix that it does not.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from atoll.aggregation.compose import check
from atoll.client.data import load_data
from atoll.client.local import LocalConfig
from atoll.protocols import state
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Action,
    Aggregate,
    Discard,
    Event,
    Merged,
    Update,
    UpdateReceived,
)
from atoll.protocols.facts import Facts
from atoll.server import catalogue, simulate
from atoll.server.check import made_of, of_part, strategy_of
from atoll.server.rules import Rules
from atoll.server.simulation import Simulation
from atoll.server.spec import RunSpec
from atoll.server.training import Training
from atoll.server.world import Absence, ClientModel

Row = tuple[str, ...]  # a spec for each slot

SLOTS = ("strategy", "aggregator", "outer", "algorithm", "codec_up")
KINDS = ("strategy", "aggregator", "outer", "local algorithm", "codec")
SMALL = {"steps": 3, "min_steps": 2, "max_steps": 5, "size": 5, "min_results": 3, "min_clients": 5}
SPECS = {  # name -> how it is written here, where its name alone is not enough
    "fedasync": "fedasync:steps=3",
    "fedlaw": "fedlaw:epochs=2",
}
VERSIONS = 3
DATA = load_data("synthetic:examples=120,features=6,classes=3", 0)
PROXY = load_data("synthetic:examples=60,features=6,classes=3,seed=9")  # for parts that learn
CLIENTS = [
    ClientModel("a", 0.10),
    ClientModel("b", 0.13, absences=(Absence(0.2, 0.9), Absence(2.0, 30.0, "offline"))),
    ClientModel("c", 0.20, joins=0.1),
    ClientModel("d", 0.25, noise=0.1),
    ClientModel("e", 0.40, absences=(Absence(1.1, 1.6, "goodbye"),)),
    ClientModel("f", 0.10),
    ClientModel("g", 0.10),
]


def named(kind: str) -> list[str]:
    """Every part of a slot, as a spec: small orders and few clients, for strategies."""
    found = []
    for part in catalogue.parts(kind):
        given = [p.name for p in part.parameters]
        small = [f"{name}={SMALL[name]}" for name in given if name in SMALL]
        few = f":{','.join(small)}" if small and kind == "strategy" else ""
        found.append(SPECS.get(part.names[0], part.names[0] + few))
    return found


CHOICES = [named(kind) for kind in KINDS]
NAMES = [(slot, name) for slot, names in enumerate(CHOICES) for name in names]


def spec_of(row: Row) -> RunSpec:
    spec = RunSpec("01J8ZQ4T0V7M3N5P6R8S9T0V1W", seed=3)
    return replace(spec, **dict(zip(SLOTS, row, strict=True)))  # type: ignore[arg-type]


@functools.cache
def facts_of(slot: int, name: str) -> Facts:
    """Of the part, made; of a local algorithm, which the clients make, by its source."""
    kind = KINDS[slot]
    if kind == "local algorithm":
        return catalogue.facts_of(kind, name)
    row = ["fedavg", "mean", "sgd", "plain", "fp32"]
    row[slot] = name
    return of_part(kind, name, made_of(spec_of(tuple(row)))[kind], len(CLIENTS))


def allowed(row: Row) -> bool:
    run = Facts("run", "run", gives=frozenset({"client_state", "plain_sgd", "proxy_data"}))
    parts = [facts_of(slot, name) for slot, name in enumerate(row)]
    try:
        check([run, *parts], lambda: ())
    except UsageError:
        return False
    return True


def covering(choices: Sequence[Sequence[str]], slots: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Rows in which every two values of these pairs of slots meet, if any allowed row has them."""
    rng = random.Random("covering")
    left = {(i, x, j, y) for i, j in slots for x, y in itertools.product(choices[i], choices[j])}
    while left:
        i, x, j, y = min(left)
        tries = []
        for _ in range(24):
            row = [rng.choice(names) for names in choices]
            row[i], row[j] = x, y
            tries.append((len(left & met(row, slots)), tuple(row)))
        tries.sort(reverse=True)
        found = next((row for _, row in tries if allowed(row)), None)
        left.discard((i, x, j, y))
        if found is not None:
            left -= met(found, slots)
            yield found


def met(row: Sequence[str], slots: Sequence[tuple[int, int]]) -> set[tuple[int, str, int, str]]:
    return {(i, row[i], j, row[j]) for i, j in slots}


WITH_STRATEGY = [(0, i) for i in range(1, len(SLOTS))]
PAIRS = list(itertools.combinations(range(len(SLOTS)), 2))


# ---- a run and what must hold ----------------------------------------------------------------


def run(row: Row) -> tuple[Simulation, Training, list[tuple[Event, list[Action]]], str]:
    """The run, its tensors, what was heard and decided, and the strategy's state at its end."""
    spec = spec_of(row)
    learning = Training.of(
        [client.name for client in CLIENTS], model="linear", data=DATA, seed=spec.seed,
        local=LocalConfig(batch=4), algorithm=spec.algorithm, aggregation=spec.aggregator,
        step=spec.outer, up=spec.codec_up,
        proxy=PROXY if "proxy_data" in facts_of(1, spec.aggregator).needs else "",
    )  # fmt: skip
    heard: list[tuple[Event, list[Action]]] = []
    strategy = strategy_of(spec)
    made = simulate(
        strategy, CLIENTS, until=60.0, seed=spec.seed, learning=learning,
        rules=Rules(versions=VERSIONS), lease=0.3, history=False,
        listen=lambda now, event, actions: heard.append((event, list(actions))),
    )  # fmt: skip
    return made, learning, heard, state.dumps(strategy)


def holds(row: Row) -> None:
    made, learning, heard, left = run(row)
    assert made.versions >= VERSIONS, made.reason
    versions = [event.version for event, _ in heard if isinstance(event, Merged)]
    assert versions == list(range(1, len(versions) + 1))
    model = learning.model()
    assert all(torch.isfinite(tensor).all() for tensor in model.values())
    start = Training.of(["a"], model="linear", data=DATA, seed=3).model()
    assert any((model[name] != start[name]).any() for name in model), "it stood still"
    fates = fate_of_updates(heard)
    for update, fate in fates.items():
        assert fate or f'"{update}"' in left, f"{update} is neither used, discarded nor held"
    again, other, _, _ = run(row)
    assert again.hash == made.hash
    assert all((other.model()[name] == model[name]).all() for name in model)


def fate_of_updates(heard: Sequence[tuple[Event, list[Action]]]) -> dict[str, str]:
    """Each update received, and what became of it in words; empty where nothing did."""
    fates: dict[str, str] = {}
    for event, actions in heard:
        if isinstance(event, UpdateReceived):
            fates[event.update.id] = ""
        for action in actions:
            if isinstance(action, Discard):
                assert action.reason
                assert not fates[action.update], f"{action.update} is decided twice"
                fates[action.update] = action.reason
            elif isinstance(action, Aggregate):
                for update, _ in action.items:
                    assert not fates[update], f"{update} is decided twice"
                    fates[update] = "used"
    return fates


ROWS = [  # a third of them fast
    pytest.param(row, id=" ".join(row), marks=pytest.mark.slow if number % 3 else ())
    for number, row in enumerate(covering(CHOICES, WITH_STRATEGY))
]


@pytest.mark.parametrize("row", ROWS)
def test_every_part_with_every_strategy(row: Row) -> None:
    holds(row)


@pytest.mark.slow
@pytest.mark.long
def test_every_part_with_every_other() -> None:
    for row in covering(CHOICES, PAIRS):
        try:
            holds(row)
        except Exception as error:
            raise AssertionError(f"{' '.join(row)}: {error}") from error


def test_no_part_is_refused_in_every_mix() -> None:
    seen = {
        (slot, name) for row in covering(CHOICES, WITH_STRATEGY) for slot, name in enumerate(row)
    }
    assert set(NAMES) == seen


def test_an_update_decided_twice_would_be_seen() -> None:
    update = UpdateReceived(Update("u", "o", "a", 0, 1, 1, 0.0, 1.0))
    assert fate_of_updates([(update, [])]) == {"u": ""}
    with pytest.raises(AssertionError, match="twice"):
        fate_of_updates([(update, [Discard("u", "late"), Aggregate((("u", 1.0),))])])
