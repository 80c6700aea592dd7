"""Check: refuse what cannot be before a port is opened, a file written, or torch imported.

Names are looked up, not made: their parameters are for the slots themselves, later. Then the mix is
judged by what its parts declare (`atoll.aggregation.compose`): here by what can be read without an
import, and once more, by the parts themselves, where they are made. Only where data is not found is
torch needed, to say precisely why.
"""

import importlib.util
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from atoll.aggregation import compose
from atoll.aggregation.strategy import Strategy
from atoll.protocols import codecspec, facts, slots
from atoll.protocols.errors import RAISED, UsageError
from atoll.protocols.facts import Facts
from atoll.protocols.links import Allowed
from atoll.server import catalogue, dp, momenta
from atoll.server.presets import PRESETS
from atoll.server.spec import STRATEGIES, RunSpec

# Aggregators whose needs depend on their parameters, and that can be made without torch.
LEARNERS: Mapping[str, str] = {"fedlaw": "atoll.aggregation.fedlaw:FedLaw"}
FILES = ("mnist", "cifar10", "text", "csv", "npz")  # data that lies at a path
SLOTS: Mapping[str, str] = {  # slot -> the field of the spec that names it
    "strategy": "strategy",
    "aggregator": "aggregator",
    "outer": "outer",
    "local algorithm": "algorithm",
    "codec": "codec_up",
    "codec down": "codec_down",
}


def check(
    spec: RunSpec,
    trains: bool = True,
    clients: int | None = None,
    made: Mapping[str, object] = MappingProxyType({}),
) -> list[str]:
    """Warnings. UsageError or DataError for a slot's name, or a mix that cannot be.

    `trains` False: the strategy alone will be used, and what else is named need not go together.
    `clients`: how many there will ever be. `made` are parts that are objects already, by slot.
    """
    strategy = strategy_of(spec) if "strategy" not in made else made["strategy"]
    for one in each_pair(spec):
        for slot, name in [*_named(one).items(), ("model", spec.model)]:
            if slot.startswith("codec") and slot not in made:
                _check_codec(name)
            elif slot not in made and slot != "strategy":
                _check_name(slot, name)
    if "data" not in made and spec.data:
        _check_data(spec.data)
    if spec.trainer and not _importable(slots.split(spec.trainer)[0]):
        slots.find("trainer", spec.trainer, {})
    if not trains:
        return []
    _check_shape(spec, made)
    learner = _learner(spec) if "aggregator" not in made else {}
    return mixed(spec, clients, {**learner, **made, "strategy": strategy})


def wants_proxy(aggregator: str) -> bool:
    """Whether it is a built-in one that cannot do without proxy data."""
    name, own, _ = slots.split(aggregator)
    if own or name not in LEARNERS:
        return False
    return "proxy_data" in facts.of_object("aggregator", name, _made(aggregator)).needs


def _learner(spec: RunSpec) -> Mapping[str, object]:
    """The aggregator, made, where it is a built-in one that may learn. UsageError FL-S104."""
    name, own, _ = slots.split(spec.aggregator)
    if not own and name in LEARNERS:
        made = _made(spec.aggregator)
        if spec.proxy and not getattr(made, "learns", False):
            raise useless(spec.aggregator)
        return {"aggregator": made}
    if not own and spec.proxy and name in catalogue.builtin("aggregator"):
        raise useless(spec.aggregator)
    return {}


def _made(aggregator: str) -> object:
    return slots.resolve("aggregator", aggregator, LEARNERS)


def useless(aggregator: str) -> UsageError:
    """What to say of proxy data that nobody learns by."""
    return UsageError(
        "FL-S104", f"--proxy, but aggregator {aggregator} learns nothing from it",
        "drop --proxy, or use --aggregator fedlaw",
    )  # fmt: skip


def mixed(
    spec: RunSpec,
    clients: int | None,
    made: Mapping[str, object],
) -> list[str]:
    """Judge the mix: by the parts in `made`, by slot, and by what can be read of the others.

    With every pair of codecs that a client may get, and of two momenta.
    """
    _check_waits(spec, clients, made.get("strategy"))
    found = [warning for one in each_pair(spec) for warning in _mixed(one, clients, made)]
    swings = momenta.remark(spec.outer, spec.algorithm)
    found += [swings] if swings else []
    return list(dict.fromkeys(found))


def _check_waits(spec: RunSpec, clients: int | None, strategy: object) -> None:
    """UsageError FL-S104 where the strategy would wait for ever for clients that never come."""
    if clients is None or not isinstance(strategy, Strategy):
        return
    fewest, most = strategy.merge_sizes(clients)
    wanted = {"min_clients": getattr(strategy, "min_clients", 1)}
    if most is not None:
        wanted["min_results"] = fewest
    for name, least in wanted.items():
        if least > clients:
            raise UsageError(
                "FL-S104",
                f"strategy {spec.strategy} waits for {least} clients, and there are {clients}",
                f"lower {name}, or give more --clients",
            )


def each_pair(spec: RunSpec) -> list[RunSpec]:
    """The same run with one codec each way, for each that it allows."""
    allowed = Allowed.of(spec.codec_up, spec.codec_down)
    return [
        replace(spec, codec_up=up, codec_down=down) for up in allowed.up for down in allowed.down
    ]


def _mixed(spec: RunSpec, clients: int | None, made: Mapping[str, object]) -> list[str]:
    parts = [_of_the_run(spec), *dp.facts_of(spec)]
    for slot, name in _named(spec).items():
        part = made.get(slot)
        parts.append(
            catalogue.facts_of(slot, name) if part is None else of_part(slot, name, part, clients)
        )
    return compose.check(parts, _offers)


def _offers() -> Iterator[Facts]:
    """What could stand in a mix. What a strategy gives may depend on its parameters (FedAvg's
    rounds), so ours are made as they come: they need no torch. One that is a whole method brings
    other parts along, and is no remedy."""
    yield from catalogue.offers()
    for name, where in STRATEGIES.items():
        if name in PRESETS:
            continue
        yield of_part("strategy", name, pkgutil.resolve_name(where)())


def check_simulated(
    spec: RunSpec, made: Mapping[str, object], strategy: Strategy, clients: int
) -> list[str]:
    """As `check`, for a simulation of `strategy`; then by the parts themselves."""
    given = {**made, "strategy": strategy}
    where = f"{type(strategy).__module__}:{type(strategy).__qualname__}"
    name = next((name for name, known in STRATEGIES.items() if known == where), where)
    spec = replace(spec, strategy=name)
    check(spec, clients=clients, made=given)
    return mixed(spec, clients, {**made_of(spec, given), **given})


def made_of(spec: RunSpec, but: Collection[str] = ()) -> dict[str, object]:
    """The server's parts of the mix `but` for some, made: what they declare may depend on their
    parameters."""
    from atoll.aggregation.aggregator import aggregator
    from atoll.aggregation.outer import outer
    from atoll.protocols.codecs import codec

    first = each_pair(spec)[0]
    makers: dict[str, Callable[[], object]] = {
        "strategy": lambda: strategy_of(spec),
        "aggregator": lambda: aggregator(spec.aggregator),
        "outer": lambda: outer(spec.outer),
        "codec": lambda: codec(first.codec_up),
        "codec down": lambda: codec(first.codec_down),
    }
    return {slot: make() for slot, make in makers.items() if slot not in but}


def of_part(slot: str, name: str, part: object, clients: int | None = None) -> Facts:
    found = facts.of_object(slot, name, part)
    if slot.startswith("codec"):
        return catalogue.with_around(found)
    if isinstance(part, Strategy):
        return replace(found, merges=part.merge_sizes(clients))
    return found


def _of_the_run(spec: RunSpec) -> Facts:
    """What the run's own options give; clients of this package keep state in any case."""
    gives = {"client_state"}
    if spec.proxy:
        gives |= {"proxy_data", "validators"}  # it judges in their place
    if not spec.local_dp:
        gives.add("validators")  # whoever is able and willing, in any run
    if spec.local.get("optimizer", "sgd") == "sgd" and not spec.local.get("momentum"):
        gives.add("plain_sgd")
    return Facts("run", spec.name, gives=frozenset(gives))


def _named(spec: RunSpec) -> dict[str, str]:
    return {slot: getattr(spec, field) for slot, field in SLOTS.items()}


def _check_shape(spec: RunSpec, made: Mapping[str, object]) -> None:
    shapeless = not spec.data and "data" not in made and "model" not in made
    if shapeless and slots.split(spec.model)[0] in catalogue.builtin("model"):
        raise UsageError(
            "FL-S104", f"model {spec.model!r} takes its shape from the data, and there is none",
            "give --data, or --model MODULE:OBJECT of your own",
        )  # fmt: skip


def check_clients(spec: RunSpec) -> None:
    """UsageError FL-S104 where clients of ours would have nothing to train on."""
    if not (spec.data or spec.trainer):
        raise UsageError(
            "FL-S104", "--data none, and clients that train on it", "give --data, or a --trainer"
        )


def strategy_of(spec: RunSpec) -> Strategy:
    """A fresh strategy, parameters and all: this one takes no time to make."""
    made = slots.resolve("strategy", spec.strategy, STRATEGIES)
    if not isinstance(made, Strategy):
        raise UsageError(
            "FL-S102", f"strategy {spec.strategy!r} is a {type(made).__name__}",
            "derive it from atoll.aggregation.Strategy",
        )  # fmt: skip
    return made


def _check_name(slot: str, spec: str) -> None:
    name, target, _ = slots.split(spec)
    where, _ = slots.locate(slot, spec, catalogue.builtin(slot))
    if target and not _importable(name):
        slots.find(slot, where, {})  # it knows better, and says what is wrong


def _check_codec(spec: str) -> None:
    chain = codecspec.known(codecspec.parse(spec))
    if chain.own and not _importable(chain.name.partition(":")[0]):
        slots.find("codec", chain.name, {})  # it knows better, and says what is wrong


def _importable(module: str) -> bool:
    """Whether a user's module is there; it is not run, but the packages around it are."""
    slots.see_own_folder()
    try:
        return importlib.util.find_spec(module) is not None
    except RAISED:  # of a package around it
        return False


def _check_data(spec: str) -> None:
    name, _, rest = spec.partition(":")
    if name in catalogue.builtin("data"):
        there = name not in FILES or Path(rest.partition(",")[0]).exists()
    else:
        there = bool(rest) and _importable(name)
    if not there:
        from atoll.client.data import load_data

        load_data(spec)  # it knows better, and says what is wrong
