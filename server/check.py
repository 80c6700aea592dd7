"""Check: refuse what cannot be before a port is opened, a file written, or torch imported.

Names are looked up, not made: their parameters are for the slots themselves, later. Only where data
is not found is torch needed, to say precisely why.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from atoll.aggregation.strategy import Strategy
from atoll.protocols import slots
from atoll.protocols.errors import UsageError
from atoll.server.spec import STRATEGIES, RunSpec

# The built-in names, whose own tables lie beside torch; a test holds these to those.
KNOWN: Mapping[str, frozenset[str]] = {
    "aggregator": frozenset(
        {"mean", "median", "trimmed-mean", "krum", "multi-krum", "rfa", "geometric-median"}
        | {"centered-clipping", "norm-clipping"}
    ),
    "outer": frozenset({"average", "sgd", "momentum", "nesterov", "adam", "yogi", "adagrad"}),
    "local algorithm": frozenset({"plain", "fedprox"}),
    "model": frozenset({"linear", "mlp", "cnn", "resnet18", "charlm"}),
    "codec": frozenset({"fp32", "fp16", "bf16"}),
    "data": frozenset({"digits", "mnist", "cifar10", "text", "npz", "synthetic", "csv"}),
}
FILES = ("mnist", "cifar10", "text", "csv", "npz")  # data that lies at a path


def check(spec: RunSpec, trains: bool = True) -> None:
    """UsageError or DataError for a slot's name; `trains` False: the strategy alone matters."""
    strategy_of(spec)
    if not trains:
        return
    named = [
        ("aggregator", spec.aggregator), ("outer", spec.outer),
        ("local algorithm", spec.algorithm), ("model", spec.model),
        ("codec", spec.codec_up), ("codec", spec.codec_down),
    ]  # fmt: skip
    for slot, name in named:
        _check_name(slot, name)
    _check_data(spec.data)


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
    if name in KNOWN[slot] and not target:
        return
    if target and _importable(name):
        return
    slots.find(slot, spec, dict.fromkeys(KNOWN[slot], ""))  # an entry point, or an error


def _importable(module: str) -> bool:
    """Whether a user's module is there; it is not run, but the packages around it are."""
    slots.see_own_folder()
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _check_data(spec: str) -> None:
    name, _, rest = spec.partition(":")
    if name in KNOWN["data"]:
        there = name not in FILES or Path(rest.partition(",")[0]).exists()
    else:
        there = bool(rest) and _importable(name)
    if not there:
        from atoll.client.data import load_data

        load_data(spec)  # it knows better, and says what is wrong
